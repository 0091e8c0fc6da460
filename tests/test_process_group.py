"""No signal reaches the number of a process that has been waited for: it may be another's by then."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moeexp.record import tracker
from moeexp.sweep.process import Process

LEAVES_A_CHILD = "#!/bin/sh\nsleep 600 &\necho $! > child.partial\nmv child.partial child\nexit 0\n"


@pytest.fixture
def signals(monkeypatch):
    """What is sent: (number of the process or group, signal, whether it was still the process's own)."""
    sent = []

    def own(pid):
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    for name in ("kill", "killpg"):
        real = getattr(os, name)

        def send(pid, number, real=real):
            sent.append((pid, number, own(pid)))
            real(pid, number)

        monkeypatch.setattr(os, name, send)
    return sent


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A run's process, with a script in the place of the worker."""

    def start(script, **options):
        path = tmp_path / "worker"
        path.write_text(script)
        path.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "executable", str(path))
            return Process(tmp_path / "jobs", tmp_path / "output", gpu=None, **{"timeout_s": None} | options)

    return start


def until_ended(process, seconds=30):
    deadline = time.monotonic() + seconds
    while not process.ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_has_ended_gets_one_kill_while_its_number_is_its_own(start, signals):
    process = start("#!/bin/sh\nexit 0\n")
    until_ended(process)
    assert [(number, own) for _, number, own in signals] == [(signal.SIGKILL, True)]
    assert process.ended() and process.cause(None)[1]["exit_code"] == 0
    process.kill()
    process.interrupt()
    assert process.ended() and len(signals) == 1


def test_what_a_process_leaves_running_is_killed_with_it(start, tmp_path):
    process = start(LEAVES_A_CHILD)
    until_ended(process)
    assert _ends(int((tmp_path / "child").read_text()))


def _ends(pid):
    """What was killed may be seen for a moment more."""
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _runs(pid)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_ends_just_before_it_is_interrupted_is_still_cleaned_up(start, signals, tmp_path):
    process = start(LEAVES_A_CHILD)
    while not (tmp_path / "child").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # it ends, and nobody has looked
    process.interrupt()
    until_ended(process)
    assert [number for _, number, _ in signals] == [signal.SIGINT, signal.SIGKILL]
    assert all(own for *_, own in signals) and _ends(int((tmp_path / "child").read_text()))


def test_one_that_is_out_of_time_is_told_then_killed(start, signals, monkeypatch):
    monkeypatch.setattr("moeexp.sweep.process.GRACE_S", 0.2)
    process = start("#!/bin/sh\ntrap '' ALRM\nwhile :; do sleep 0.05; done\n", timeout_s=0.2)
    until_ended(process)
    numbers = [number for _, number, _ in signals]
    assert numbers[0] == signal.SIGALRM and set(numbers[1:]) == {signal.SIGKILL} and process.timed_out
    assert all(own for *_, own in signals)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_waiting_that_is_interrupted_kills_no_other_group(signals, monkeypatch, error):
    """`Popen.wait` gives a process a last quarter of a second when Ctrl-C comes, and may have waited for it."""
    tracking = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    real = tracking.wait

    def wait(timeout=None):
        real()
        if timeout is not None:
            raise error

    monkeypatch.setattr(tracking, "wait", wait)
    with pytest.raises(error):
        tracker.ended_within(tracking, 5)
    assert signals == []


def test_tracking_that_takes_too_long_is_killed_with_its_group(signals):
    tracking = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert not tracker.ended_within(tracking, 0.2)
    assert signals == [(tracking.pid, signal.SIGKILL, True)] and tracking.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getpid()", -signal.SIGKILL)])
def test_one_whose_parent_has_ended_before_ends_at_once(parent, code):
    child = f"import os; from moeexp.record.process_group import die_with_parent; die_with_parent({parent})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", child], env=env).returncode == code
