"""Faults of processes: workers, supervisors and hosts are killed, are stopped, hang, or have a wrong clock."""

import random
import signal
import time

from bson import ObjectId

from engine.control.leases import DEATHS
from engine.model import RangeState
from engine.steps import Step
from tests.chaos import corpus
from tests.chaos.rig import HEAVY, Report, Rig, kill, made, patience
from tests.running import alive, until

SMALL_IN_SHORT = {Step.PLANNED, Step.LEASED, Step.WRITTEN, Step.CLOSE, Step.FINISH}
"""The steps at which the short version crashes small jobs."""

MOST_SEEDS = 60
"""The most loads that are tried to reach the wanted number of kills."""

ONLY_OF_LARGE_JOBS = {Step.OPENED, Step.READ, Step.CONFIRM, Step.CONFIRMED}
"""Steps that small jobs do not reach."""


def kills(settings, folder, short):
    """kill -9 of a random worker that holds a lease, every half second; also among small jobs loaded together."""
    report = Report("kills", {"kills": 0, "kills among small jobs": 0}, {"retries": 0})
    wanted, least_seeds, count = (6, 1, 40_000) if short else (200, 5, 1_000_000)
    seed = 0
    while (report.faults["kills"] < wanted or seed < least_seeds) and seed < MOST_SEEDS:
        seed += 1
        draw = random.Random(seed)
        with Rig(settings, folder) as rig:
            path = made(rig, count, seed)
            engine = rig.engine(engine_range_bytes="256KiB" if short else "8MiB")
            job = rig.submit(path)
            for _ in rig.under_way(job, seconds=600, pause=0.15 if short else 0.5):
                if victims := rig.holders(engine):
                    report.faults["kills"] += kill(draw.choice(victims))
            _retry_after_deaths(report, rig, job)
            rig.verify(report, path, job)
            path.unlink()
    if report.faults["kills"] < wanted:
        report.problems.append(f"only {report.faults['kills']} workers were killed in {seed} loads, of {wanted}")
    with Rig(settings, folder) as rig:
        path = rig.folder / "small.ndjson"
        corpus.mixed(path, 99, 80, 0.05)
        jobs = rig.submit_small(path, 50 if short else 1000)
        engine = rig.engine(CHAOS_SLOW=0.1 if short else 0)  # they must not end before the first is killed
        for _ in rig.under_way(*jobs, seconds=600, pause=0.15):
            if victims := rig.holders(engine):
                report.faults["kills among small jobs"] += kill(draw.choice(victims))
        for job in jobs:
            _retry_after_deaths(report, rig, job)
            rig.verify(report, path, job)
    return report


def _retry_after_deaths(report, rig, job):
    """Retry a job, as a person would, if three kills in a row hit one range without progress between them."""
    failure = rig.queue.get(job.id).failure
    if failure is None or failure.code != "workers_died":
        return
    for found in rig.store.ranges.find({"job": ObjectId(job.id), "state": RangeState.FAILED}):
        if found["deaths"] < DEATHS:
            report.problems.append(f"a range was given up after {found['deaths']} deaths at one byte")
    report.figures["retries"] += 1
    rig.queue.retry(job.id)
    rig.wait(job)


def steps(settings, folder, short):
    """A crash at every labelled step, the first, second and third time that it is reached, among large jobs and among
    small ones loaded together."""
    report = Report("steps", {"crashes": 0, "crashes of small jobs": 0})
    most = 240 if short else 90  # the short version may share a slow machine
    for step in Step:
        for nth in (1,) if short else (1, 2, 3):
            with Rig(settings, folder) as rig:
                if step in (Step.CONFIRM, Step.CONFIRMED):  # reached once a second: the load must last
                    path = made(rig, 70_000 if short else 150_000)
                else:
                    path = rig.folder / "mixed.ndjson"
                    corpus.mixed(path, 7, 6000)
                # `nth` jobs, since some steps are reached only once per job.
                jobs = [rig.submit(path) for _ in range(nth)]
                fired = _crashing(rig, step, nth, engine_batch_records=300, engine_range_bytes="128KiB")
                rig.wait(*jobs, seconds=most)
                _crashed(report, rig, "crashes", fired, path, jobs)
            if step in ONLY_OF_LARGE_JOBS or (short and step not in SMALL_IN_SHORT):
                continue
            with Rig(settings, folder) as rig:
                path = rig.folder / "small.ndjson"
                corpus.mixed(path, 8, 100, 0.05)
                fired = _crashing(rig, step, nth, engine_batch_records=30)
                jobs = []
                for _ in range(nth):
                    # Paused, so that the jobs gather in the queue and are loaded together.
                    rig.queue.pause()
                    jobs += rig.submit_small(path, 6)
                    rig.queue.resume()
                    rig.wait(*jobs, seconds=most)
                _crashed(report, rig, "crashes of small jobs", fired, path, jobs)
    return report


def _crashing(rig, step, nth, **changes):
    """Start an engine that crashes the nth time it reaches `step`; returns the file that it writes just before."""
    fired = rig.folder / f"{step}-{nth}"
    fired.unlink(missing_ok=True)
    fired.with_suffix(".count").unlink(missing_ok=True)
    rig.engine(ready=False, CHAOS_STEP=step, CHAOS_NTH=nth, CHAOS_FIRED=fired, **changes)
    return fired


def _crashed(report, rig, kind, fired, path, jobs):
    """Count the crash, which must have happened, and verify the jobs."""
    if fired.exists():
        report.faults[kind] += 1
    else:
        report.problems.append(f"of the {kind} that at {fired.name} never came")
    for job in jobs:
        rig.verify(report, path, job)


def ranges(settings, folder, short):
    """An engine with another range size joins while a job is planned, before its ranges exist, and while it runs."""
    report = Report(
        "ranges", {"joins while planning": 0, "joins before the ranges are in": 0, "joins while running": 0}
    )
    kinds = {Step.PLAN: "joins while planning", Step.PLANNED: "joins before the ranges are in"}
    for step, kind in kinds.items():
        for turn in range(1 if short else 3):
            with Rig(settings, folder) as rig:
                path = made(rig, 60_000 if short else 500_000)
                fired = rig.folder / f"held-{step}-{turn}"
                held = {"CHAOS_HANG": "stopped", "CHAOS_STEP": step, "CHAOS_NTH": 1, "CHAOS_FIRED": fired}
                # Its supervisor must not kill the stopped planner before it wakes, after another engine has planned.
                held |= {"engine_watchdog_seconds": 60}
                first = rig.engine(engine_workers=1, engine_range_bytes="128KiB", **held)
                job = rig.submit(path)
                until(fired.exists, what=f"the planner at {step}")
                [planner] = first.workers()
                rig.engine(engine_range_bytes="1MiB")
                until(
                    lambda rig=rig: rig.store.ranges.find_one({"state": "LEASED"}), what="a lease of the other engine"
                )
                report.faults[kind] += kill(planner, signal.SIGCONT)
                rig.wait(job)
                _ranges_are_those_of_the_plan(report, rig, path, job)
    with Rig(settings, folder) as rig:
        path = made(rig, 60_000 if short else 1_000_000)
        jobs = [rig.submit(path) for _ in range(2 if short else 4)]
        # It is slow, so that the other engine joins before the end.
        first = rig.engine(ready=False, engine_range_bytes="128KiB", CHAOS_SLOW=0.2 if short else 0.02)
        until(lambda: rig.store.ranges.find_one({"state": "LEASED"}), what="the first lease")
        rig.engine(engine_range_bytes="300KiB")
        report.faults["joins while running"] += rig.busy(jobs)
        rig.wait(*jobs)
        if first.stop() != 0:
            report.problems.append("an engine did not stop softly")
        for job in jobs:
            _ranges_are_those_of_the_plan(report, rig, path, job)
    return report


def _ranges_are_those_of_the_plan(report, rig, path, job):
    rig.verify(report, path, job)
    size, of = job.source.size, rig.queue.get(job.id).plan.range_count
    found = [(r["start"], r["end"]) for r in rig.store.ranges.find({"job": ObjectId(job.id)}).sort("_id", 1)]
    if found != [(size * index // of, size * (index + 1) // of) for index in range(of)]:
        report.problems.append("the ranges are not those of the plan")


def zombies(settings, folder, short):
    """SIGSTOP of an engine for three lease periods, then SIGCONT while another engine works on its ranges."""
    report = Report("zombies", {"workers stopped": 0, "ranges held by others at the waking": 0, "leases found lost": 0})
    with Rig(settings, folder) as rig:
        path = made(rig, 60_000 if short else 300_000)
        for _ in range(1 if short else 3):
            first = rig.engine(engine_range_bytes="256KiB", CHAOS_SLOW=0.3)
            job = rig.submit(path)
            held = until(
                lambda first=first: len(found := rig.holders(first)) == 2 and found, what="a lease of each worker"
            )
            pids = [first.pid, *first.workers()]
            for pid in pids:
                kill(pid, signal.SIGSTOP)
            stale = {d["_id"]["index"]: d["token"] for d in rig.store.ranges.find({"state": "LEASED"})}
            report.faults["workers stopped"] += len(held)
            time.sleep(3 * rig.settings.engine_lease_seconds)
            # The other engine starts late and is slow, so that it still works on the zombies' ranges when they wake.
            pace = 0.4 if short else 0.1
            second = rig.engine(
                ready=False, engine_range_bytes="256KiB", engine_writers=1, engine_batch_records=500, CHAOS_SLOW=pace
            )

            def taken(job=job, stale=stale):
                query = {"job": ObjectId(job.id), "_id.index": {"$in": list(stale)}, "state": "LEASED"}
                return [d for d in rig.store.ranges.find(query) if d["token"] != stale[d["_id"]["index"]]]

            others = until(taken, 90, "a lease of others on what the zombies hold")
            if rig.ended(job):
                report.problems.append("the job had ended before the zombies woke")
            for pid in reversed(pids):
                kill(pid, signal.SIGCONT)
            report.faults["ranges held by others at the waking"] += len(others)
            until(lambda first=first: first.actions("lost"), 60, "a zombie that finds its lease lost")
            report.faults["leases found lost"] += len(first.actions("lost"))
            rig.wait(job)
            if lost := second.actions("lost"):
                report.problems.append(f"a zombie took a lease from its holder: {lost[0]}")
            if not stale:
                report.problems.append("nobody held a lease when it was stopped")
            rig.verify(report, path, job)
            for engine in (first, second):
                if engine.stop() != 0:
                    report.problems.append("an engine did not stop softly")
    return report


def supervisors(settings, folder, short):
    """kill -9 of the supervisor under load: no orphan is left after two seconds, and another engine continues."""
    report = Report("supervisors", {"kills": 0})
    with Rig(settings, folder) as rig:
        path = made(rig, 60_000 if short else 1_000_000)
        jobs = [rig.submit(path)]
        for _ in rig.turns(report.faults, "kills", 2 if short else 20):
            rig.keep_busy(path, jobs)
            engine = rig.engine(engine_range_bytes="2MiB")
            until(lambda engine=engine: rig.holders(engine) or not rig.busy(jobs), what="a lease")
            workers = engine.workers()
            report.faults["kills"] += rig.busy(jobs)
            kill(engine.pid)
            engine.process.wait()
            until(lambda workers=workers: not any(map(alive, workers)), patience(2, short), "the end of the orphans")
        rig.engine()
        rig.settle(report, path, jobs)
    return report


def terms(settings, folder, short):
    """TERM under load: exit code 0 within the grace period, no lease left, no attempt spent."""
    report = Report("terms", {"terms": 0})
    with Rig(settings, folder) as rig:
        path = made(rig, 60_000 if short else 1_000_000)
        jobs = [rig.submit(path)]
        draw = random.Random(2)
        for _ in rig.turns(report.faults, "terms", 2 if short else 50):
            rig.keep_busy(path, jobs)
            engine = rig.engine(engine_range_bytes="2MiB")
            until(lambda engine=engine: rig.holders(engine) or not rig.busy(jobs), what="a lease")
            time.sleep(draw.random() * 0.5)
            report.faults["terms"] += rig.busy(jobs)
            code = engine.stop(seconds=rig.settings.engine_grace_seconds + 3)
            if code != 0:
                report.problems.append(f"TERM ended with exit code {code}")
            if rig.store.ranges.count_documents({"state": RangeState.LEASED}):
                report.problems.append("a lease is held after TERM")
        if rig.store.ranges.count_documents({"attempts": {"$gt": 0}}):
            report.problems.append("a soft stop spent an attempt")
        rig.engine()
        rig.settle(report, path, jobs)
    return report


def hups(settings, folder, short):
    """HUP under load: every worker is replaced, one by one, and the load continues."""
    report = Report("hups", {"hups": 0})
    with Rig(settings, folder) as rig:
        path = made(rig, 150_000 if short else 1_000_000)
        jobs = [rig.submit(path)]
        engine = rig.engine(engine_range_bytes="1MiB")
        for _ in rig.turns(report.faults, "hups", 2 if short else 10):
            rig.keep_busy(path, jobs)
            before = set(engine.workers())
            report.faults["hups"] += rig.busy(jobs)
            kill(engine.pid, signal.SIGHUP)
            until(lambda before=before: len(set(engine.workers()) - before) == 2, 40, "the replacement of every worker")
            until(lambda before=before: not before & set(engine.workers()), 40, "the end of those that were replaced")
        rig.wait(*jobs)
        if engine.stop() != 0:
            report.problems.append("the engine did not stop softly")
        rig.settle(report, path, jobs)
    return report


def hung(settings, folder, short):
    """A worker that is stopped, loops, or blocks in a read: it is killed in time and replaced, and nothing is lost."""
    report = Report("hung", {"hangs": 0})
    for turn, (hang, step) in enumerate(
        (h, s) for h in ("stopped", "looping", "blocked") for s in ((Step.READ,) if short else (Step.READ, Step.PARSED))
    ):
        with Rig(settings, folder) as rig:
            path = made(rig, 60_000 if short else 300_000)
            fired = rig.folder / f"hung-{turn}"
            changes = {"CHAOS_HANG": hang, "CHAOS_STEP": step, "CHAOS_NTH": 3, "CHAOS_FIRED": fired}
            engine = rig.engine(engine_range_bytes="512KiB", **changes)
            job = rig.submit(path)
            until(fired.exists, what="the hang")
            report.faults["hangs"] += 1
            most = patience(HEAVY["engine_watchdog_seconds"] + 3, short)
            until(lambda engine=engine: engine.actions("kill"), most, f"the end of a worker that is {hang}")
            engine.ready(3)
            until(lambda engine=engine: len(engine.workers()) == 2, what="a worker in its place")
            rig.wait(job)
            rig.verify(report, path, job)
    return report


def hosts(settings, folder, short):
    """kill -9 of everything on one host: another host frees its leases within one lease period plus ten seconds."""
    report = Report("hosts", {"hosts": 0, "leases taken over": 0})
    with Rig(settings, folder) as rig:
        path = made(rig, 100_000 if short else 1_000_000)
        for _ in range(1 if short else 5):
            lost = rig.engine(engine_range_bytes="2MiB", CHAOS_SLOW=0.3)
            job = rig.submit(path)
            until(lambda lost=lost: rig.holders(lost), what="a lease")
            pids = [lost.pid, *lost.workers()]
            for pid in pids:
                report.faults["hosts"] += kill(pid) and pid == lost.pid
            held = {d["token"] for d in rig.store.ranges.find({"state": "LEASED"})}
            report.faults["leases taken over"] += len(held)
            other = rig.engine(engine_range_bytes="2MiB")
            until(
                lambda held=held: not rig.store.ranges.find_one({"token": {"$in": list(held)}}),
                patience(rig.settings.engine_lease_seconds + 10, short),
                "the release of what a dead host held",
            )
            rig.wait(job)
            rig.verify(report, path, job)
            other.stop()
    return report


def clocks(settings, folder, short):
    """A host whose clock is an hour slow or fast: it steals no lease, its leases end in time when it dies, and it frees
    those of another host that dies. And a host whose signatures S3 refuses because of its clock."""
    report = Report("clocks", {"wrong clocks": 0, "hosts killed": 0, "refused signatures": 0})
    for off in (-3600, 3600):
        with Rig(settings, folder) as rig:
            path = made(rig, 30_000 if short else 300_000)
            right = rig.engine(engine_range_bytes="512KiB")
            wrong = rig.engine(engine_range_bytes="512KiB", CHAOS_CLOCK=off)
            job = rig.submit(path)
            rig.wait(job)
            report.faults["wrong clocks"] += 1
            for engine in (right, wrong):
                if engine.actions("expire") or engine.actions("lost"):
                    report.problems.append(f"a lease was taken from its live holder with a clock {off} s off")
            rig.verify(report, path, job)
        for dies, lives in ((off, 0),) if short else ((off, 0), (0, off)):
            with Rig(settings, folder) as rig:
                path = made(rig, 30_000 if short else 300_000)
                lost = rig.engine(engine_range_bytes="512KiB", CHAOS_CLOCK=dies, CHAOS_SLOW=1)
                job = rig.submit(path)
                until(lambda lost=lost, rig=rig: rig.holders(lost), what="a lease")
                for pid in (lost.pid, *lost.workers()):
                    kill(pid)
                held = [d["token"] for d in rig.store.ranges.find({"state": "LEASED"})]
                report.faults["hosts killed"] += bool(held)
                rig.engine(engine_range_bytes="512KiB", CHAOS_CLOCK=lives)
                until(
                    lambda held=held, rig=rig: not rig.store.ranges.find_one({"token": {"$in": held}}),
                    patience(rig.settings.engine_lease_seconds + 10, short),
                    f"the release of what a host held whose clock was {dies} s off",
                )
                rig.wait(job)
                rig.verify(report, path, job)
    with Rig(settings, folder) as rig:
        path = made(rig, 1000)
        engine = rig.engine(CHAOS_CLOCK=3600, CHAOS_CLOCK_SIGNS=1)
        job = rig.submit(path)
        until(lambda: any("clock" in line["event"] for line in engine.lines()), what="a word about the clock")
        report.faults["refused signatures"] += 1
        if rig.ended(job) or rig.queue.get(job.id).attempts:
            report.problems.append("a wrong clock failed the job for good, or spent an attempt of it")
        engine.stop()
        rig.engine()
        rig.wait(job)
        rig.verify(report, path, job)
    return report
