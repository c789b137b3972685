"""How long the AWS clients wait for an answer, and which hosts they call. No servers."""

from urllib.parse import urlsplit

import pytest

from engine.s3.client import _core, connect
from engine.settings import Settings


@pytest.mark.parametrize("lease", [1, 30])
def test_the_server_of_roles_is_waited_for_no_longer_than_a_worker_may_be_silent(lease):
    settings = Settings.model_validate({"engine_lease_seconds": lease})
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "eu-west-1"}
    config = _core(settings).create_client("sts", **keys).meta.config
    assert config.retries["total_max_attempts"] == 1
    assert config.connect_timeout + config.read_timeout <= settings.answer_seconds
    assert settings.answer_seconds < settings.engine_watchdog_seconds


@pytest.mark.parametrize(
    ("region", "bucket", "environment", "host"),
    [
        ("eu-south-1", "my-files", {}, "my-files.s3.eu-south-1.amazonaws.com"),
        ("eu-central-1", "my-files", {}, "my-files.s3.eu-central-1.amazonaws.com"),
        ("cn-north-1", "my-files", {}, "my-files.s3.cn-north-1.amazonaws.com.cn"),
        ("eu-south-1", "my.files", {}, "s3.eu-south-1.amazonaws.com"),
        ("eu-south-1", "my-files", {"AWS_ENDPOINT_URL_S3": "http://minio:9000"}, "minio:9000"),
    ],
)
def test_a_signed_url_leads_to_where_the_calls_of_its_client_go(monkeypatch, region, bucket, environment, host):
    """The global host rejects requests for newer regions, and redirects those for a new bucket, which invalidates their
    signatures."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region": region}
    client = connect(Settings.model_validate(keys))
    asked = []

    def stop(request, **_):
        asked.append(request.url)
        raise KeyboardInterrupt

    client.meta.events.register("before-send.s3", stop)
    with pytest.raises(KeyboardInterrupt):
        client.head_object(Bucket=bucket, Key="k")
    part = {"Bucket": bucket, "Key": "k", "UploadId": "u", "PartNumber": 1}
    signed = urlsplit(client.generate_presigned_url("upload_part", Params=part))
    assert signed.netloc == urlsplit(asked[0]).netloc == host
    assert signed.path == urlsplit(asked[0]).path


def test_an_endpoint_that_is_set_is_kept_where_it_is_one_of_aws():
    there = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region": "eu-west-1"}
    endpoint = "https://s3.dualstack.eu-west-1.amazonaws.com"
    assert connect(Settings.model_validate(there | {"aws_endpoint_url": endpoint})).meta.endpoint_url == endpoint
