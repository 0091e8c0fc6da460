"""A process that leads a group of its own: seen to end, and killed with what it has started.

Its number, which is also the group's, is its own until somebody has waited for it. From then on the system may give it to
any other process: a signal that is sent late reaches a stranger.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def has_ended(process: subprocess.Popen) -> bool:
    """Whether it has ended, without waiting for it: its group can still be killed."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def signal_name(code: int) -> str:
    """Of the signal that ended a process with this code, below 0. Real-time signals but the first and the last have no name."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def send(process: subprocess.Popen, number: int) -> None:
    """A signal to it alone; nothing where it has been waited for. (`Popen.send_signal` waits for one that has ended.)"""
    if process.returncode is None:
        os.kill(process.pid, number)


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to it and all of its group that is left; nothing where it has been waited for."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


def end_groups(processes: Sequence[subprocess.Popen], grace_s: float) -> None:
    """SIGTERM to each and its group, upon which a compiler removes what it has half written, and SIGKILL to what is left after
    `grace_s`. All have been waited for then."""
    for process in processes:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + grace_s
    for process in processes:
        while not has_ended(process) and time.monotonic() < end:
            time.sleep(0.02)
        kill_group(process)
        process.wait()


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """This process gets that signal when its parent ends, also where that is killed, and now where it has ended. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
