"""The error tree: what may be tried again, what is final, and what only a caller can mend.

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
    """The root. `code` is stable and matches `[a-z_]+`; `str(error)` is the sentence."""

    code = "error"

    def failure(self) -> Failure:
        """This error as it is recorded in a job or a range."""
        return Failure(self.code, str(self))


class Transient(HeadraceError):
    """It may work when tried again: the network, a primary stepping down, a server that is busy."""

    code = "unavailable"

    spends = True
    """Whether it costs one of the attempts: not where only a person can help, who may be asleep."""


class Severed(Transient):
    """The database closed the connection instead of an answer: it went away, or the answer would have been too large."""


class Unexpected(Transient):
    """A fault of Headrace itself or of a library. It costs an attempt and no worker; the log has the traceback."""

    code = "unexpected"


class WrongClock(Transient):
    """S3 refuses our signature since this machine's clock is off. Not final: clocks get set."""

    code = "wrong_clock"
    spends = False


class TokenExpired(Transient):
    """The session token of the AWS credentials has run out. Not final: an engine is started anew with another."""

    code = "token_expired"
    spends = False


class Permanent(HeadraceError):
    """Trying again cannot help; the job fails at once."""

    code = "final"  # clients know it by this


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
    """The token matched no lease: somebody else owns the range now. Drop the work and write nothing more."""

    code = "lease_lost"


class NotFound(HeadraceError):
    """No such job or object."""

    code = "not_found"


class Conflict(HeadraceError):
    """The state that it is in does not allow this."""

    code = "conflict"


class KeyReused(HeadraceError):
    """An idempotency key came again with another request."""

    code = "idempotency_key_reused"


class SettingsError(HeadraceError):
    """One or more settings are wrong; the message lists all of them."""

    code = "settings"


class StartError(HeadraceError):
    """Something could not be started: a port is taken, a library is missing, a server does not come up."""

    code = "start"


class CommandError(HeadraceError):
    """A command cannot do what it was asked: a file cannot be read, changed while it was sent, or does not reach S3."""

    code = "command"
