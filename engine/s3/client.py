"""The S3 client, and what its errors mean. Build the client after the fork."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from urllib3.exceptions import HTTPError

from engine.errors import (
    AccessDenied,
    HeadraceError,
    NotFound,
    Refused,
    StartError,
    TokenExpired,
    Transient,
    WrongClock,
)
from engine.ports import is_loopback
from engine.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client  # type stubs: installed for type checking only

__all__ = ["PART_TYPE", "S3_ERRORS", "code_of", "connect", "s3_translated", "status_of", "translate"]

S3_ERRORS: Final = (BotoCoreError, ClientError, HTTPError, OSError)
"""The exceptions that the S3 client raises."""

_MISFITS: Final = (
    "InvalidToken",
    "TokenRefreshRequired",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
)
"""Error codes of S3, with status 301 or 400, for credentials that do not match: a session token of other keys, or
another region."""

ROLE_ATTEMPTS: Final = 3
"""Attempts to fetch the credentials of the machine's role: workers that start at the same time may be throttled."""

PART_TYPE: Final = "application/json"
"""Content type of every part: without it SeaweedFS gzips what looks like text, and ranges of gzip are slow to read."""


def connect(settings: Settings, attempts: int = 2) -> "S3Client":
    """An S3 client that makes up to `attempts` attempts at each call, each of which ends within
    `settings.answer_seconds`. Its callers do the longer retries.

    Raises:
        StartError: AWS_PROFILE, AWS_ENDPOINT_URL, or another setting that the SDK reads is invalid.
        Transient: there are no credentials. Call it again later: a client that is built without any never looks for
            them again, even if the machine's role provides some a moment later.
    """
    try:
        return _connect(settings, attempts)
    except (ProfileNotFound, ConfigParseError, ConfigNotFound, ValueError) as error:
        # ValueError: not a number, or a host name with `_`, which other programs accept.
        raise StartError(f"the AWS settings cannot be used: {error}") from None
    except BotoCoreError as error:
        raise Transient(f"credentials for S3 could not be obtained: {error}") from None


def _connect(settings: Settings, attempts: int) -> "S3Client":
    def plain(value: Any) -> str | None:
        return value.get_secret_value() if value is not None else None

    session = boto3.Session(
        region_name=settings.aws_region,
        aws_access_key_id=settings.aws_access_key_id,
        aws_secret_access_key=plain(settings.aws_secret_access_key),
        # Without its keys a token is useless, and would hide the credentials that the SDK finds.
        aws_session_token=plain(settings.aws_session_token) if settings.aws_access_key_id else None,
        botocore_session=_core(settings),
    )
    if session.get_credentials() is None:
        raise Transient(
            "S3 cannot be used without credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
        )
    config = Config(
        connect_timeout=settings.select_timeout_seconds,
        read_timeout=settings.socket_timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        # Signed URLs default to an older version, which newer AWS regions reject.
        signature_version="s3v4",
        s3={"addressing_style": "path" if settings.aws_endpoint_url else "auto"},
        tcp_keepalive=True,
        # A proxy could not reach a server on this machine.
        proxies={} if is_loopback(urlsplit(settings.aws_endpoint_url or "").hostname or "") else None,
        # Type checking covers this, and it would take a tenth of the time of each call.
        parameter_validation=False,
        # The default checksums make the client process every byte in Python; ETag and length are checked anyway.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client: S3Client = session.client("s3", endpoint_url=settings.aws_endpoint_url, config=config)
    if settings.aws_endpoint_url is None and re.match(
        r"https://s3[.-][a-z0-9.-]*amazonaws\.", client.meta.endpoint_url
    ):
        # With "auto", signed URLs use the old global host, which rejects requests for newer regions and redirects those
        # for a new bucket. (A server that AWS_ENDPOINT_URL_S3 or a profile names may lack a host name for each bucket,
        # and keeps "auto".)
        config = config.merge(Config(s3={"addressing_style": "virtual"}))
        client = session.client("s3", config=config)
    client.meta.events.register("before-call.s3.UploadPart", _name_type)
    client.meta.events.register_first("needs-retry.s3", _stay)
    return client


def _stay(response: tuple[Any, dict[str, Any]] | None = None, **_: object) -> None:
    """Stop at a redirect that does not name the bucket's region: the SDK would ask the same server for the region and
    be redirected again, until the stack overflows.

    Raises:
        Transient: names the target of the redirect.
    """
    if response is None or response[0].status_code not in (301, 302, 307):
        return
    headers, error = response[0].headers, response[1].get("Error", {})
    if "x-amz-bucket-region" in headers or "Region" in error:
        return
    raise Transient(
        f"S3 redirects elsewhere ({headers.get('Location') or error.get('Endpoint') or 'it does not say where'}): set "
        "AWS_ENDPOINT_URL to its address, and AWS_REGION to the bucket's"
    )


def _core(settings: Settings) -> botocore.session.Session:
    """A session that waits for the servers that provide a role's credentials no longer than a worker may be silent."""
    core = botocore.session.get_session()
    asked = int(core.get_config_variable("metadata_service_num_attempts"))
    core.set_config_variable("metadata_service_num_attempts", max(asked, ROLE_ATTEMPTS))
    # For clients that the session makes itself, such as STS's: their default timeouts, of minutes, would add up.
    core.set_default_client_config(
        Config(
            connect_timeout=settings.select_timeout_seconds,
            read_timeout=settings.socket_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": 1},
        )
    )
    return core


def _name_type(params: dict[str, Any], **_: object) -> None:
    params["headers"]["Content-Type"] = PART_TYPE


def code_of(error: ClientError) -> str:
    """S3's error code; "" if the answer has no body with one."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status of the answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def s3_translated(doing: str) -> Iterator[None]:
    """Translate exceptions of the S3 client into Headrace's own; `doing` says what was being done."""
    try:
        yield
    except ClientError as error:
        raise translate(error, doing) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDenied(f"S3 cannot be used for {doing}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except RuntimeError as error:
        if "refreshed" not in str(error):
            raise
        # botocore's message if the provider of the credentials keeps returning expired ones.
        raise TokenExpired(
            f"the AWS credentials expired while {doing}, and there are no new ones: renew them"
        ) from error
    except (BotoCoreError, HTTPError, OSError) as error:
        raise Transient(
            f"S3 does not answer while {doing} ({type(error).__name__}): make sure it can be reached"
        ) from error


def translate(error: ClientError, doing: str) -> HeadraceError:
    """Headrace's error for one of S3's; `doing` says what was being done."""
    code, status = code_of(error), status_of(error)
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return WrongClock(
            f"S3 does not allow {doing} because this machine's clock is wrong: set it, for example with NTP"
        )
    if code == "ExpiredToken":
        return TokenExpired(f"the session token of the AWS credentials expired while {doing}: restart with a new one")
    if code == "InvalidArgument":
        return Refused(f"S3 refuses the request while {doing}: send names and cursors exactly as you got them")
    if code == "InvalidObjectState":
        return Refused(f"S3 keeps the object in an archive and does not allow {doing}: restore it, then retry the job")
    if code.startswith("KMS."):
        return AccessDenied(
            f"S3 cannot use the KMS key while {doing} ({code}): make sure it is enabled and may be used"
        )
    if code in _MISFITS:
        return AccessDenied(
            f"S3 refuses the credentials while {doing} ({code}): check that AWS_SESSION_TOKEN belongs to the AWS keys, and that "
            "AWS_REGION is the bucket's"
        )
    if status in (401, 403):
        return AccessDenied(
            f"S3 does not allow {doing} ({code or status}): check the AWS credentials and their permissions"
        )
    if code == "NoSuchBucket":
        return Transient(f"S3 found no such bucket while {doing}: create it, or set AWS_BUCKET_NAME to one that exists")
    if status == 404:
        return NotFound(f"S3 found nothing while {doing} ({code or status})")
    return Transient(f"S3 could not answer while {doing} ({code or status}): check the S3 server")
