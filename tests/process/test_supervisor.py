"""The supervisor as a real process, with real forks and servers.

It replaces workers that die or hang, stops gracefully, and leaves no orphan.
"""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.control.store import job_key
from engine.fleet.heartbeat import Heartbeat
from engine.fleet.process import EXIT_AGAIN, EXIT_BOOT
from engine.fleet.supervisor import Supervisor, _Child, _Slot
from engine.fleet.worker import WorkerIdentity
from tests.running import Running, alive, failing, taking, title, until

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "SIGKILL"), (35, "signal 35")])
def test_a_killed_worker_is_replaced_whatever_the_signal(engine, number, cause):
    running = engine()
    victim = running.workers()[0]
    os.kill(victim, number)
    running.ready(3)
    assert victim not in running.workers()
    assert len(running.workers()) == 2
    [told] = running.actions("reap")
    assert cause in told["cause"]


def test_a_worker_that_hangs_is_killed_and_replaced(engine):
    running = engine(engine_watchdog_seconds=3, engine_lease_seconds=2, engine_poll_seconds=0.2)
    victim = running.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    until(lambda: victim not in running.workers() and len(running.workers()) == 2, what="another one in its place")
    assert running.actions("kill")
    assert "killed because it made no progress" in [told["cause"] for told in running.actions("reap")]


def test_an_engine_that_had_to_kill_a_hanging_worker_to_stop_says_so(engine):
    running = engine(
        engine_watchdog_seconds=3, engine_lease_seconds=2, engine_poll_seconds=0.2, engine_grace_seconds=60
    )
    os.kill(running.workers()[0], signal.SIGSTOP)
    assert running.stop() == 1
    assert running.actions("kill")


def test_no_worker_outlives_a_killed_supervisor(engine):
    running = engine()
    workers = running.workers()
    running.process.kill()
    running.process.wait()
    until(lambda: not any(map(alive, workers)), what="the end of the orphans")


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


def test_no_library_starts_a_thread_before_the_first_fork():
    look = "import engine.fleet.supervisor, engine.fleet.process, os; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1\n"


def test_the_supervisor_holds_no_connection_and_no_thread(engine):
    running = engine()
    assert os.listdir(f"/proc/{running.pid}/task") == [str(running.pid)]  # noqa: PTH208
    links = [os.readlink(link) for link in Path(f"/proc/{running.pid}/fd").iterdir()]  # noqa: PTH115
    assert not any(link.startswith("socket:") for link in links)


def test_workers_that_die_hand_their_leases_on_at_once_and_the_job_completes(engine, queue, submit, store):
    lines = 60_000
    job = submit(b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 100) for n in range(lines)))
    # The leases outlast the test, so only the successors of dead workers can free their ranges.
    lease = {"engine_lease_seconds": 120, "engine_watchdog_seconds": 200}
    kills = 0
    with failing(store.client, ["insert"], **taking(100)):  # it must not end before they die
        running = engine(engine_range_bytes="256KiB", engine_batch_records=200, **lease)
        while kills < 4 and queue.get(job.id).state not in ("COMPLETED", "FAILED"):
            # A third death at one byte would be blamed on the range.
            holder = store.ranges.find_one({"state": "LEASED", "deaths": {"$lt": 2}}, {"holder": 1})
            if holder is not None:
                slot = int(holder["holder"].split(":")[2])
                victims = [pid for pid in running.workers() if re.search(rf"worker {slot} ", title(pid))]
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            time.sleep(0.3)
    until(lambda: queue.get(job.id).state in ("COMPLETED", "FAILED"), 60, "the end of the job")
    assert (queue.get(job.id).state, queue.get(job.id).failure) == ("COMPLETED", None)
    assert kills
    assert queue.get(job.id).progress.tally.inserted == lines
    assert store.data["records"].count_documents({}) == lines
    assert sorted(d["n"] for d in store.data["records"].find({}, {"n": 1})) == list(range(lines))


def test_an_engine_that_cannot_boot_stops_with_a_sentence(settings, store, tmp_path):
    store.control["schema"].replace_one({"_id": "version"}, {"_id": "version", "version": 999}, upsert=True)
    running = Running("engine", settings, tmp_path / "engine.log")
    assert running.process.wait(60) == 1
    assert any("schema version 999" in line["event"] for line in running.lines())


def test_an_engine_whose_control_database_is_not_as_it_must_be_stops_with_a_sentence(settings, store, tmp_path):
    store.jobs.drop_index("by_collection")
    store.jobs.create_index([("other", 1)], name="by_collection")
    running = Running("engine", settings, tmp_path / "engine.log")
    assert running.process.wait(60) == 1
    assert any("preparing the control database (code 86)" in line["event"] for line in running.lines())


def test_an_engine_waits_for_a_database_that_is_not_there_yet(settings, tmp_path):
    from pydantic import SecretStr

    gone = settings.model_copy(update={"mongo_uri": SecretStr("mongodb://127.0.0.1:9/headrace")})
    running = Running("engine", gone, tmp_path / "engine.log", engine_workers=1)
    until(lambda: running.actions("wait"), what="a word about it")
    assert "does not answer" in running.actions("wait")[0]["event"]
    assert running.stop() == 0


def test_term_to_all_processes_at_once_stops_softly_too(engine, submit, store, queue):
    job = submit(b"".join(b'{"n":%d,"text":"%s"}\n' % (n, b"x" * 100) for n in range(400_000)))
    running = engine(engine_workers=3, engine_range_bytes="1MiB", engine_lease_seconds=20)
    with failing(store.client, ["insert"], **taking(300)):  # it must not end before the stop
        until(lambda: len(store.ranges.distinct("holder", {"state": "LEASED"})) == 3, what="work for all")
        os.killpg(running.pid, signal.SIGTERM)  # as service managers do by default
        assert running.process.wait(60) == 0
    assert queue.get(job.id).state == "PROCESSING"
    assert store.ranges.count_documents({"state": "LEASED"}) == 0
    assert running.actions("kill") == running.actions("reap") == []


def test_workers_pass_over_what_is_meant_for_their_supervisor(engine, submit, queue):
    running = engine()
    workers = running.workers()
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGINT):
        for pid in workers:
            os.kill(pid, number)
    job = submit(b'{"n":1}\n')
    until(lambda: queue.get(job.id).state == "COMPLETED", what="the end of the job")
    assert running.workers() == workers


def test_hup_waits_for_one_to_leave_before_the_next_is_told(engine):
    running = engine()
    first, second = running.workers()
    os.kill(first, signal.SIGSTOP)  # so it does not leave yet
    running.process.send_signal(signal.SIGHUP)
    time.sleep(2)
    assert running.workers() == [first, second]
    os.kill(first, signal.SIGCONT)
    until(lambda: len(running.workers()) == 2 and not {first, second} & set(running.workers()), what="two others")


def test_a_successor_that_cannot_start_does_not_take_the_others_with_it(engine, store, submit, queue):
    running = engine()
    schema = store.control["schema"]
    known = schema.find_one({"_id": "version"})
    schema.replace_one({"_id": "version"}, {"_id": "version", "version": 999})
    os.kill(running.workers()[0], signal.SIGKILL)
    until(lambda: len(running.actions("reap")) > 2, what="some tries")
    job = submit(b'{"n":1}\n')
    until(lambda: queue.get(job.id).state == "COMPLETED", what="a job of the other worker")
    schema.replace_one({"_id": "version"}, known)
    running.ready(3)
    assert running.stop() == 0


def test_a_log_that_nobody_takes_does_not_end_the_engine(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # otherwise there is no buffer to flush
    log = tmp_path / "engine.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    running = Running("engine", settings, log)

    def idle():
        return [pid for pid in running.workers() if "idle" in title(pid)]

    try:
        until(lambda: len(idle()) == 2, what="two workers")
        os.close(reader)
        for _ in range(2):
            victim = idle()[0]
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: len(idle()) == 2 and victim not in idle(), what="another one in its place")
        assert running.stop() == 120  # Python's exit code if its last output cannot be flushed
    finally:
        running.end()


def test_a_place_that_cannot_be_filled_for_days_is_tried_every_few_seconds(settings):
    """The backoff is bounded before it is computed: 2**5001 is too large for a float."""
    supervisor, slot = Supervisor(settings, lambda *_: 0), _Slot(0, pid=7, failures=5000)
    supervisor._slots, supervisor._ever_booted = [slot], True
    now = time.monotonic()
    supervisor._bury(7, _Child(WorkerIdentity("h", "b", 0, 1, (), 1), Heartbeat(), now), EXIT_BOOT)
    assert (slot.failures, slot.pid) == (5001, None)
    assert 1 < slot.not_before - now < 60


def test_a_worker_without_clients_holds_nothing_and_is_not_tried_again_at_once(settings):
    """Its successor frees the leases of earlier workers only, after a backoff, however long this one lasted."""
    supervisor, slot = Supervisor(settings, lambda *_: 0), _Slot(0, failures=1)
    supervisor._slots, supervisor._ever_booted = [slot], True
    now = time.monotonic()
    for pid in range(7, 10):
        slot.pid = pid
        identity = WorkerIdentity("h", "b", 0, pid, ("before",), 1)
        slot.dead = ()
        supervisor._bury(pid, _Child(identity, Heartbeat(), time.monotonic() - 60), EXIT_AGAIN)
        assert slot.dead == ("before",)
    assert slot.failures == 4
    assert slot.not_before > now


@pytest.mark.parametrize(("code", "failures"), [(1, 3), (-signal.SIGKILL, 0), (0, 0)])
def test_a_worker_that_is_ready_and_gives_up_at_once_by_itself_is_not_replaced_without_end(settings, code, failures):
    """It may lack threads, in a container that allows few. One that is killed, or exits with 0, is replaced at once."""
    supervisor, slot = Supervisor(settings, lambda *_: 0), _Slot(0)
    supervisor._slots = [slot]
    now = time.monotonic()
    for pid in range(7, 10):
        slot.pid = pid
        heartbeat = Heartbeat()
        heartbeat.mark_booted()
        supervisor._bury(pid, _Child(WorkerIdentity("h", "b", 0, pid, (), 1), heartbeat, time.monotonic()), code)
    assert slot.failures == failures
    assert (slot.not_before > now) == (failures > 1)


def test_a_machine_that_has_no_room_for_a_process_now_is_asked_again(settings, monkeypatch):
    def none():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    supervisor, slot = Supervisor(settings, lambda *_: 0), _Slot(0, dead=("gone",))
    monkeypatch.setattr(os, "fork", none)
    before, now = signal.pthread_sigmask(signal.SIG_BLOCK, []), time.monotonic()
    supervisor._fork(slot)
    assert (slot.pid, slot.dead) == (None, ("gone",))
    assert slot.not_before > now
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_log_that_nobody_empties_holds_up_neither_work_nor_a_stop(settings, submit, queue, tmp_path):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    running = Running("engine", settings, tmp_path / "engine.log", output=write)
    os.close(write)
    try:
        jobs = [submit(b'{"n":1}\n').id for _ in range(60)]
        until(lambda: all(queue.get(job).state == "COMPLETED" for job in jobs), 60, "the end of the jobs")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    finally:
        running.end()
        os.close(read)


def test_short_leases_and_long_polls_kill_no_idle_worker(engine):
    running = engine(engine_lease_seconds=2, engine_watchdog_seconds=3, engine_poll_seconds=4)
    for _ in range(3):  # on a machine that stands still for seconds, one may be killed in one of them
        before = len(running.actions("kill"))
        time.sleep(6)
        if (killed := len(running.actions("kill")) - before) == 0:
            break
    assert killed == 0
    assert running.stop() == 0


def test_idle_workers_join_a_job_as_soon_as_its_ranges_are_there(engine, store, submit, queue):
    running = engine(engine_workers=3, engine_poll_seconds=4, engine_range_bytes="1MiB")
    called = store.control["wakeups"].count_documents({})
    with failing(store.client, ["insert"], **taking(500)):
        job = submit(b'{"n":1,"text":"%b"}\n' % (b"x" * 200) * 200_000)

        def joined():
            return {found["holder"] for found in store.ranges.find({"job": job_key(job.id), "state": "LEASED"})}

        until(lambda: len(joined()) == 3, what="the work of all three")
    # The workers were woken when the job was submitted, and again when its ranges were there.
    assert store.control["wakeups"].count_documents({}) >= called + 2
    until(lambda: queue.get(job.id).state == "COMPLETED", 60, "the end of the job")
    assert running.stop() == 0


def test_a_control_database_that_is_dropped_takes_jobs_again(engine, store, submit, queue, settings):
    running = engine()
    store.client.drop_database(settings.engine_control_db)
    job = submit(b'{"n":1}\n')
    until(lambda: queue.get(job.id).state == "COMPLETED", 60, "the end of the job")
    assert running.stop() == 0
