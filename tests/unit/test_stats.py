"""A worker reports each of its counts once, even if it leaves during a report. No servers."""

import threading
from types import SimpleNamespace

from engine.control.stats import Reporter, Stats


class Told:
    """A collection that records what it is sent, and answers the first update of the sums only after `go_on`."""

    def __init__(self):
        self.sums, self.workers = [], []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def with_options(self, **_):
        return self

    def update_one(self, which, changes, **_):
        if which == {"_id": "totals"}:
            self.begun.set()
            assert self.go_on.wait(30)
            self.sums.append(changes["$inc"])
        else:
            self.workers.append("here")

    def delete_one(self, which):
        self.workers.append("gone")


def test_a_worker_that_leaves_while_it_tells_tells_nothing_twice_and_is_gone(monkeypatch):
    monkeypatch.setattr("engine.control.stats.REPORT_SECONDS", 60)
    told, stats = Told(), Stats()
    reporter = Reporter(
        SimpleNamespace(workers=told, totals=told, data=SimpleNamespace(name="records")), "me", 0, stats, dict
    )
    stats.add(lines=5)
    first = threading.Thread(target=reporter.report)
    first.start()
    assert told.begun.wait(30)
    last = threading.Thread(target=reporter.report, kwargs={"last": True})
    last.start()
    told.go_on.set()
    first.join(30)
    last.join(30)
    reporter.report()
    assert told.sums == [{"lines": 5}]
    assert told.workers == ["here", "gone"]
