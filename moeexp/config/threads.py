"""How many threads a run has: as many as its work feeds, of those that the machine really grants.

Threads that meet at barriers spin there. Alone on its cores that costs nothing; where another process has one of them, or a
quota stops them for the rest of each period, every barrier waits for the thread that is not running. A decode step of a small
model is hundreds of barriers and little work between them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeexp.config.architecture import Architecture
from moeexp.record import control_groups, cpus

# Weights that a token multiplies, per thread: docs/log.md has the measurements.
WEIGHTS_PER_THREAD = 8_000_000
MOST = 1024  # a slip of the finger beyond it would end in an error of the threading library
OWN, OPENMP, COMPILERS = "MOEEXP_CORES", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"

# How often a thread looks whether the others have come before it sleeps: long enough for threads that run. libgomp's own number
# is three hundred times that: beside busy processes a step on two threads took some fifty times as long as on one (docs/log.md).
SPIN, POLICY, SPINS = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "1000"

CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Grant:
    """What of the machine this process may use."""

    cpus: int  # by its affinity, to which a cpuset belongs
    physical: int  # cores among them: two CPUs of one core share its arithmetic
    quota: float | None  # cores' worth of time, by the tightest control group; None: no limit
    own: int | None  # MOEEXP_CORES: a user's, or a sweep's that runs several at once

    @property
    def cores(self) -> int:
        """For processes beside each other. Of 1.5 cores it is 1: two that spin would use the quota up and then be stopped."""
        limits = [self.cpus, *(limit for limit in (self.quota, self.own) if limit is not None)]
        return max(1, math.floor(min(limits)))

    @property
    def threads(self) -> int:
        """For threads that meet at barriers."""
        return min(self.cores, self.physical)

    def share(self, at_once: int) -> Grant:
        """Of one of so many runs beside each other."""
        return self if at_once == 1 else replace(self, own=max(1, self.cores // at_once))


@dataclass(frozen=True)
class Choice:
    number: int
    why: str


def granted() -> Grant:
    """`ValueError` for a MOEEXP_CORES that is no number."""
    found = cpus.usable()
    return Grant(len(found), physical_cores(found), cpu_quota(), _number(OWN))


def choose(wanted: Any, arch: Architecture, *, at_once: int = 1) -> Choice:
    """`wanted`: a config's `threads`. A number there wins over OMP_NUM_THREADS, and that over `auto`. `at_once`: runs that share
    what this process is granted."""
    if wanted != "auto":
        return Choice(wanted, f"threads={wanted}")
    given = _number(OPENMP)
    if given is not None:
        return Choice(given, f"{OPENMP}={given}")
    work = arch.weights_per_token
    fed = max(1, work // WEIGHTS_PER_THREAD)
    most = granted().share(at_once).threads if fed > 1 else 1
    limit = f"; this process is granted {most}" if fed > most else ""
    return Choice(min(fed, most), f"auto: one per {WEIGHTS_PER_THREAD:,} of the {work:,} weights that a token multiplies{limit}")


def prepare() -> None:
    """Before anything imports torch, whose threading library reads it once. What the user has set stays."""
    if "torch" not in sys.modules and not {SPIN, POLICY} & os.environ.keys():
        os.environ[SPIN] = SPINS


def apply(choice: Choice, device: str) -> None:
    """In this process, before it computes or compiles."""
    import torch

    torch.set_num_threads(choice.number)
    os.environ |= with_compilers(os.environ, device)


def with_compilers(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """And how many compilers work beside each other: those of Triton's kernels, of which a CPU has none. torch counts CPUs for
    them, whatever the quota. A number of the user's stays."""
    return {COMPILERS: str(granted().cores if device == "cuda" else 1), **environment}


def describe(choice: Choice) -> dict[str, Any]:
    """For a record's `environment.cpu`."""
    grant, waiting = granted(), {name: os.environ[name] for name in (SPIN, POLICY) if name in os.environ}
    return {"granted_cores": grant.cores, "quota": grant.quota, "threads_from": choice.why, "waiting": waiting}


def physical_cores(numbers: list[int], folder: Path = CPUS) -> int:
    """Cores that hold these CPUs (psutil counts those of the machine); all are cores of their own where Linux does not tell."""
    siblings = [
        control_groups.text_of(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list") or f"cpu{cpu}" for cpu in numbers
    ]
    return len(set(siblings))


def cpu_quota(folder: Path = control_groups.PROCESS) -> float | None:
    """Cores' worth of CPU time that the control groups of this process allow, those around its own included; None without a
    limit. `folder`: that of the process in /proc."""
    limits = map(_limit, control_groups.of_process("cpu", folder))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> float | None:
    """Version 2 says `quota period` or `max period`, version 1 has a file each and -1 for no limit."""
    quota, period = (control_groups.text_of(group / "cpu.max").split() or [""])[0], "100000"
    if quota:
        period = control_groups.text_of(group / "cpu.max").split()[1]
    else:
        quota, period = control_groups.text_of(group / "cpu.cfs_quota_us"), control_groups.text_of(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and int(quota) and period.isdigit() else None


def _number(variable: str) -> int | None:
    """OMP_NUM_THREADS may be a list, one number for each level of nested regions; the first is for ours."""
    text = os.environ.get(variable, "").split(",")[0].strip()
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise ValueError(f"{variable}={os.environ[variable]} is not a number of 1 to {MOST}: set one, or unset it")
    return int(text)
