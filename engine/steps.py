"""Named steps of a load at which a crash must do no harm, so that tests can crash there.

Outside tests `reach` does nothing. A hook must never change what the program does, only whether it continues.
"""

from collections.abc import Callable
from enum import StrEnum

__all__ = ["Step", "on_reach", "reach"]


class Step(StrEnum):
    """Where a worker may be when it dies."""

    PLAN = "plan"  # the format and tag are known; the plan is not stored
    PLANNED = "planned"  # the plan is stored; its ranges are not
    OPENED = "opened"  # the ranges are stored
    LEASED = "leased"
    READ = "read"  # a chunk has arrived
    PARSED = "parsed"  # a batch is ready to be sent
    WRITTEN = "written"  # a batch is acknowledged; its rejects are not written
    REJECTED = "rejected"  # the rejects are written; the batch does not count as done
    CONFIRM = "confirm"  # about to renew and confirm
    CONFIRMED = "confirmed"
    CLOSE = "close"  # all batches are acknowledged; the range is not DONE yet
    CLOSED = "closed"
    FINISH = "finish"  # every range is DONE; the job has not ended yet
    FINISHED = "finished"


_hook: Callable[[Step], None] | None = None


def on_reach(hook: Callable[[Step], None] | None) -> None:
    """Call `hook` at every step of this process and those it forks; None removes the hook."""
    global _hook  # noqa: PLW0603 (one switch for the whole process is intended)
    _hook = hook


def reach(step: Step) -> None:
    """Call the hook, if there is one: the process is at this step."""
    if _hook is not None:
        _hook(step)
