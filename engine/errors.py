"""The error tree: what may be retried, what is final, and what only the caller can fix.

Every message is a sentence for a person: what happened, to what, and what to do next. No message carries a secret.
"""

from engine.model import Failure

__all__ = [
    "AccessDenied",
    "CommandError",
    "Conflict",
    "HeadraceError",
    "KeyReused",
    "LeaseLost",
    "NotFound",
    "ObjectChanged",
    "ObjectGone",
    "Permanent",
    "Refused",
    "SettingsError",
    "Severed",
    "StartError",
    "TokenExpired",
    "Transient",
    "Unexpected",
    "WrongClock",
]


class HeadraceError(Exception):
    """The root. `code` is stable and matches `[a-z_]+`; `str(error)` is the message."""

    code = "error"

    def failure(self) -> Failure:
        """This error as it is recorded in a job or a range."""
        return Failure(self.code, str(self))


class Transient(HeadraceError):
    """A retry may succeed: the network, a primary stepping down, a server that is busy."""

    code = "unavailable"

    spends = True
    """Whether it costs one of the attempts: not if only a person can fix the cause, who may be asleep."""


class Severed(Transient):
    """The database closed the connection without an answer: it went away, or the answer would have been too large."""


class Unexpected(Transient):
    """A bug in Headrace or in a library. It costs an attempt but no worker; the log has the traceback."""

    code = "unexpected"


class WrongClock(Transient):
    """S3 rejects signatures because this machine's clock is wrong. Not final: the clock can be set."""

    code = "wrong_clock"
    spends = False


class TokenExpired(Transient):
    """The session token of the AWS credentials has expired. Not final: the engine can be restarted with a new one."""

    code = "token_expired"
    spends = False


class Permanent(HeadraceError):
    """A retry cannot help; the job fails at once."""

    code = "final"  # clients match on this


class ObjectGone(Permanent):
    """The object, or the version of it that the job pinned, is no longer there."""

    code = "object_gone"


class ObjectChanged(Permanent):
    """The object was overwritten after the job pinned its ETag."""

    code = "object_changed"


class AccessDenied(Permanent):
    """S3 or MongoDB does not let these credentials do this."""

    code = "access_denied"


class Refused(Permanent):
    """The job asks for something that cannot be done: a UTF-16 file, a view as its collection, a bad option."""

    code = "refused"


class LeaseLost(HeadraceError):
    """The token matches no lease: another holder owns the range now. Drop the work and write nothing more."""

    code = "lease_lost"


class NotFound(HeadraceError):
    """No such job or object."""

    code = "not_found"


class Conflict(HeadraceError):
    """The current state of the job, upload or object does not allow this."""

    code = "conflict"


class KeyReused(HeadraceError):
    """An idempotency key was reused with a different request."""

    code = "idempotency_key_reused"


class SettingsError(HeadraceError):
    """One or more settings are wrong; the message lists all of them."""

    code = "settings"


class StartError(HeadraceError):
    """Something could not be started: a port is taken, a library is missing, a server does not come up."""

    code = "start"


class CommandError(HeadraceError):
    """A command failed: a file cannot be read, changed while it was sent, or does not reach S3."""

    code = "command"
