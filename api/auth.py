"""Who may call what: bearer tokens with scopes, kept as hashes and compared in constant time.

An entry is `name:scope+scope:hash`, where `hash` is the SHA-256 of the token in hexadecimal digits. A token has 256
random bits, so a fast hash is enough to keep it from being guessed.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import falcon

from api.operations import Scope, operation_of
from api.problems import Problem
from engine.errors import SettingsError, StartError
from engine.ports import addresses, is_loopback
from engine.settings import Settings

__all__ = ["NAME", "Guard", "Head", "Token", "draw", "exposure_fault", "tokens_of"]

NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""The name of a token."""

_ENTRY: Final = re.compile(rf"({NAME.pattern}):([a-z+]+):([0-9a-f]{{64}})")


@dataclass(frozen=True, slots=True)
class Token:
    """An accepted token: its name, its scopes, and its SHA-256 in hexadecimal digits."""

    name: str
    scopes: frozenset[Scope]
    digest: str

    def may(self, scope: Scope) -> bool:
        """Whether it grants this scope; ADMIN grants all of them."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


EVERYBODY: Final = Token("", frozenset({Scope.ADMIN}), "")
"""The caller when no tokens are configured."""


def draw(name: str, scopes: Sequence[Scope]) -> tuple[str, str]:
    """A new token, and the entry that accepts it."""
    token = f"hr_{secrets.token_urlsafe(32)}"
    return token, f"{name}:{'+'.join(dict.fromkeys(scopes))}:{hashlib.sha256(token.encode()).hexdigest()}"


def tokens_of(settings: Settings) -> list[Token]:
    """The tokens that the settings name. Raises SettingsError, whose message shows no entry."""
    words: list[tuple[str, str]] = []
    if settings.api_tokens is not None:
        words += [("API_TOKENS", word) for word in re.split(r"[\s,]+", settings.api_tokens.get_secret_value()) if word]
    if settings.api_tokens_file is not None:
        name = f"API_TOKENS_FILE={settings.api_tokens_file}"
        try:
            lines = settings.api_tokens_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"{name} cannot be read ({type(error).__name__}): name a readable file with one entry per line"
            ) from None
        words += [(name, line.strip()) for line in lines if line.strip() and not line.strip().startswith("#")]
    if not words and (settings.api_tokens is not None or settings.api_tokens_file is not None):
        # Removing the last entry is meant to lock everybody out, not to let everybody in.
        raise SettingsError(
            "API_TOKENS and API_TOKENS_FILE hold no entry: add one that `headrace token NAME --scope read` prints, or "
            "unset both to admit everybody on this machine"
        )
    tokens: list[Token] = []
    for number, (where, word) in enumerate(words, 1):
        match = _ENTRY.fullmatch(word)
        scopes = match.group(2).split("+") if match else []
        if match is None or not set(scopes) <= set(Scope):
            raise SettingsError(
                f"{where}: entry {number} is invalid; `headrace token NAME --scope read` prints a new token and its entry"
            )
        tokens.append(Token(match.group(1), frozenset(map(Scope, scopes)), match.group(3)))
    return tokens


def exposure_fault(settings: Settings, tokens: Sequence[Token]) -> str | None:
    """Why an API with these tokens must not listen on `API_HOST`; None if it may."""
    if tokens or is_loopback(settings.api_host):
        return None
    try:
        addresses(settings.port, settings.api_host)
    except StartError as error:
        return str(error)
    return (
        f"API_HOST={settings.api_host} admits other machines, but there are no tokens: create one with "
        "`headrace token` and set API_TOKENS, or set API_HOST=127.0.0.1"
    )


@dataclass(frozen=True, slots=True)
class Head:
    """The headers that identify the sender of a request; None for one that is missing."""

    authorization: str | None
    origin: str | None
    host: str | None


class Guard:
    """Middleware: refuses a call that needs a scope unless the caller's token grants it.

    Without tokens every call is allowed, except from pages of other sites in a browser on this machine. A responder
    finds in the request's context the name of the `caller`, and `may(scope)`: whether the caller has a scope.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tokens

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        """Raises Problem: 401 without a known token, 403 if it lacks the scope or the call comes from another site."""
        operation = operation_of(resource, req.method)
        if operation is None or operation.scope is None:
            return
        token = self.check(Head(req.auth, req.get_header("Origin"), req.get_header("Host")), operation.scope)
        req.context.caller, req.context.may = token.name, token.may

    def check(self, head: Head, scope: Scope) -> Token:
        """The caller's token. Raises Problem: 401 without a known one, 403 without the scope or from another site."""
        if not self._tokens:
            if _from_elsewhere(head):
                detail = (
                    "without tokens the API answers only at localhost or 127.0.0.1, and not to pages of other sites: use "
                    "that address, or set API_TOKENS"
                )
                raise Problem(403, "untrusted_origin", detail)
            return EVERYBODY
        token = self._token(head)
        if token is None:
            raise Problem(
                401,
                "unauthorized",
                "send a valid token in the header `Authorization: Bearer …`",
                headers={"WWW-Authenticate": 'Bearer realm="headrace"'},
            )
        if not token.may(scope):
            raise Problem(
                403, "forbidden", f"token {token.name!r} lacks the scope {scope.value!r}: ask for one that has it"
            )
        return token

    def _token(self, head: Head) -> Token | None:
        kind, _, given = (head.authorization or "").partition(" ")
        digest = (
            hashlib.sha256(given.strip().encode("utf-8", "replace")).hexdigest() if kind.lower() == "bearer" else ""
        )
        found = None
        for token in self._tokens:
            # Compare with every token, even after a match, so that the timing reveals nothing.
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def _from_elsewhere(head: Head) -> bool:
    """Whether the request may come from a page that this machine did not serve.

    A host name other than this machine's own may be that of a foreign page, pointed here by DNS rebinding: the browser
    then takes this API for the page's own site, and sends no Origin.
    """
    places = [f"//{head.host or ''}"]
    places += [head.origin] if head.origin is not None else []
    if set(head.host or "") & set("/@?#\\"):
        return True  # it holds more than a name and a port
    try:
        return not all(is_loopback(urlsplit(place).hostname or "") for place in places)
    except ValueError:
        return True
