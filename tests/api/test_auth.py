"""Tokens, on APIs over real servers: each may do what its scopes allow and nothing else; secrets are shown nowhere."""

import contextlib
import hashlib
import io
import json
import socket
import subprocess
import sys
import uuid

import httpx
import pytest

from api.auth import draw, tokens_of
from api.operations import Scope
from engine.errors import SettingsError
from engine.ports import free_port
from engine.settings import Settings
from tests.running import ROOT, Running, until

SCOPED = {
    "reader": [Scope.READ],
    "sender": [Scope.SUBMIT],
    "admin": [Scope.ADMIN],
}


@pytest.fixture(scope="module")
def guarded(live, tmp_path_factory):
    """An API with tokens, over the same servers as the one without: by name, a client for each token, one with none and
    one with an unknown token; and its `log`, and the tokens as `secrets`."""
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    drawn = {name: draw(name, scopes) for name, scopes in SCOPED.items()}
    file = folder / "tokens"
    file.write_text(f"# those of people\n{drawn['admin'][1]}\n")
    entries = f"{drawn['reader'][1]}, {drawn['sender'][1]}"
    api = Running("api", live.settings, folder / "api.log", port=port, api_tokens=entries, api_tokens_file=file)
    with contextlib.ExitStack() as stack:
        stack.callback(api.end)

        def client(token):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60))

        clients = {name: client(token) for name, (token, _) in drawn.items()} | {"nobody": client(None)}
        clients["stranger"] = client("hr_" + "x" * 43)
        until(lambda: _up(clients["nobody"]), what="the API's first answer")
        clients["log"] = api.log
        clients["secrets"] = [token for token, _ in drawn.values()]
        yield clients


def _up(http):
    with contextlib.suppress(httpx.HTTPError):
        return http.get("/healthz").status_code == 200
    return False


CALLS = [
    ("GET", "/jobs", "read"),
    ("GET", "/jobs/6b04fa6b779ece9e9d7d9cbc", "read"),
    ("GET", "/status/6b04fa6b779ece9e9d7d9cbc", "read"),
    ("GET", "/jobs/6b04fa6b779ece9e9d7d9cbc/events", "read"),
    ("GET", "/jobs/6b04fa6b779ece9e9d7d9cbc/rejects", "read"),
    ("GET", "/batches/6b04fa6b779ece9e9d7d9cbc", "read"),
    ("GET", "/files", "read"),
    ("GET", "/files/nothing", "read"),
    ("GET", "/workers", "read"),
    ("GET", "/queue", "read"),
    ("GET", "/metrics", "read"),
    ("POST", "/upload", "submit"),
    ("POST", "/uploads", "submit"),
    ("GET", "/uploads/x", "submit"),
    ("DELETE", "/uploads/x", "submit"),
    ("POST", "/uploads/x/complete", "submit"),
    ("POST", "/uploads/x/abort", "submit"),
    ("POST", "/process", "submit"),
    ("POST", "/process/nothing", "submit"),
    ("POST", "/jobs/6b04fa6b779ece9e9d7d9cbc/cancel", "submit"),
    ("POST", "/jobs/6b04fa6b779ece9e9d7d9cbc/retry", "submit"),
    ("DELETE", "/files/nothing", "admin"),
    ("POST", "/queue/pause", "admin"),
    ("POST", "/queue/resume", "admin"),
]
MAY = {
    "reader": {"read"},
    "sender": {"submit"},
    "admin": {"read", "submit", "admin"},
    "nobody": set(),
    "stranger": set(),
}


@pytest.mark.parametrize("who", MAY)
@pytest.mark.parametrize(("method", "path", "scope"), CALLS)
def test_a_call_needs_its_scope(guarded, who, method, path, scope):
    answer = guarded[who].request(method, path)
    if path == "/queue/pause":  # other tests wait for jobs
        assert guarded["admin"].post("/queue/resume").status_code == 200
    if scope in MAY[who]:
        assert answer.status_code not in (401, 403)
    else:
        assert answer.status_code == (401 if who in ("nobody", "stranger") else 403)
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.status_code == 403 or answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_call_of_the_description_is_guarded_as_it_says(guarded):
    described = guarded["nobody"].get("/openapi.json").json()
    found = {
        (method.upper(), path): operation.get("security", [{}])[0].get("bearer", [None])[0]
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    shapes = {
        (m, p.replace("6b04fa6b779ece9e9d7d9cbc", "*").replace("nothing", "*").replace("/x", "/*")): s
        for m, p, s in CALLS
    }
    starred = {}
    for (method, path), scope in found.items():
        plain = "/".join("*" if part.startswith("{") else part for part in path.split("/"))
        starred[method, plain] = scope
    assert {call: scope for call, scope in starred.items() if scope} == shapes


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/docs", "/docs/swagger-ui.css"])
def test_health_and_documentation_are_open(guarded, path):
    until(lambda: guarded["nobody"].get(path).status_code == 200, what="an answer")  # /readyz waits for none for long


@pytest.mark.parametrize("header", ["Bearer", "Basic abc", "bearer \xff", "Bearer a b", "x" * 5000])
def test_a_header_that_is_no_token_is_refused(guarded, header):
    answer = guarded["nobody"].get("/jobs", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code in (400, 401)


def test_the_hash_is_no_token(guarded):
    digest = hashlib.sha256(guarded["secrets"][0].encode()).hexdigest()
    assert guarded["nobody"].get("/jobs", headers={"Authorization": f"Bearer {digest}"}).status_code == 401


def test_one_token_does_not_see_the_repeats_of_another(guarded, live):
    """Two tokens may use the same idempotency key for different jobs."""
    key = live.objects.upload(io.BytesIO(b"{}\n"), f"t/{uuid.uuid4().hex}").key
    same = {"Idempotency-Key": "same"}
    ids = {guarded[who].post(f"/process/{key}", headers=same).json()["jobId"] for who in ("sender", "admin")}
    assert len(ids) == 2


def test_tokens_are_found_nowhere(guarded, live):
    key = live.objects.upload(io.BytesIO(b"{}\n"), f"t/{uuid.uuid4().hex}").key
    for who in ("reader", "sender", "admin", "stranger"):
        guarded[who].get("/jobs")
        guarded[who].post(f"/process/{key}", headers={"Idempotency-Key": "found-nowhere"})
    log = guarded["log"].read_text()
    assert log.count(f"/process/{key}") >= 4
    assert not any(secret in log for secret in guarded["secrets"])
    everything = json.dumps(
        [list(live.store.control[name].find()) for name in ("jobs", "workers", "uploads")], default=str
    )
    assert not any(secret in everything for secret in guarded["secrets"])


def _api(settings, tmp_path, **changes):
    given = {"mongo_uri": settings.mongo_uri.get_secret_value(), "aws_bucket_name": "b", "aws_region": "r"}
    given |= {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    environment = {name.upper(): str(value) for name, value in (given | changes).items()}
    command = [sys.executable, "-m", "api.cli", "api"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, cwd=tmp_path)


def test_without_tokens_no_other_address_is_listened_on(settings, tmp_path):
    done = _api(settings, tmp_path, api_host="0.0.0.0", pythonpath=ROOT)
    assert done.returncode == 1
    assert "API_TOKENS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("entry", ["secret-of-mine", "a:read:xyz", f"a:root:{'0' * 64}", f"a::{'0' * 64}"])
def test_a_wrong_entry_stops_the_start_and_is_not_shown(settings, tmp_path, entry):
    done = _api(settings, tmp_path, api_tokens=entry, pythonpath=ROOT)
    assert (done.returncode, entry in done.stderr) == (1, False)
    assert "headrace token" in done.stderr


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:3000"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "evil.example@localhost"}, 403),
        ({"Host": "localhost/evil"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "[::1]:3000"}, 200),
        ({"Host": "localhost"}, 200),
    ],
)
def test_without_tokens_pages_of_other_sites_are_refused(live, headers, status):
    assert live.http.get("/jobs", headers=headers).status_code == status


def test_secrets_planted_in_the_settings_are_found_nowhere(settings, tmp_path):
    """No log, error or output shows the credentials of a database and an S3 that cannot be reached."""
    planted = "pl4nted-secret"
    port = free_port()
    changes = {
        "port": port,
        "mongo_uri": f"mongodb://user:{planted}-mongo@127.0.0.1:9/records",
        "aws_secret_access_key": f"{planted}-key",
        "aws_session_token": f"{planted}-session",
        "aws_endpoint_url": "http://127.0.0.1:9",
        "api_token": f"{planted}-token",
    }
    told = []
    for command in ("api", "engine"):
        running = Running(command, settings, tmp_path / f"{command}.log", **changes)
        if command == "engine":
            until(lambda running=running: running.actions("wait"), what="a word of the engine")
        else:
            running.process.wait(40)
        running.end()
        told.append(running.log.read_text())
    environment = {name.upper(): str(value) for name, value in changes.items()}
    for command in (["doctor"], ["config"], ["config", "--json"], ["jobs"]):
        done = subprocess.run(
            [sys.executable, "-m", "api.cli", *command],
            env=environment | {"AWS_ACCESS_KEY_ID": "k", "AWS_BUCKET_NAME": "b", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        told.append(done.stdout + done.stderr)
        assert "Traceback" not in done.stderr
    assert all(text.strip() for text in told)
    assert not any(planted in text for text in told)


def test_nobody_who_may_not_upload_fills_the_spool(guarded):
    """The refusal follows the head alone: a body of a gigabyte is never received."""
    port = guarded["nobody"].base_url.port
    for who, status in (("nobody", b" 401 "), ("reader", b" 403 ")):
        token = guarded[who].headers.get("Authorization", "").encode()
        head = b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n"
        head += b"Authorization: " + token + b"\r\n" if token else b""
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            line.sendall(head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n")
            answer = line.recv(65536)
        assert status in answer.split(b"\r\n", 1)[0]
        assert b"application/problem+json" in answer


@pytest.mark.parametrize("who", ["sender", "admin"])
def test_raw_lines_are_shown_to_who_may_read_only(guarded, live, who):
    key = live.objects.upload(io.BytesIO(b"bad\n"), f"t/{uuid.uuid4().hex}.ndjson").key
    job_id = guarded["sender"].post(f"/process/{key}", json={"maxErrors": 0}).json()["jobId"]
    until(lambda: live.http.get(f"/status/{job_id}").json()["status"] == "FAILED", what="the failure")
    for what in ("retry", "cancel"):
        answer = guarded[who].post(f"/jobs/{job_id}/{what}")
        assert answer.status_code == 202 or what == "cancel"  # which may come after the job's end
        if answer.status_code == 202:
            assert bool(answer.json()["errors"]) == (who == "admin")
    assert live.http.get(f"/status/{job_id}").json()["errors"]


def test_a_load_whose_token_may_not_look_tells_the_job_and_uploads_again_what_is_gone(guarded, live, tmp_path):
    file = tmp_path / "a.ndjson"
    file.write_bytes(b'{"n":1}\n')
    environment = {
        "API_URL": str(guarded["sender"].base_url).rstrip("/"),
        "API_TOKEN": guarded["secrets"][list(SCOPED).index("sender")],
        "XDG_STATE_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }

    def load(*options):
        command = [sys.executable, "-m", "api.cli", "load", str(file), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    done = load("--wait")
    job_id = done.stdout.strip()
    assert (done.returncode, len(job_id)) == (1, 24)
    assert f"job {job_id} goes on" in done.stderr
    key = live.http.get(f"/status/{job_id}").json()["fileKey"]
    until(lambda: live.http.get(f"/status/{job_id}").json()["status"] == "COMPLETED", what="the end of the job")
    live.objects.delete(key)
    again = load("--collection", "other")
    assert again.returncode == 0
    assert live.http.get(f"/status/{again.stdout.strip()}").json()["fileKey"] != key


def test_a_comment_in_a_file_of_tokens_may_be_indented(tmp_path):
    token, entry = draw("x", [Scope.READ])
    (tmp_path / "tokens").write_text(f"  # mine\n\n  {entry}  \n\t# more\n")
    [found] = tokens_of(Settings(api_tokens_file=tmp_path / "tokens"))
    assert found.digest == hashlib.sha256(token.encode()).hexdigest()


def test_a_list_without_an_entry_is_no_open_door(settings, tmp_path):
    """An empty list is an error: whoever removes the last token does not mean to let everybody in."""
    (tmp_path / "tokens").write_text("# ci:read:0000\n\n")
    for given in ({"api_tokens_file": tmp_path / "tokens"}, {"api_tokens": " , "}):
        with pytest.raises(SettingsError, match="hold no entry"):
            tokens_of(Settings(**given))
    assert tokens_of(Settings()) == []
    done = _api(settings, tmp_path, api_tokens_file=tmp_path / "tokens", pythonpath=ROOT)
    assert (done.returncode, "hold no entry" in done.stderr) == (1, True)


@pytest.mark.parametrize("folder", ["/nowhere", "/proc", "/dev/null"])
def test_all_that_is_wrong_with_the_api_is_told_at_once(settings, tmp_path, folder):
    done = _api(settings, tmp_path, api_tokens="nonsense", api_spool_dir=folder, pythonpath=ROOT)
    assert done.returncode == 1
    assert f"API_SPOOL_DIR={folder} accepts no files" in done.stderr
    assert "API_TOKENS: entry 1" in done.stderr


@pytest.mark.parametrize(("host", "word"), [("192.0.2.7", "API_HOST=192.0.2.7"), ("no.such.host.invalid", "API_HOST")])
def test_an_address_that_is_none_of_this_machine_is_named(settings, tmp_path, host, word):
    _, entry = draw("x", [Scope.READ])
    done = _api(settings, tmp_path, api_host=host, api_tokens=entry, port=free_port(), pythonpath=ROOT)
    assert done.returncode == 1
    assert word in done.stderr
    assert "taken" not in done.stderr


@pytest.mark.parametrize(("caller", "state"), [("reader", "ok"), ("sender", "ok"), ("nobody", "warning")])
def test_the_doctor_tells_whether_the_token_is_taken(guarded, run, caller, state):
    token = guarded[caller].headers.get("Authorization", "").removeprefix("Bearer ")
    found = json.loads(run("doctor", "--json", API_URL=str(guarded[caller].base_url), API_TOKEN=token).out)
    [api] = [each for each in found if each["what"] == "API"]
    assert (api["state"], "set API_TOKEN" in api["message"]) == (state, state == "warning")
