"""Which process writes a record, and whether it is still there: a killed one leaves `running` behind for ever."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def this_process() -> dict[str, Any]:
    """What a record says of the process that writes it. A pid alone comes again; with the time at which it started, in one
    boot and one namespace of pids, it does not."""
    return {"pid": os.getpid(), "started_s": _started(os.getpid()), **_machine()}


def is_gone(process: dict[str, Any] | None) -> bool:
    """Whether that process has ended for certain. Of another host, or of a container that is not this one, nobody here can
    say; a host that has booted since has ended them all."""
    pid = process.get("pid") if isinstance(process, dict) else None
    if process is None or not isinstance(pid, int) or not 0 < pid < 2**31:  # not written here
        return False
    here = _machine()
    if process.get("host") != here["host"]:
        return False
    if process.get("boot") != here["boot"]:
        return None not in (process.get("boot"), here["boot"])
    if process.get("pid_namespace") != here["pid_namespace"]:
        return False
    try:
        started, now = _recorded(process), _started(pid)
    except psutil.AccessDenied:  # somebody's: it is there
        return False
    return now is None or (started is not None and abs(now - started) > TICK_S / 2)


def _recorded(process: dict[str, Any]) -> float | None:
    """Earlier records count clock ticks."""
    seconds, ticks = process.get("started_s"), process.get("started_ticks")
    if isinstance(seconds, int | float):
        return seconds
    return ticks * TICK_S if isinstance(ticks, int) else None


def _machine() -> dict[str, Any]:
    boot = PROC / "sys/kernel/random/boot_id"
    namespace = PROC / "self/ns/pid"
    return {
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.is_file() else None,
        "pid_namespace": os.readlink(namespace) if namespace.is_symlink() else None,
    }


def _started(pid: int) -> float | None:
    """Seconds after boot, which setting the clock does not move; None for one that is not there, or has ended and waits for
    its parent to notice."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return round(process.create_time() - psutil.boot_time(), 3)
    except psutil.NoSuchProcess:
        return None
