"""What idle workers wait for: the word that there may be work, through a tailable cursor on a capped collection."""

import threading

from pymongo import CursorType
from pymongo.cursor import Cursor
from pymongo.errors import PyMongoError

from engine.control.store import Document, Store

__all__ = ["Wakeups"]


class Wakeups:
    """Waits for one worker.

    Args:
        store: the databases.
        stop: is set when the worker is to stop; looked at where the database cannot be waited for.
    """

    def __init__(self, store: Store, stop: threading.Event) -> None:
        self._wakeups = store.wakeups
        self._stop = stop
        self._cursor: Cursor[Document] | None = None
        self._seen = 0
        self._stillborn = False  # the cursor before was dead before anything came

    def wait(self, seconds: float) -> bool:
        """Block until somebody calls, or so many seconds have passed; returns whether somebody has called.

        The first time, and whenever it begins anew, it returns at once: what came before has to be looked for.
        """
        try:
            cursor = self._cursor
            if cursor is None or not cursor.alive:
                if self._stillborn:
                    self._stop.wait(seconds)  # without what it is to watch, it dies at once
                self._stillborn = True
                cursor = self._wakeups.find({}, {"_id": 1}, cursor_type=CursorType.TAILABLE_AWAIT, batch_size=10_000)
                self._cursor, self._seen = cursor.max_await_time_ms(int(seconds * 1000)), 0
                # What is there already has been seen by the look for jobs that follows.
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
        """Take what has come already: many calls are one."""
        if cursor.retrieved == 0:
            next(cursor, None)
            self._seen += 1
        while self._seen < cursor.retrieved and next(cursor, None) is not None:
            self._seen += 1
