"""How idle workers learn that there may be work: wakeups, read through a tailable cursor on a capped collection."""

import threading

from pymongo import CursorType
from pymongo.cursor import Cursor
from pymongo.errors import PyMongoError

from engine.control.store import Document, Store

__all__ = ["Wakeups"]


class Wakeups:
    """Waits for wakeups on behalf of one worker.

    Args:
        store: the databases.
        stop: set when the worker is to stop; waited for instead when the database cannot be.
    """

    def __init__(self, store: Store, stop: threading.Event) -> None:
        self._wakeups = store.wakeups
        self._stop = stop
        self._cursor: Cursor[Document] | None = None
        self._seen = 0
        self._stillborn = False  # the last cursor was dead before anything arrived

    def wait(self, seconds: float) -> bool:
        """Block until a wakeup arrives, or `seconds` have passed; returns whether one has arrived.

        A call that opens a new cursor, as the first one does, does not wait on it: it returns False, and the caller has
        to look at the queue for what was submitted before.
        """
        try:
            cursor = self._cursor
            if cursor is None or not cursor.alive:
                if self._stillborn:
                    self._stop.wait(seconds)  # without its collection, every cursor dies at once
                self._stillborn = True
                cursor = self._wakeups.find({}, {"_id": 1}, cursor_type=CursorType.TAILABLE_AWAIT, batch_size=10_000)
                self._cursor, self._seen = cursor.max_await_time_ms(int(seconds * 1000)), 0
                # Wakeups that are there already are covered by the caller's next look at the queue.
                self._drain(cursor)
                return False
            found = next(cursor, None)
            self._stillborn = not cursor.alive
            if found is None:
                return False
            self._seen += 1
            self._drain(cursor)
        except PyMongoError:
            self._cursor = None
            self._stop.wait(seconds)
            return False
        return True

    def _drain(self, cursor: Cursor[Document]) -> None:
        """Consume what has arrived already: many wakeups count as one."""
        if cursor.retrieved == 0:
            next(cursor, None)
            self._seen += 1
        while self._seen < cursor.retrieved and next(cursor, None) is not None:
            self._seen += 1
