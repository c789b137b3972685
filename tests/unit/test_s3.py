"""How long the clients of AWS wait for an answer. No servers."""

import pytest

from engine.s3.client import _core
from engine.settings import Settings


@pytest.mark.parametrize("lease", [1, 30])
def test_the_server_of_roles_is_waited_for_no_longer_than_a_worker_may_be_silent(lease):
    settings = Settings.model_validate({"engine_lease_seconds": lease})
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "eu-west-1"}
    config = _core(settings).create_client("sts", **keys).meta.config
    assert config.retries["total_max_attempts"] == 1
    assert config.connect_timeout + config.read_timeout <= settings.answer_seconds
    assert settings.answer_seconds < settings.engine_watchdog_seconds
