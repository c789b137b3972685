"""The tables that commands print."""

from rich.console import Console

from api.show import profile_table


def worker(slot, lines, **seconds):
    counts = {"lines": lines} | {f"seconds_{stage}": spent for stage, spent in seconds.items()}
    return {"host": "h", "pid": 100 + slot, "slot": slot, "counts": counts}


def shown(*given):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(profile_table(*given))
    return capture.get()


def test_a_profile_shares_the_time_among_the_stages_in_which_any_is_spent():
    told = shown([worker(0, 1e6, decode=1.0, wait=3.0, stall=16.0)])
    for cell in ("1.00 (25 %)", "3.00 (75 %)", "│ 16.00 │", "ENGINE_WRITERS"):
        assert cell in told, told


def test_a_profile_is_of_the_time_between_two_looks():
    before = [worker(0, 1e6, decode=9.0)]
    now = [worker(0, 2e6, decode=10.0, wait=1.0), worker(1, 0)]
    told = shown(now, before)
    assert told.count("1.00 (50 %)") == 4, told
    assert "10.00" not in told
