"""The lines of the README that call curl and headrace all run as they are written, on an API over real servers."""

import io
import json
import os
import re
import subprocess
import sys
import uuid

import pytest

from tests.running import ROOT

BLOCKS = re.findall(r"<!-- run -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def shell(live, tmp_path):
    """Run a line of the README in bash, with this API's port in place of 3000; returns what it printed."""
    binary = tmp_path / "bin"
    binary.mkdir()
    command = binary / "headrace"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m api.cli "$@"\n')
    command.chmod(0o755)
    for name in ("events", "a", "b"):
        (tmp_path / f"{name}.ndjson").write_bytes(b'{"n":1}\n{"n":2}\nbad\n')
    environment = dict(os.environ) | {
        "PATH": f"{binary}:{os.environ['PATH']}",
        "API_URL": f"http://127.0.0.1:{live.port}",
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "COLUMNS": "200",
        "MONGO_URI": live.settings.mongo_uri.get_secret_value(),
        "AWS_ENDPOINT_URL": live.settings.aws_endpoint_url,
        "AWS_BUCKET_NAME": live.settings.aws_bucket_name,
        "AWS_ACCESS_KEY_ID": live.settings.aws_access_key_id,
        "AWS_SECRET_ACCESS_KEY": live.settings.aws_secret_access_key.get_secret_value(),
    }

    def run(line):
        here = line.replace("127.0.0.1:3000", f"127.0.0.1:{live.port}")
        done = subprocess.run(
            ["bash", "-c", here], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{line}: exit code {done.returncode}: {done.stdout}{done.stderr}"
        assert "urn:headrace:problem" not in done.stdout, f"{line}: {done.stdout}"
        return done.stdout

    run.environment = environment
    return run


def submit(live, finish, data, **body):
    key = live.objects.upload(io.BytesIO(data), f"readme/{uuid.uuid4().hex}.ndjson").key
    job_id = live.http.post(f"/process/{key}", json=body).json()["jobId"]
    if "runAt" not in body:
        finish(job_id)
    return job_id


def test_every_line_of_the_readme_runs(live, finish, shell):
    assert sum(line.startswith("curl") for line in LINES) >= 3
    assert sum(line.startswith("headrace") for line in LINES) >= 12
    shell.environment["FAILED"] = submit(live, finish, b"bad\n", maxErrors=0)
    shell.environment["OPEN"] = submit(live, finish, b"{}\n", runAt="2099-01-01T00:00:00Z")
    for line in LINES:
        told = shell(line)
        if "/uploads -d " in line:
            begun = json.loads(told)
            shell.environment |= {"UPLOAD": begun["uploadId"], "URL": begun["urls"][0]["url"]}
        elif line.endswith("/complete"):
            assert json.loads(told)["fileKey"] == begun["fileKey"]
        elif "/upload " in line or line.endswith("/upload"):
            shell.environment["KEY"] = json.loads(told)["fileKey"]
        elif "/process/" in line:
            shell.environment["JOB"] = json.loads(told)["jobId"]
            finish(shell.environment["JOB"])
