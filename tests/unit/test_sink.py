"""What the server's answer to a bulk write means for the job and for its documents. No servers."""

from unittest.mock import MagicMock

import numpy as np
import pytest
from pymongo.errors import OperationFailure, WriteConcernError, WTimeoutError

from engine.control.store import translate
from engine.errors import AccessDenied, Permanent, Refused, Transient
from engine.load.sink import Sink
from engine.model import Format, Plan, Reason
from engine.text.batches import Batch
from engine.text.decode import decode

DATA = b'{"a":1}\n{"a":2}\n{"a":3}\n'
BATCH = Batch(0, len(DATA), 0, DATA, np.array([7, 15, 23], np.intp))


def written(*errors):
    """The result of writing a batch of three, if the server answers with these codes for its first documents."""
    store = MagicMock()
    failed = [{"index": index, "code": code, "errmsg": "no"} for index, code in enumerate(errors)]
    store.data.command.return_value = {"n": BATCH.count - len(failed), "writeErrors": failed}
    plan = Plan(Format.NDJSON, b"\0" * 6, 2**20, 1, True, 2**20)
    return Sink(store, "records", plan, 10).write(decode(BATCH, Format.NDJSON, plan.tag, "key"))


@pytest.mark.parametrize("code", [82, 211, 343, 365, 371, 402, 433, 453, 462, 10107, 91331])
def test_a_server_in_trouble_is_not_taken_for_the_fault_of_the_documents(code):
    with pytest.raises(Transient, match=f"code {code}"):
        written(code, code)


@pytest.mark.parametrize("code", [73, 166])
def test_what_is_the_fault_of_the_collection_is_told_of_no_document(code):
    with pytest.raises(Refused, match="collection records no longer takes documents"):
        written(code, code, code)


def test_a_majority_that_is_late_is_no_connection_that_failed():
    for error in (WTimeoutError("late", 64), WriteConcernError("late", 64)):
        assert "majority did not confirm in time while writing" in str(translate(error, "writing"))


def test_what_is_the_fault_of_a_document_costs_it_alone():
    tally, rejects = written(121)
    assert (tally.lines, tally.inserted, tally.rejected) == (3, 2, 1)
    assert [(found.offset, found.reason, found.code) for found in rejects] == [(0, Reason.REFUSED, 121)]


@pytest.mark.parametrize(
    ("code", "labels", "told", "said"),
    [
        (371, [], Transient, "code 371"),
        (123456, ["RetryableError"], Transient, "code 123456"),
        (123456, ["SystemOverloadedError"], Transient, "code 123456"),
        (123456, [], Permanent, "what it says"),
        (8000, [], AccessDenied, "what it says"),
        (13, [], AccessDenied, "roles"),
    ],
)
def test_what_a_server_says_of_a_whole_command_passes_or_does_not(code, labels, told, said):
    error = OperationFailure("no", code, {"errmsg": "what it says", "errorLabels": labels})
    found = translate(error, "writing")
    assert type(found) is told
    assert said in str(found)
