"""How much a device's last cache holds: what fits there is read again without memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPUS = Path("/sys/devices/system/cpu")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cache_bytes(device: torch.device) -> int | None:
    """Of a GPU its L2. Of a CPU the last level that it has, all of those together that serve the cores which this process
    may use. None where the system does not tell (Linux tells, as a rule)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    if not hasattr(os, "sched_getaffinity"):
        return None
    return of_cores(os.sched_getaffinity(0))


def of_cores(cores: set[int], folder: Path = CPUS) -> int | None:
    found: dict[tuple[int, str], int] = {}  # a cache by level and the cores that share it
    for core in cores:
        for cache in (folder / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, kind, shared, size = (
                    (cache / name).read_text().strip() for name in ("level", "type", "shared_cpu_list", "size")
                )
            except FileNotFoundError:  # some systems list a cache and do not tell all of it
                continue
            if kind != "Instruction" and size:
                found[int(level), shared] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
    last = max((level for level, _ in found), default=None)
    return None if last is None else sum(size for (level, _), size in found.items() if level == last)
