"""`python -m tests.chaos [--short] [name …]`: inject faults into loads, on servers of its own, and show the outcome."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from api.commands.terminal import EXIT_INTERRUPTED
from bench.rig import isolate, on_leave
from engine.local.servers import LocalServers
from engine.settings import Settings
from tests.chaos.rig import Report
from tests.chaos.scenarios import SCENARIOS


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*SCENARIOS, []], help="scenarios; all when none is named")
    parser.add_argument("--short", action="store_true", help="the versions that `make test` runs")
    asked = parser.parse_args()
    heed = on_leave(lambda number: sys.exit(EXIT_INTERRUPTED if number == signal.SIGINT else 1))
    folder = Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    isolate()
    os.chdir(folder)  # a folder without a .env
    reports = []
    try:
        with LocalServers(Settings(), folder / "servers", ("--setParameter", "enableTestCommands=1")) as servers:
            for name in asked.names or SCENARIOS:
                heed()
                reports.append(run(name, servers, folder / name, asked.short))
                print(reports[-1].line(), flush=True)
                for problem in reports[-1].problems:
                    print(f"        {problem}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failed = sum(not report.passed for report in reports)
    print(
        f"{len(reports) - failed} of {len(reports)} passed: lost, duplicate, unexpected and mutated are 0, counts are exact"
    )
    return 1 if failed else 0


def run(name, servers, folder, short):
    """Run one scenario in databases of its own; an error that it raises becomes a problem in its report."""
    fresh = {"mongo_uri": servers.overrides["mongo_uri"].replace("/headrace?", f"/chaos_{name}?")}
    settings = Settings.model_validate(servers.overrides | fresh | {"engine_control_db": f"chaos_{name}_control"})
    began = time.monotonic()
    try:
        report = SCENARIOS[name](settings, folder, short)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 (the other scenarios still have to run)
        report = Report(name, problems=["".join(traceback.format_exception(error)[-3:])])
    report.seconds = time.monotonic() - began
    return report


if __name__ == "__main__":
    sys.exit(main())
