"""The sentences of the benchmark report follow from its figures, whatever these are. No servers."""

from dataclasses import replace
from unittest.mock import Mock

import pytest

from bench.figures import Spent, Spread
from bench.page import SECTIONS, Report, write
from bench.report import _imported, _least, _less, _most, main, room, stated
from bench.rig import isolate
from bench.verdicts import UNKNOWN, bottleneck, fastest, flat, scaling
from engine.settings import Settings

STAGES = {
    "read": 1.0,
    "split": 0.2,
    "decode": 2.0,
    "encode": 3.0,
    "wait": 40.0,
    "stall": 6.0,
    "drain": 1.0,
    "queue": 0.1,
}


def spent(stages=None, mongod=4.0, workers=3.0, s3=1.0):
    cpu = {"mongod": mongod, "workers": workers, "S3 server": s3, "everything else": 0.0}
    return Spent(seconds=10.0, cpu=cpu, stages=STAGES | (stages or {}), cores=2, writers=8)


def test_taken_cores_are_what_stops_a_load_whatever_its_threads_wait_for():
    told = bottleneck(spent({"read": 20.0}, mongod=10.0, workers=7.0, s3=2.0))
    assert told == "the cores, 95 % of whose time is taken: mongod 50, workers 35, S3 server 10, everything else 0"


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ({"read": 20.0, "stall": 1.0}, "S3:"),
        ({"read": 6.5}, "the workers' CPU:"),  # less than `stall` and `drain` together
        ({"read": 6.5, "stall": 2.0, "drain": 5.0}, "the ends of ranges:"),
        ({"wait": 80.0}, "MongoDB:"),
        ({"wait": 16.0}, "the workers' CPU:"),
    ],
)
def test_with_cores_to_spare_the_reader_and_the_writers_tell_what_they_wait_for(stages, named):
    told = bottleneck(spent(stages))
    assert told.startswith(named)
    assert "40 %" in told


@pytest.mark.parametrize("stages", [{}, {"read": 20.0}, {"drain": 7.0}, {"wait": 80.0}])
@pytest.mark.parametrize("mongod", [4.0, 12.0])
def test_whatever_a_load_waited_for_a_machine_that_did_something_else_says_so(stages, mongod):
    cpu = {"mongod": mongod, "workers": 3.0, "everything else": 2.0}
    told = bottleneck(replace(spent(stages), cpu=cpu))
    assert told.endswith("10 % went to what else ran: this machine was not idle, so this is inconclusive")
    assert "not idle" not in bottleneck(replace(spent(stages), cpu=cpu | {"everything else": 1.9}))


def test_what_else_ran_is_not_taken_for_nothing_where_it_cannot_be_told():
    cpu = {"mongod": 10.0, "workers": 7.0, "S3 server": 2.0}
    assert bottleneck(replace(spent(), cpu=cpu)).endswith(f"S3 server 10; {UNKNOWN}")
    assert fastest({("engine_writers", 4): Spread((0.9, 0.9, 0.96))}, 0.1, None).endswith(f"10 % at most; {UNKNOWN}.")


def test_writers_wait_side_by_side():
    # Eight at a time, waits of 40 µs take 5 µs of a worker's time: less than the 5.2 µs of its own work.
    assert bottleneck(spent()).startswith("the workers' CPU: MongoDB's answers take 5.0 µs")


def test_what_stops_more_processes_is_told_only_where_something_does():
    full = spent(mongod=12.0, workers=7.0)
    found = {"1": (10.0, spent()), "2": (5.2, spent()), "4": (9.0, full), "two engines of 1": (5.6, full)}
    two, four, engines = scaling(found)
    assert two == "2: 0.52 of the time of one process, where a straight line has 0.50."
    assert "4: 0.90 of the time of one process, where a straight line has 0.25. What stops it: the cores" in four
    assert "has 0.50. What stops it: the cores" in engines


@pytest.mark.parametrize(
    ("peaks", "met"),
    [
        ({1: 100, 2: 110}, True),
        ({1: 100, 2: 120}, False),
        ({1: 199, 2: 200}, False),
        ({1: 200, 2: None}, False),
        ({1: 100, 2: None}, None),
        ({1: 100, 2: 110, 3: None}, None),
        ({1: None, 2: None}, None),
    ],
)
def test_memory_is_flat_only_where_two_sizes_agree(peaks, met):
    assert flat(peaks)[1] is met


def test_a_size_without_room_is_told():
    assert flat({10**10: None})[0] == "not measured at 10 GB: needs 42 GB free"


def test_defaults_are_called_the_fastest_only_within_the_noise():
    ratios = {("engine_writers", 4): Spread((0.9, 0.9, 0.96)), ("engine_writers", 16): Spread((0.9, 0.89, 0.88))}
    assert "Nothing that was tried is faster" in fastest(ratios, 0.1, 0.0)
    assert "No verdict" in fastest(ratios, 0.11, 0.0)
    told = fastest(ratios, 0.05, 0.09)
    assert told.startswith("Faster here than the defaults")
    assert "ENGINE_WRITERS=16 (0.89)" in told


def test_few_rounds_and_a_machine_that_is_not_idle_tell_no_settings_apart():
    ratios = {("engine_writers", 4): Spread((0.5, 0.5))}
    assert fastest(ratios, 0.01, 0.0) == "No verdict: it takes 3 rounds, and there were 2."
    ratios = {("engine_writers", 4): Spread((0.5, 0.5, 0.5))}
    assert fastest(ratios, 0.01, 0.11).startswith("No verdict: this machine was not idle, and 11 %")


def test_the_command_that_is_stated_measures_the_same_again():
    assert stated(False, 10, None) == "make bench-report"
    assert stated(True, 1, "/a b/tool") == "make bench-report GIGABYTES=1 QUICK=1 MONGOIMPORT='/a b/tool'"


def test_the_disk_that_is_asked_for_holds_the_largest_file_and_what_came_before_it():
    assert [room(False, 10), room(False, 1), room(True, 10)] == [54 * 10**9, 18 * 10**9, 34 * 10**8]


@pytest.mark.parametrize(("given", "free", "told"), [("0", 10**12, "--gigabytes 0"), ("10", 10**9, "has 1.0 GB free")])
def test_what_cannot_be_measured_is_told_before_anything_is(given, free, told, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", "--gigabytes", given])
    monkeypatch.setattr("bench.report.find_spec", lambda name: True)
    monkeypatch.setattr("bench.report.on_leave", lambda leave: lambda: None)
    monkeypatch.setattr("bench.report.shutil.disk_usage", lambda path: Mock(free=free))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_section_that_fails_stands_in_the_table_and_costs_no_other(capsys):
    report = Report()
    report.measure("first", lambda: 1 // 0, ("what", "< 1", lambda found: ("never", True)))
    report.measure("second", lambda: 2, ("other", "< 3", lambda found: (str(found), found < 3)))
    [(_, _, why, met), other] = report.rows
    assert why.startswith("not measured: ZeroDivisionError")
    assert met is None
    assert (other, report.found) == (("other", "< 3", "2", True), {"second": 2})
    assert list(report.wrong) == ["first"]


def test_what_is_measured_are_the_defaults_whatever_the_environment_says(monkeypatch, tmp_path):
    """Otherwise ten gigabytes might be uploaded to somebody's bucket."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("AWS_BUCKET_NAME=mine\nENGINE_WRITERS=3\n")
    monkeypatch.setenv("MONGO_URI", "mongodb://somebody")
    monkeypatch.setenv("engine_batch_records", "7")
    monkeypatch.setitem(Settings.model_config, "env_file", ".env")
    assert Settings().aws_bucket_name == "mine"
    isolate()
    found = Settings(engine_workers=2)
    assert (found.mongo_uri, found.aws_bucket_name) == (None, None)
    assert (found.engine_batch_records, found.engine_writers) == (1000, 4)


@pytest.mark.parametrize(
    ("judge", "median", "told", "met"),
    [
        (_most("x", 1.5), 1.5034, "1.503", False),
        (_most("x", 1.5), 1.496, "1.50", True),
        (_most("x", 1.5), 1.5, "1.50", True),
        (_least("x", 100, 0), 99.6, "99.6", False),
        (_less("x", 100, 0), 100.0, "100", False),
        (_less("x", 100, 0), 99.6, "99.6", True),
    ],
)
def test_a_figure_and_its_verdict_say_the_same(judge, median, told, met):
    assert judge({"x": Spread((median,))}) == (told, met)


def test_the_import_tools_figure_has_the_digits_that_its_verdict_needs():
    found = {"import note": "tool 1.2, -j4", "import ratio": Spread((2.497,))}
    assert _imported(found) == ("2.497 (tool 1.2, -j4)", False)
    assert _imported({"import note": "MONGOIMPORT names no tool"}) == ("not measured: MONGOIMPORT names no tool", None)


def test_the_report_does_not_count_its_own_pictures_as_a_change_of_the_tree(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.page.current_commit", lambda: "abc1234" + "-dirty" * any(tmp_path.iterdir()))
    monkeypatch.setattr("bench.page._draw", lambda found, place: (place / "ladder.svg").touch())
    report = Report({"ordinary": 1, "tiny": 1, "wide": 1, "large": 1})
    report.wrong = {name: "not measured" for _, name, _, _ in SECTIONS}
    write(report, "make bench-report", 60.0, tmp_path, 10**9, "abc1234")
    page = (tmp_path / "REPORT.md").read_text()
    assert "commit abc1234." in page
    assert "dirty" not in page
