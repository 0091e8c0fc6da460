"""The CPUs that this process may use, and what they are."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

# Inductor compiles for the very CPU that it runs on.
INSTRUCTION_SETS = re.compile(r"^(sse|ssse|avx|fma|bmi|f16c|amx|vaes|vpclmul|pclmul|gfni|adx|sha_ni|movbe|popcnt|aes|abm)")


def usable() -> list[int]:
    """Their numbers: by the affinity, to which a cpuset belongs; all of the machine's where the system knows no affinity."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def name() -> str:
    return _told("model name") or platform.processor()


def flags() -> list[str]:
    """Instruction sets and the like; none where Linux does not tell."""
    return _told("flags", "Features").split()


def instruction_sets() -> list[str]:
    return sorted(filter(INSTRUCTION_SETS.match, flags()))


def _told(*names: str) -> str:
    """Of the first CPU, under one of these names; psutil tells neither."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
