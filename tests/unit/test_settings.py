"""Settings: read from the environment and .env, checked together, all errors reported at once, secrets never shown."""

import pytest

from engine.errors import SettingsError
from engine.settings import Settings, load


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("65536", 65536),
        ("64KiB", 65536),
        ("1 MiB", 2**20),
        ("1.5GB", 1_500_000_000),
        ("2g", 2 * 10**9),
        ("66kB", 66_000),
        ("64MB", 64_000_000),
        ("1t", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_may_be_written_with_units(monkeypatch, written, size):
    monkeypatch.setenv("ENGINE_RANGE_BYTES", written)
    assert load()[0].engine_range_bytes == size


def test_the_environment_wins_over_the_file_and_an_empty_value_counts_as_unset(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("ENGINE_WORKERS=7\nPORT=4000\nAWS_REGION=eu-north-1\n")
    monkeypatch.setenv("ENGINE_WORKERS", "5")
    monkeypatch.setenv("PORT", "")
    settings, _ = load()
    assert (settings.engine_workers, settings.port, settings.aws_region) == (5, 4000, "eu-north-1")


@pytest.mark.parametrize(("workers", "writers"), [(1, 4), (32, 4), (33, 3), (64, 2), (1024, 2)])
def test_many_workers_have_fewer_writers_each(workers, writers):
    assert Settings(engine_workers=workers).engine_writers == writers


def test_a_file_of_settings_that_cannot_be_opened_stops_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").mkdir()
    with pytest.raises(SettingsError, match=r"^\.env cannot be read"):
        load()


def test_a_level_may_be_written_as_elsewhere(monkeypatch):
    monkeypatch.setenv("ENGINE_LOG_LEVEL", "INFO")
    assert Settings().engine_log_level == "info"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mongodb://u:hidden@h/db?bogus=hidden", "Unknown option: bogus"),
        ("mongodb://u:hidden@h/db?maxPoolSize=hidden", "The value of maxpoolsize must be an integer"),
        ("mongodb://u:hid@den@h/db", "InvalidURI"),
        ("mongodb://h/db?server_api=hidden", "TypeError"),
        ("mongodb://h/db?datetime_conversion=hidden", "KeyError"),
        ("mongodb://u:hidden@h/records\n", "a line end in it"),
        ("mongodb://u:hid den@h/records", "a blank"),
        (
            "mongodb://u:hidden@h/db?tls=true&tlsCAFile=/no/ca.pem",
            "/no/ca.pem that it names cannot be read (No such file",
        ),
    ],
)
def test_what_is_wrong_in_a_uri_is_told_without_its_secrets(monkeypatch, uri, words):
    monkeypatch.setenv("MONGO_URI", uri)
    with pytest.raises(SettingsError) as caught:
        load()
    assert words in str(caught.value)
    assert "hid" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(monkeypatch):
    for name, value in {"PORT": "x", "ENGINE_WORKERS": "0", "ENGINE_RANGE_BYTES": "64 apples"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as told:
        load()
    assert [line.split(":")[0] for line in str(told.value).splitlines()] == [
        "PORT=x",
        "ENGINE_WORKERS=0",
        "ENGINE_RANGE_BYTES=64 apples",
    ]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"MONGO_URI": "postgres://h/d"}, "MONGO_URI"),
        ({"MONGO_URI": "mongodb://h/headrace_control"}, "ENGINE_CONTROL_DB"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ACCESS_KEY_ID": "a"}, "AWS_SECRET_ACCESS_KEY"),
        ({"ENGINE_LEASE_SECONDS": "80"}, "ENGINE_WATCHDOG_SECONDS"),
        ({"API_MAX_WATCHERS": "100"}, "API_THREADS"),
        ({"ENGINE_CONTROL_DB": "headrace"}, "ENGINE_CONTROL_DB"),
    ],
)
def test_settings_that_contradict_each_other_stop_the_start(monkeypatch, changes, word):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=word):
        load()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "API_TOKEN"])
def test_what_no_header_can_carry_is_told_of_its_setting(monkeypatch, name):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(name, "one\ntwo")
    with pytest.raises(SettingsError, match=f"^{name}.*line ends") as told:
        load()
    assert "\n" not in str(told.value)
    assert "two" not in str(told.value)


def test_what_is_wrong_alone_does_not_hide_what_is_wrong_together(monkeypatch):
    for name, value in {"PORT": "x", "AWS_ACCESS_KEY_ID": "a", "ENGINE_LEASE_SECONDS": "80"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as told:
        load()
    assert sorted(line.split(":")[0].split("=")[0].split()[0] for line in str(told.value).splitlines()) == [
        "AWS_ACCESS_KEY_ID",
        "ENGINE_WATCHDOG_SECONDS",
        "PORT",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENGINE_LEASE_SECONDS", "inf"),
        ("ENGINE_POLL_SECONDS", "nan"),
        ("ENGINE_RANGE_BYTES", "9" * 30),
        ("ENGINE_RANGE_BYTES", "-1"),
        ("ENGINE_CONTROL_DB", "a.b"),
        ("ENGINE_CONTROL_DB", "x" * 64),
        ("ENGINE_CONTROL_DB", "control\n"),
        ("MONGO_URI", "mongodb://h/records%0A"),
        ("AWS_REGION", "eu central"),
        ("AWS_BUCKET_NAME", "a/b"),
        ("AWS_ENDPOINT_URL", "http://h:0"),
        ("AWS_ENDPOINT_URL", "http://h:99999"),
        ("AWS_ENDPOINT_URL", "ftp://h"),
        ("MONGO_URI", "mongodb://h/my.db"),
        ("MONGO_URI", "mongodb://h:port/x"),
        ("MONGO_URI", "mongodb://"),
        ("API_PART_BYTES", "1MiB"),
        ("ENGINE_LOG_LEVEL", "loud"),
    ],
)
def test_a_value_that_can_never_work_is_refused_by_its_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as told:
        load()
    assert [line for line in str(told.value).splitlines() if name in line]


@pytest.mark.parametrize(
    ("uri", "database"),
    [
        ("mongodb+srv://me:pass%2Cword%23@cluster.example/shop", "shop"),
        ("mongodb+srv://me:p@cluster.example/shop?srvMaxHosts=2&srvServiceName=db", "shop"),
        ("mongodb+srv://me:p@cluster.example/shop?srvMaxHosts=2&tls=true", "shop"),
        ("mongodb+srv://me:p@cluster.example/shop?tls=true&srvMaxHosts=2", "shop"),
        ("mongodb://me:a%2Fb%40c@one.example,two.example:27018/shop?replicaSet=rs0", "shop"),
        ("mongodb://[::1]:27017/shop", "shop"),
        ("mongodb://%2Ftmp%2Fmongodb-27017.sock/shop", "shop"),
    ],
)
def test_every_way_of_writing_a_uri_is_read_as_the_driver_reads_it(monkeypatch, uri, database):
    monkeypatch.setenv("MONGO_URI", uri)
    assert load()[0].data_db() == database


def test_the_name_of_a_database_may_have_63_bytes(monkeypatch):
    monkeypatch.setenv("ENGINE_CONTROL_DB", "x" * 63)
    assert load()[0].engine_control_db == "x" * 63


def test_a_password_is_a_secret_in_each_way_of_writing_it(monkeypatch):
    monkeypatch.setenv("MONGO_URI", "mongodb://me:p%40ss%2C+w%23rd@h/d")
    assert {"p@ss, w#rd", "p%40ss%2C+w%23rd", "p%40ss%2C%20w%23rd"} <= set(load()[0].secrets())


def test_a_name_that_is_no_setting_is_warned_about_with_the_nearest_one(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINE_WORKER", "3")
    (tmp_path / ".env").write_text("API_NONSENSE=1\nOTHER=2\n")
    _, warnings = load()
    assert len(warnings) == 2
    assert warnings[1] == "ENGINE_WORKER is not a setting of Headrace: did you mean ENGINE_WORKERS?"
    assert warnings[0].startswith("API_NONSENSE is not a setting")


def test_a_wrong_secret_is_not_repeated_in_the_message(monkeypatch):
    monkeypatch.setenv("MONGO_URI", "mongodb://me:hunter2@@:x/")
    with pytest.raises(SettingsError) as told:
        load()
    assert "hunter2" not in str(told.value)


def test_the_secrets_are_the_keys_the_uri_and_the_password_in_it():
    settings = Settings.model_validate(
        {"mongo_uri": "mongodb://me:hunter2@h/d", "aws_access_key_id": "a", "aws_secret_access_key": "s3cret"}
    )
    assert set(settings.secrets()) == {"s3cret", "mongodb://me:hunter2@h/d", "hunter2"}
    assert "hunter2" not in repr(settings)
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("uri", "name"),
    [("mongodb://h/", "headrace"), ("mongodb://h", "headrace"), ("mongodb://a,b:1/shop?w=1", "shop")],
)
def test_the_database_of_the_uri_takes_the_documents(uri, name):
    assert Settings.model_validate({"mongo_uri": uri}).data_db() == name


def test_a_name_in_the_file_that_is_nearly_a_setting_is_told(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("MONGO_URL=mongodb://h/x\nAWS_BUCKET=mine\nAWS_PROFILE=p\nHOME_PAGE=x\n")
    monkeypatch.setenv("MONGODB_URI", "mongodb://h/y")
    _, warnings = load()
    assert warnings == [
        "AWS_BUCKET is not a setting of Headrace: did you mean AWS_BUCKET_NAME?",
        "MONGODB_URI is not a setting of Headrace: did you mean MONGO_URI?",
        "MONGO_URL is not a setting of Headrace: did you mean MONGO_URI?",
    ]


@pytest.mark.parametrize("line", ['PORT="3333', "PORT: 3333"])
def test_a_line_of_the_file_that_cannot_be_read_stops_the_start(tmp_path, line):
    (tmp_path / ".env").write_text(f"# settings\n\nENGINE_WORKERS=3\n{line}\n")
    with pytest.raises(SettingsError, match=r"\.env, line 4: it cannot be read"):
        load()


@pytest.mark.parametrize("name", ["local", "admin", "Config"])
def test_a_database_of_mongodbs_own_takes_no_documents_and_no_jobs(name, monkeypatch):
    monkeypatch.setenv("MONGO_URI", f"mongodb://h/{name}")
    with pytest.raises(SettingsError, match="authSource"):
        load()
    monkeypatch.delenv("MONGO_URI")
    monkeypatch.setenv("ENGINE_CONTROL_DB", name)
    with pytest.raises(SettingsError, match="MongoDB's own"):
        load()


def test_spaces_around_a_host_are_no_part_of_it(monkeypatch):
    monkeypatch.setenv("API_HOST", " 127.0.0.1 ")
    assert load()[0].api_host == "127.0.0.1"


@pytest.mark.parametrize("host", [" ", "here and there"])
def test_an_address_to_listen_on_has_no_spaces_and_is_one(monkeypatch, host):
    monkeypatch.setenv("API_HOST", host)
    with pytest.raises(SettingsError, match=r"API_HOST=.*write an address"):
        load()
