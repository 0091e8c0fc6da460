"""A process for one run (or a group of them): started, watched, stopped, and what its end means."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moeexp.config.threads import OWN, granted
from moeexp.record import disk
from moeexp.record.process_group import has_ended, kill_group, send, signal_name

# What a run gets to write its record and to hand it to the tracker, once it has been told to stop.
GRACE_S = 15.0


class Process:
    """`python -m moeexp.sweep.worker FILE` in a session of its own, its output in `output`.

    Process and CUDA context are its own, and so is Inductor's cache on disk: Inductor's C++ compiler writes libraries
    under their final names, and one that is killed half way would leave a broken library to every later run. (Finished
    packages are shared through `moeexp.stack.compile_cache`, which locks and renames; so does Triton's cache, which stays
    shared.) `TORCHINDUCTOR_CACHE_DIR`, where it is set, is respected and shared."""

    def __init__(self, jobs: Path, output: Path, *, gpu: str | None, timeout_s: float | None, at_once: int = 1):
        self.output, self.timeout_s = output, timeout_s
        self.timed_out = self.interrupted = False
        self._private = tempfile.mkdtemp(prefix="moeexp-inductor-")
        self._signalled: float | None = None
        self.started = time.monotonic()
        with open(output, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moeexp.sweep.worker", str(jobs)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(gpu, self._private, at_once),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which decides
            )

    def ended(self) -> bool:
        """Whether it has ended; stops it first where its time is over, and for good where it does not stop."""
        if self._process.returncode is not None:
            return True
        if has_ended(self._process):
            kill_group(self._process)  # what it may have left running in its session
            self._process.wait()
            shutil.rmtree(self._private, ignore_errors=True)
            return True
        now = time.monotonic()
        if self._signalled is not None:
            if now - self._signalled > GRACE_S:
                self.kill()
        elif self.timeout_s is not None and now - self.started > self.timeout_s:
            self.timed_out = True
            self._signal(signal.SIGALRM)
        return False

    def interrupt(self) -> None:
        if self._signalled is None:
            self.interrupted = True
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        """With what it has started: compilers, for example."""
        kill_group(self._process)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def cause(self, phase: str | None) -> tuple[str, dict[str, Any]]:
        """(status, error) of a run that could not finish its record itself."""
        code = self._process.returncode
        during = f" during {phase}" if phase else " between two phases"
        name = signal_name(code) if code < 0 else None
        known: dict[str, Any] = {"exit_code": code} if name is None else {"signal": name}
        if self.timed_out:
            kind, status = "Timeout", "timeout"
            message = f"the run took longer than launcher.timeout_s ({self.timeout_s:g} s) and was killed{during}"
        elif self.interrupted:
            kind, status, message = "KeyboardInterrupt", "interrupted", f"interrupted{during}"
        elif name is not None:
            kind, status, message = "ProcessKilled", "failed", f"the run's process was ended by {name}{during}"
            message += "; if nobody killed it, the machine may be out of memory" if name == "SIGKILL" else ""
        else:
            kind, status = "ProcessExit", "failed"
            message = f"the run's process exited with code {code}{during}, without finishing its record"
        if status == "failed" and disk.says_so(self.tail()):
            message = f"no space left on a disk that the run writes to: {message}"
        return status, {"type": kind, "message": message, "phase": phase, "traceback": self.tail(), **known}

    def tail(self, size: int = 4000) -> str:
        """The end of what it printed: a crash's Python stack stands there. Empty where the run took its folder away."""
        if not self.output.exists():
            return ""
        with open(self.output, "rb") as file:
            file.seek(max(0, os.path.getsize(self.output) - size))
            return file.read().decode("utf-8", errors="replace")

    def describe_end(self) -> str | None:
        """How the process ended, where that was not of its own will."""
        code = self._process.returncode
        return f"was ended by {signal_name(code)}" if code < 0 else None

    def _signal(self, number: int) -> None:
        self._signalled = time.monotonic()
        send(self._process, number)


def _environment(gpu: str | None, private: str, at_once: int) -> dict[str, str]:
    """The parent's, with its import path (a user's own ops are found as here), one GPU, its share of the cores, and a cache of
    its own."""
    environment = dict(os.environ)
    environment.pop("HYDRA_FULL_ERROR", None)
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment["PYTHONUNBUFFERED"] = "1"
    if (home := os.path.expanduser("~")) != "~":  # else nobody knows it; see `moeexp.stack.caches`
        environment.setdefault("TRITON_CACHE_DIR", f"{home}/.triton/cache")
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", private)
    if at_once > 1:
        environment[OWN] = str(granted().share(at_once).cores)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment
