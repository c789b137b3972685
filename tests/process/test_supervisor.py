"""The supervisor, as a real process with real forks: it replaces what dies or hangs, stops softly, and leaves no orphan."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.running import Running, alive, title, until


@pytest.fixture
def engine(settings, store, tmp_path):
    started = []

    def begin(**changes):
        made = Running("engine", settings, tmp_path / f"engine-{len(started)}.log", **changes)
        started.append(made)
        made.ready(int(changes.get("engine_workers", 2)))
        return made

    yield begin
    for made in started:
        made.end()


def test_term_stops_softly_with_exit_code_0_and_nobody_is_left(engine):
    running = engine(engine_workers=3)
    workers = running.workers()
    assert len(workers) == 3
    assert running.stop() == 0
    assert not any(map(alive, workers))


def test_int_stops_softly_too(engine):
    assert engine().stop(signal.SIGINT) == 0


def test_a_killed_worker_is_replaced(engine):
    running = engine()
    victim = running.workers()[0]
    os.kill(victim, signal.SIGKILL)
    running.ready(3)
    assert victim not in running.workers()
    assert len(running.workers()) == 2
    [told] = running.actions("reap")
    assert "SIGKILL" in told["cause"]


def test_a_worker_that_hangs_is_killed_and_replaced(engine):
    running = engine(engine_watchdog_seconds=3, engine_lease_seconds=2, engine_poll_seconds=0.2)
    victim = running.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    running.ready(3)
    assert victim not in running.workers()
    assert running.actions("kill")
    [told] = running.actions("reap")
    assert told["cause"] == "killed because it did not move"


def test_no_worker_outlives_a_killed_supervisor(engine):
    running = engine()
    workers = running.workers()
    running.process.kill()
    running.process.wait()
    until(lambda: not any(map(alive, workers)), 2, "the end of the orphans")


def test_hup_replaces_every_worker_while_others_stand(engine):
    running = engine()
    before = set(running.workers())
    running.process.send_signal(signal.SIGHUP)
    until(lambda: len(running.workers()) == 2 and not before & set(running.workers()), what="the replacement of all")
    running.ready(4)
    assert running.stop() == 0


def test_ttin_adds_a_worker_and_ttou_takes_one_away(engine):
    running = engine()
    running.process.send_signal(signal.SIGTTIN)
    until(lambda: len(running.workers()) == 3, what="a third worker")
    running.process.send_signal(signal.SIGTTOU)
    until(lambda: len(running.workers()) == 2, what="the third worker's end")
    assert running.stop() == 0


def test_the_supervisor_holds_no_connection_and_no_thread(engine):
    running = engine()
    assert os.listdir(f"/proc/{running.pid}/task") == [str(running.pid)]  # noqa: PTH208
    links = [os.readlink(link) for link in Path(f"/proc/{running.pid}/fd").iterdir()]  # noqa: PTH115
    assert not any(link.startswith("socket:") for link in links)


def test_workers_that_die_hand_their_leases_on_at_once_and_the_job_completes(engine, queue, submit, store):
    lines = 60_000
    job = submit(b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 100) for n in range(lines)))
    running = engine(engine_range_bytes="256KiB", engine_lease_seconds=20, engine_batch_records=200)
    kills = 0
    while kills < 4 and queue.get(job.id).state not in ("COMPLETED", "FAILED"):
        holder = store.ranges.find_one({"state": "LEASED"}, {"holder": 1})
        if holder is not None:
            slot = int(holder["holder"].split(":")[2])
            victims = [pid for pid in running.workers() if re.search(rf"worker {slot} ", title(pid))]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
                kills += 1
        time.sleep(0.3)
    until(lambda: queue.get(job.id).state == "COMPLETED", 60, "the end of the job")
    assert kills
    assert queue.get(job.id).progress.tally.inserted == lines
    assert store.data["records"].count_documents({}) == lines
    assert sorted(d["n"] for d in store.data["records"].find({}, {"n": 1})) == list(range(lines))


def test_an_engine_that_cannot_boot_stops_with_a_sentence(settings, store, tmp_path):
    store.control["schema"].replace_one({"_id": "version"}, {"_id": "version", "version": 999}, upsert=True)
    running = Running("engine", settings, tmp_path / "engine.log")
    assert running.process.wait(30) == 3
    assert any("schema version 999" in line["event"] for line in running.lines())


def test_an_engine_waits_for_a_database_that_is_not_there_yet(settings, tmp_path):
    from pydantic import SecretStr

    gone = settings.model_copy(update={"mongo_uri": SecretStr("mongodb://127.0.0.1:9/headrace")})
    running = Running("engine", gone, tmp_path / "engine.log", engine_workers=1)
    until(lambda: running.actions("wait"), 20, "a word about it")
    assert "does not answer" in running.actions("wait")[0]["event"]
    assert running.stop() == 0
