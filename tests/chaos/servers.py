"""Faults of servers: MongoDB and S3 are slow, fail, send wrong answers or are killed; objects change mid-job."""

import json
import random
import time
from contextlib import ExitStack

from pymongo import MongoClient

from engine.settings import Settings
from tests.chaos.engine import APP
from tests.chaos.mongods import Mongods
from tests.chaos.proxy import Proxy
from tests.chaos.rig import Report, Rig, made
from tests.running import failing, taking, until

LOSSES = ("kill", "lost", "expire", "postpone")
"""Actions in the log that a database which is only slow must not lead to."""


def slow(settings, folder, short):
    """Commands longer than a lease, and a frozen database: no lease is lost, no range put off, no worker killed."""
    report = Report("slow", {"slow inserts": 0, "slow writes to ranges": 0, "stops of the whole database": 0})
    # The full run has the default lease of 30 seconds, and commands of 40.
    lease, watchdog, block = (3, 7, 4) if short else (30, 60, 40)
    patience = {"engine_lease_seconds": lease, "engine_watchdog_seconds": watchdog}
    for kind, commands in (("slow inserts", ["insert"]), ("slow writes to ranges", ["update", "findAndModify"])):
        # With leases of seconds, a machine that stands still for as long is a reason, too, but hardly three times.
        for _ in range(3 if short else 1):
            with Rig(settings, folder) as rig, ExitStack() as stack:
                path = made(rig, 30_000)
                engine = rig.engine(engine_range_bytes="1MiB", **patience)
                # A client without timeouts: turning off a fail point waits for the commands that it holds.
                client = stack.enter_context(MongoClient(rig.settings.mongo_uri.get_secret_value(), appname="chaos"))
                place = {} if commands == ["insert"] else {"namespace": f"{rig.settings.engine_control_db}.ranges"}
                job = rig.submit(path)
                until(lambda rig=rig: rig.store.ranges.find_one({"state": "LEASED"}), what="a lease")
                with failing(client, commands, {"times": 3}, APP, **taking(block * 1000), **place) as came:
                    rig.wait(job)
                report.faults[kind] += came[0]
                rig.verify(report, path, job)
                led = [line["event"] for action in LOSSES for line in engine.actions(action)]
            if not led:
                break
        if led:
            report.problems.append(f"slow {commands} led to: {led[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    with Mongods(folder) as mongods, Rig(_on(mongods, settings), folder) as rig:
        path = made(rig, 200_000)
        engine = rig.engine(engine_range_bytes="2MiB", **patience)
        job = rig.submit(path)
        until(lambda: rig.holders(engine), what="a lease")
        mongods.pause(mongods.ports[0], block)
        report.faults["stops of the whole database"] += 1
        rig.wait(job)
        if engine.actions("kill") or rig.store.ranges.count_documents({"state": "FAILED"}):
            report.problems.append("a database that stood still cost a worker or a range")
        rig.verify(report, path, job)
    return report


MOST_LOADS = 100
"""The most loads that are tried to reach the wanted number of faults."""

FAIL = (
    {"closeConnection": True},
    {"errorCode": 91, "errorLabels": ["RetryableWriteError"]},
    {"errorCode": 189},
    {"errorCode": 11600},
    {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
)
COMMANDS = ["insert", "update", "findAndModify", "find", "aggregate", "getMore", "delete"]


def failpoints(settings, folder, short):
    """mongod's own fail points, on one command in ten: closed connections, error codes, write-concern errors."""
    report = Report("failpoints", {})
    for fault in FAIL:
        with Rig(settings, folder) as rig:
            path = made(rig, 15_000 if short else 300_000)
            engine = rig.engine(engine_range_bytes="512KiB")
            job = rig.submit(path)
            with failing(rig.store.client, COMMANDS, {"activationProbability": 0.1}, APP, **fault) as came:
                rig.wait(job)
            name = (
                "closed connections"
                if "closeConnection" in fault
                else f"code {fault.get('errorCode', 'write concern')}"
            )
            report.faults[name] = came[0]
            if not came[0]:
                report.problems.append(f"no {name} was injected")
            rig.verify(report, path, job)
            engine.stop()
    return report


def _on(mongods, settings):
    fresh = {"mongo_uri": mongods.uri, "engine_control_db": "chaos_control"}
    return Settings.model_validate(settings.model_dump() | fresh)


def databases(settings, folder, short):
    """kill -9 of the only mongod during a load, and its restart."""
    report = Report("databases", {"kills": 0})
    folder.mkdir(parents=True, exist_ok=True)
    with Mongods(folder) as mongods, Rig(_on(mongods, settings), folder) as rig:
        path = made(rig, 200_000 if short else 1_000_000)
        rig.engine(engine_range_bytes="2MiB")
        jobs = [rig.submit(path)]
        draw = random.Random(3)
        for _ in rig.turns(report.faults, "kills", 2 if short else 20):
            rig.keep_busy(path, jobs)
            time.sleep(0.5 + draw.random())
            report.faults["kills"] += rig.busy(jobs)
            mongods.kill(mongods.ports[0])
            time.sleep(draw.random())
            mongods.start(mongods.ports[0])
            until(mongods.primary, 60, "a primary")
        rig.settle(report, path, jobs)
    return report


def replica(settings, folder, short):
    """Three members: every ten seconds the primary steps down, and five seconds later the primary is killed."""
    report = Report("replica", {"step-downs": 0, "kills": 0})
    folder.mkdir(parents=True, exist_ok=True)
    kills_wanted, pause = (1, 3) if short else (10, 10)
    with Mongods(folder, 3) as mongods, Rig(_on(mongods, settings), folder) as rig:
        path = made(rig, 150_000 if short else 1_000_000)
        rig.engine(engine_range_bytes="2MiB")
        jobs = [rig.submit(path)]
        # A primary steps down only if another member has caught up.
        while report.faults["kills"] < kills_wanted or (
            not report.faults["step-downs"] and report.faults["kills"] < 10
        ):
            rig.keep_busy(path, jobs)
            time.sleep(pause / 2)
            report.faults["step-downs"] += bool(mongods.step_down())
            time.sleep(pause / 2)
            port = until(mongods.primary, 60, "a primary")
            mongods.kill(port)
            report.faults["kills"] += 1
            time.sleep(1)
            mongods.start(port)
            until(mongods.primary, 60, "a primary")
        rig.settle(report, path, jobs)
    return report


def storage(settings, folder, short):
    """S3 through a proxy: busy, resets and short bodies at random bytes, whole bodies, latency; objects that change."""
    report = Report("storage", {})
    plans = [
        ({"reset": 0.7}, "reset", 200),
        ({"short": 0.5}, "short", 50),
        ({"busy": 0.3}, "busy", 50),
        ({"whole": 0.3, "reset": 0.1}, "whole", 20),
        ({"delay": 0.05, "short": 0.1}, "short", 1),
    ]
    for seed, (plan, kind, most) in enumerate(plans):
        with ExitStack() as stack:
            rig = stack.enter_context(Rig(settings, folder))
            proxy = stack.enter_context(Proxy(settings.aws_endpoint_url, rig.s3, seed, **plan))
            path = made(rig, 30_000 if short else 300_000)
            rig.engine(aws_endpoint_url=proxy.url, engine_range_bytes="512KiB")
            jobs, wanted = [], 1 if short else most
            while not jobs or (proxy.faults[kind] < wanted and len(jobs) < MOST_LOADS):
                jobs.append(rig.submit(path))
                rig.wait(*jobs)
            if proxy.faults[kind] < wanted:
                report.problems.append(f"only {proxy.faults[kind]} of {wanted} {kind} in {len(jobs)} loads")
            rig.settle(report, path, jobs)
            for name, count in proxy.faults.items():
                report.faults[name] = report.faults.get(name, 0) + count
            if "delay" in plan:
                report.faults["delayed loads"] = len(jobs)
    for change, code in (
        ("overwritten", "object_changed"),
        ("truncated", "object_changed"),
        ("deleted", "object_gone"),
    ):
        with ExitStack() as stack:
            rig = stack.enter_context(Rig(settings, folder))
            proxy = stack.enter_context(Proxy(settings.aws_endpoint_url, rig.s3, 9, delay=0.4))
            path = made(rig, 30_000 if short else 300_000)
            rig.engine(aws_endpoint_url=proxy.url, engine_range_bytes="64KiB")
            job = rig.submit(path)
            until(lambda rig=rig, job=job: rig.queue.get(job.id).plan, what="the plan")
            data = path.read_bytes()
            if change == "deleted":
                rig.s3.delete_object(Bucket=job.source.bucket, Key=job.source.key)
            else:
                rig.overwrite(job, data[::-1] if change == "overwritten" else data[: len(data) // 2])
            report.faults[change] = 1
            [ended] = rig.wait(job)
            if (ended.state, ended.failure and ended.failure.code) != ("FAILED", code):
                report.problems.append(f"an object {change} in mid-job ended as {ended.state}: {ended.failure}")
            _of_one_version(report, rig, job, data)
    return report


def _of_one_version(report, rig, job, data):
    """Every document must be the line at its offset in the version that the job pinned."""
    for found in rig.store.data[job.options.collection].find():
        at = int.from_bytes(found.pop("_id").binary[6:], "big")
        if json.loads(data[at : data.index(b"\n", at)]) != found:
            report.problems.append(f"the document of byte {at} is not of the version that the job pinned")
            return
