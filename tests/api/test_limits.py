"""Limits on calls that wait for S3 and on open jobs: with stand-ins, and once on an API over real servers."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import httpx
import pytest

from api.direct import Complete
from api.files import Files
from api.limits import OpenJobsLimit, S3Calls
from api.problems import Problem
from engine.errors import Conflict, KeyReused, Refused, Transient


def test_a_count_that_hangs_holds_up_nobody_else():
    begun, go_on = threading.Event(), threading.Event()

    class Hanging:
        def depth(self, most):
            begun.set()
            assert go_on.wait(30)
            raise Transient("MongoDB does not answer")

    limit, failed = OpenJobsLimit(Hanging(), 100), []

    def first():
        try:
            with limit.let_in(1):
                pass
        except Transient as error:
            failed.append(error)

    counting = threading.Thread(target=first)
    counting.start()
    assert begun.wait(30)
    with limit.let_in(60):
        pass
    with pytest.raises(Problem, match="open jobs"), limit.let_in(60):
        pass
    go_on.set()
    counting.join()
    assert len(failed) == 1


def test_what_is_let_in_while_the_queue_is_counted_is_not_forgotten():
    class Slow:
        def depth(self, most):
            with limit.let_in(40):
                pass
            return 10

    limit = OpenJobsLimit(Slow(), 100, clock=lambda: 0.0)
    with limit.let_in(10):
        pass
    with pytest.raises(Problem, match="open jobs"), limit.let_in(41):
        pass
    with limit.let_in(40):
        pass


def test_jobs_that_are_still_being_created_when_the_queue_is_counted_are_not_forgotten():
    now = iter(range(0, 1000, 2))  # each call comes after the last count has expired
    limit = OpenJobsLimit(SimpleNamespace(depth=lambda most: 0), 100, clock=lambda: float(next(now)))
    with limit.let_in(60), limit.let_in(40), pytest.raises(Problem, match="open jobs"), limit.let_in(1):
        pass
    with limit.let_in(100):  # all have been created, and have ended since
        pass


def test_jobs_that_were_refused_take_no_room():
    """After any other error, some of the jobs may have been created."""
    limit = OpenJobsLimit(SimpleNamespace(depth=lambda most: 0), 5, clock=lambda: 0.0)
    for refusal in (Refused("a view"), KeyReused("another"), Conflict("COMPLETED")):
        with pytest.raises(type(refusal)), limit.let_in(5):
            raise refusal
    with pytest.raises(Transient), limit.let_in(5):
        raise Transient("nobody knows whether they were made")
    with pytest.raises(Problem, match="open jobs"), limit.let_in(1):
        pass


def test_calls_take_turns_at_s3_and_are_refused_where_it_does_not_answer(monkeypatch):
    monkeypatch.setattr("api.limits.TURN_SECONDS", 0.05)
    now = [0.0]
    calls, quick, long = S3Calls(4, lambda: now[0]), Files(Mock()), Complete(Mock())

    def ask(resource=quick):
        request = SimpleNamespace(method="GET" if resource is quick else "POST")
        calls.process_resource(request, None, resource, {})
        return request

    def end(request):
        calls.process_response(request, None, quick, True)

    held = [ask(), ask(), ask(long), ask(long)]
    with pytest.raises(Problem, match="4 calls that need S3 are already under way"):
        ask()
    threading.Timer(0.1, end, [held[0]]).start()
    monkeypatch.setattr("api.limits.TURN_SECONDS", 20)
    end(ask())  # which waited for its turn
    now[0] = 6
    end(ask())  # one slow call proves nothing, nor do those that always take long
    held.append(ask())
    now[0] = 12
    with pytest.raises(Problem, match="S3 or MongoDB does not answer"):
        ask()
    end(held[1])
    ask()


@pytest.mark.parametrize("burst", [60])
def test_a_burst_of_calls_waits_for_its_turn(live, burst):
    key = live.objects.upload(io.BytesIO(b"{}"), "burst").key

    def look(_):
        with httpx.Client(base_url=live.http.base_url, timeout=60) as http:
            return [http.get(f"/files/{key}").status_code for _ in range(3)]

    for _ in range(3):  # S3 may once stand still for longer than a call waits
        with ThreadPoolExecutor(burst) as pool:
            found = {status for statuses in pool.map(look, range(burst)) for status in statuses}
        if found == {200}:
            break
    assert found == {200}
