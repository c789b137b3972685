"""Fixtures and helpers for the suites of jobs, on a real MongoDB and a real S3 server."""

import io
import uuid

import pytest

from engine.control.plans import Plans
from engine.control.rollup import RollUp
from engine.load.planner import Planner
from engine.model import Format, JobOptions, Plan, Tally


@pytest.fixture
def source(objects):
    return objects.upload(io.BytesIO(b'{"n":1}\n' * 100), f"{uuid.uuid4().hex}.ndjson")


@pytest.fixture
def plans(store, queue, ledger):
    return Plans(store, queue, ledger)


@pytest.fixture
def rollup(store, queue, ledger):
    return RollUp(store, queue, ledger)


@pytest.fixture
def planner(store, queue, plans, ledger, objects, settings):
    return Planner(store, queue, plans, ledger, objects, settings)


def plan(ranges, tag=b"tagtag"):
    return Plan(Format.NDJSON, tag, 100, ranges, True, 2**25)


def loaded(planner, queue, ledger, source, **options):
    """A job that is planned and ended as if it had loaded one line; no document is written."""
    [prepared] = planner.prepare([queue.submit(source, JobOptions(**options))], "holder")
    if prepared.lease is None:
        return prepared.job
    ledger.close(prepared.lease, Tally(lines=1, inserted=1))
    return queue.finish(prepared.job, Tally(lines=1, inserted=1))
