"""Durations of requests: kept while the database is away, and not counted for requests that wait. No servers."""

from types import SimpleNamespace

import falcon
import falcon.testing
from pymongo.errors import AutoReconnect

from api.metrics import BOUNDS, Durations


class Sums:
    """A collection whose server is unreachable while `away` is set."""

    def __init__(self):
        self.away, self.asked, self.rows = False, 0, {}

    def with_options(self, **_):
        return self

    def update_one(self, key, news, upsert):
        self.asked += 1
        if self.away:
            raise AutoReconnect("away")
        row = self.rows.setdefault(tuple(key["_id"].values()), {})
        for name, value in news["$inc"].items():
            row[name] = row.get(name, 0) + value


def test_a_database_that_is_away_is_asked_once_and_told_all_later(monkeypatch):
    monkeypatch.setattr("api.metrics.TELL_SECONDS", 3600)
    sums = Sums()
    durations = Durations(SimpleNamespace(requests=sums))
    for status in range(200, 210):
        durations.count("GET", "/x", status, 0.1)
    sums.away = True
    durations.flush()
    assert (sums.asked, sums.rows) == (1, {})
    durations.count("GET", "/x", 200, 0.2)
    sums.away = False
    durations.flush()
    assert len(sums.rows) == 10
    assert {key: row[f"row.{len(BOUNDS)}"] for key, row in sums.rows.items()} == {
        ("GET", "/x", str(status)): 2 if status == 200 else 1 for status in range(200, 210)
    }


def test_what_waited_for_a_job_is_not_counted_as_slow(monkeypatch):
    monkeypatch.setattr("api.metrics.TELL_SECONDS", 3600)
    sums = Sums()
    durations = Durations(SimpleNamespace(requests=sums))
    app = falcon.App(middleware=[durations])

    class Waits:
        def on_get(self, req, resp):
            if req.params:
                req.context.waited = True

    app.add_route("/status", Waits())
    client = falcon.testing.TestClient(app)
    for query in ("", "?wait", ""):
        assert client.simulate_get(f"/status{query}").status_code == 200
    durations.flush()
    assert [row[f"row.{len(BOUNDS)}"] for row in sums.rows.values()] == [2]
