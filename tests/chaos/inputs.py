"""Files that are hard to load: lines of up to 2 GiB, a thousand distinct bad lines, a line that kills its reader."""

from collections import Counter

from engine.model import Reason
from tests.chaos import corpus
from tests.chaos.rig import Report, Rig


def lines(settings, folder, short):
    """One line of 2 GiB (256 MiB if `short`), and lines of 20 MiB among short ones: right rejects, bounded memory."""
    report = Report("lines", {"oversized lines": 0, "lines of 20 MiB": 0})
    with Rig(settings, folder) as rig:
        engine = rig.engine(engine_range_bytes="64MiB")
        one = rig.folder / "one.ndjson"
        size = 2**28 if short else 2**31
        with one.open("wb") as out:
            out.write(b'{"a":"')
            for _ in range(size // 2**20 - 1):
                out.write(b"x" * 2**20)
            out.write(b"x" * (2**20 - 8) + b'"}')
        many = rig.folder / "many.ndjson"
        with many.open("wb") as out:
            for number in range(30 if short else 300):
                text = b"y" * (20 * 2**20) if number % 10 == 9 else b"z"
                out.write(b'{"n":%d,"t":"%s"}\n' % (number, text))
        for path in (one, many):
            job = rig.submit(path)
            rig.wait(job)
            rig.verify(report, path, job)
            report.faults["oversized lines" if path is one else "lines of 20 MiB"] += rig.queue.get(
                job.id
            ).progress.tally.rejected
        if engine.actions("reap"):
            report.problems.append("a worker died")
        peaks = []
        for pid in engine.workers():
            with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
                peaks.append(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
        report.figures["MB at the peak of a worker"] = max(peaks)
        if max(peaks) > 400:
            report.problems.append(f"a worker took {max(peaks)} MB")
        one.unlink()
        many.unlink()
    return report


def lines_of_all_kinds(settings, folder, short):
    """A corpus with at least a thousand distinct bad lines that cover all reasons, at several range sizes."""
    report = Report("corpus", {"distinct bad lines": 0})
    wrong, reasons = set(), Counter()
    longest = {"engine_max_line_bytes": corpus.LONGEST}
    sizes = ("64KiB", "100000", "1MiB") if short else ("64KiB", "100000", "1MiB", "3MiB", "64MiB")
    for seed, size in enumerate(sizes):
        with Rig(settings, folder) as rig:
            engine = rig.engine(engine_range_bytes=size, **longest)
            mixed, plain = (rig.folder / f"{name}-{seed}" for name in ("mixed.ndjson", "plain.txt"))
            wrong |= set(corpus.mixed(mixed, seed, 3000 if short else 20_000)) | set(corpus.text(plain, seed, 3000))
            rig.store.data.create_collection("picky", validator={corpus.REFUSED: {"$exists": False}})
            jobs = {mixed: rig.submit(mixed, collection="picky"), plain: rig.submit(plain)}
            rig.wait(*jobs.values())
            rig.verify(report, mixed, jobs[mixed], refuses=corpus.REFUSED)
            rig.verify(report, plain, jobs[plain], text_key=jobs[plain].source.key)
            if engine.actions("reap"):
                report.problems.append("a worker died")
            if not (short and seed):
                _too_large(rig, report, engine, size, seed)
            reasons.update(found["reason"] for found in rig.store.rejects.find({}, {"reason": 1}))
    report.faults["distinct bad lines"] = len(wrong)
    report.figures |= {reason: reasons[reason] for reason in Reason}
    if len(wrong) < 1000 or any(not reasons[reason] for reason in Reason):
        report.problems.append(f"{len(wrong)} distinct bad lines, and of each reason: {dict(reasons)}")
    return report


def _too_large(rig, report, engine, size, seed):
    """Lines within the limit for lines whose documents exceed MongoDB's limit, by a few bytes or by far."""
    engine.stop()
    huge = rig.folder / f"huge-{seed}.ndjson"
    most = rig.settings.engine_max_line_bytes
    huge.write_bytes(b"".join(b'{"t":"%s"}\n' % (b"x" * n) for n in (2**24 - 17, 2**24, 20 * 2**20, most - 8)))
    rig.engine(engine_range_bytes=size)
    job = rig.submit(huge)
    rig.wait(job)
    rig.verify(report, huge, job)


def poison(settings, folder, short):
    """A line that kills its reader: only its range fails, after three deaths, and the error names its offsets."""
    report = Report("poison", {"poisoned ranges": 0, "deaths": 0})
    with Rig(settings, folder) as rig:
        path = rig.folder / "poison.ndjson"
        corpus.plain(path, 5, 20_000 if short else 200_000)
        lines = path.read_bytes().split(b"\n")
        lines[len(lines) // 2] = b'{"text":"hemlock"}'
        path.write_bytes(b"\n".join(lines))
        engine = rig.engine(engine_range_bytes="256KiB", CHAOS_POISON="hemlock")
        [job] = rig.wait(rig.submit(path))
        [bad] = rig.store.ranges.find({"state": "FAILED"})
        report.faults["poisoned ranges"] += 1
        # Three without progress between them; after each earlier death the next worker came closer to the line.
        report.faults["deaths"] = len(engine.actions("reap"))
        if not 3 <= report.faults["deaths"] <= 12:
            report.problems.append(f"{report.faults['deaths']} workers died of it")
        message = job.failure.message if job.failure else ""
        if job.state != "FAILED" or not all(str(bad[at]) in message for at in ("start", "end", "confirmed")):
            report.problems.append(f"the job is {job.state} and says: {message}")
        if rig.store.ranges.count_documents({"state": "DONE"}) != job.plan.range_count - 1:
            report.problems.append("the other ranges did not finish")
        engine.stop()
        rig.engine()
        rig.queue.retry(job.id)
        rig.wait(job)
        rig.verify(report, path, job)
    return report
