"""`exit_code` says how a child ended without taking a lock, which a signal handler's exception could leave held."""

import os
import signal
import subprocess
import sys

import pytest

from engine.children import exit_code
from tests.running import until


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(int(sys.stdin.readline()))"], stdin=-1)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()


def say(child, line):
    child.stdin.write(line)
    child.stdin.flush()


def test_how_a_child_ended_is_told_and_it_can_still_be_waited_for(child):
    assert exit_code(child) is None
    say(child, b"3\n")
    assert until(lambda: exit_code(child), what="the end of the child") == 3
    assert exit_code(child) == child.wait(30) == exit_code(child) == 3


def test_a_child_that_was_killed_has_the_number_of_the_signal(child):
    os.kill(child.pid, signal.SIGKILL)
    assert until(lambda: exit_code(child), what="the end of the child") == -signal.SIGKILL == child.wait(30)


def test_a_lock_that_a_signal_left_taken_hides_no_end(child):
    # As if a signal handler had raised an exception within `Popen.poll`.
    child._waitpid_lock.acquire()
    try:
        say(child, b"3\n")
        assert until(lambda: exit_code(child), what="the end of the child") == 3
        assert child.poll() is None
    finally:
        child._waitpid_lock.release()
