"""The steps of a load at which a crash must do no harm, by name, so that tests can crash there.

Outside tests `reach` does nothing. It must never change what the program does, only whether it goes on.
"""

from collections.abc import Callable
from enum import StrEnum

__all__ = ["Step", "on_reach", "reach"]


class Step(StrEnum):
    """Where a worker may be when it dies."""

    PLAN = "plan"  # the format and tag are known; nothing is fixed
    PLANNED = "planned"  # the plan is fixed; no range is written down
    OPENED = "opened"  # the ranges are written down; the job does not say so
    LEASED = "leased"
    READ = "read"  # a chunk has come
    PARSED = "parsed"  # documents of a batch are made; none is sent
    WRITTEN = "written"  # a batch is acknowledged; its rejects are not written
    REJECTED = "rejected"  # the rejects are written; the batch is not closed
    CONFIRM = "confirm"  # about to renew and confirm
    CONFIRMED = "confirmed"
    CLOSE = "close"  # all batches are acknowledged; the range is not DONE
    CLOSED = "closed"
    FINISH = "finish"  # every range is DONE; the job does not say so
    FINISHED = "finished"


_hook: Callable[[Step], None] | None = None


def on_reach(hook: Callable[[Step], None] | None) -> None:
    """Call `hook` at every step of this process and those that it forks; None: at none."""
    global _hook  # noqa: PLW0603 (one switch for the whole process is what is meant)
    _hook = hook


def reach(step: Step) -> None:
    """The process is at this step."""
    if _hook is not None:
        _hook(step)
