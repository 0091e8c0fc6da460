"""Which process writes a record, and whether it is still there: a killed one leaves `running` behind for ever."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def this_process() -> dict[str, Any]:
    """What a record says of the process that writes it. A pid alone comes again; with the ticks at which it started, in one
    boot and one namespace of pids, it does not."""
    return {"pid": os.getpid(), "started_ticks": _started(os.getpid()), **_machine()}


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
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody's: it is there
        pass
    return process.get("started_ticks") is not None and _started(pid) != process["started_ticks"]


def _machine() -> dict[str, Any]:
    boot = PROC / "sys/kernel/random/boot_id"
    namespace = PROC / "self/ns/pid"
    return {
        "host": platform.node(),
        "boot": boot.read_text().strip() if boot.is_file() else None,
        "pid_namespace": os.readlink(namespace) if namespace.is_symlink() else None,
    }


def _started(pid: int) -> int | None:
    """Clock ticks after boot; None where there is no /proc, or no such process, or one that has ended and waits for its
    parent to notice."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
