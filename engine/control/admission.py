"""Checks before a job is queued: its collection can take documents, and a repeated request matches the original."""

from typing import Final

from pymongo.database import Database

from engine.control.jobs import Ticket
from engine.control.store import Document, described, translated
from engine.errors import KeyReused, Refused

__all__ = ["check_collection", "check_collection_name", "check_ticket"]

MAX_NAMESPACE_BYTES: Final = 255
"""Longest namespace that MongoDB accepts, in bytes: the database, a dot, and the collection."""


def check_collection_name(name: str) -> None:
    """Raises Refused if no collection of documents can have this name."""
    if not all(name.split(".")) or name.startswith("system.") or ".system." in name or not _is_utf8(name):
        raise _unfit(name, "its name is reserved or invalid")
    if "$" in name or "\0" in name:
        raise _unfit(name, "its name has a character that MongoDB reserves")


def check_collection(database: Database[Document], name: str) -> None:
    """Raises Refused if this collection cannot take documents."""
    check_collection_name(name)
    refusal = None
    if len(f"{database.name}.{name}".encode()) > MAX_NAMESPACE_BYTES:
        refusal = "its name is longer than MongoDB allows"
    else:
        with translated("checking the collection"):
            found = described(database, name)
        if found is not None and found["type"] != "collection":
            refusal = f"it is a {found['type']}"
        elif found is not None and found.get("options", {}).get("capped"):
            refusal = "it is capped"
    if refusal:
        raise _unfit(name, refusal)


def check_ticket(found: Document, ticket: Ticket) -> None:
    """Raises KeyReused if `found`, a job or batch made with this ticket's key, was made for another request."""
    if found["ticket"]["digest"] != ticket.digest:
        raise KeyReused("this Idempotency-Key was used with another request: repeat that request, or use another key")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can express
        return False
    return True


def _unfit(name: str, why: str) -> Refused:
    return Refused(f"collection {name[:120]!r} cannot take documents: {why}; use another one")
