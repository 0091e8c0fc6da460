"""Memory that a device has left for a run, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import pynvml
from moeexp_runner import nvml

from moeexp.record import control_groups
from moeexp.record.gpus import Gpu, visible_gpus


def of_device(device: str) -> int | None:
    """For this process, on the cpu or its first GPU. Of a GPU with what an earlier run of this process has given back to torch,
    and torch not to others."""
    if device == "cpu":
        return of_host()
    import torch

    free = of_gpus(visible_gpus()[:1])
    return None if free is None else free + (torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0)


def for_tensors() -> int | None:
    """What new tensors of this process can have of its first GPU: of what torch holds, only what no tensor does. None as of
    `of_gpus`."""
    import torch

    free = of_device("cuda")
    return None if free is None else free - torch.cuda.memory_allocated()


def of_gpus(gpus: Sequence[Gpu]) -> int | None:
    """Of the one that has most: what fits nowhere else may fit there. None where the driver does not tell (of a part of a GPU,
    for example)."""
    try:
        return nvml.ask(lambda: max(map(_free, gpus), default=None))
    except RuntimeError:
        return None


def _free(gpu: Gpu) -> int:
    return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(gpu.id)).free


def of_host(process: Path = control_groups.PROCESS) -> int:
    """What can be had without swapping: a run that decodes from swap measures a disk. By the machine, and by the control
    groups of the process that the folder in /proc is of."""
    limits = map(_left, control_groups.of_process("memory", process))
    return min([psutil.virtual_memory().available, *(left for left in limits if left is not None)])


def _left(group: Path) -> int | None:
    """Of a group's limit; files that it has read count as used there, and give way. None without a limit."""
    for limit, used, files in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        most, now = (control_groups.text_of(group / name) for name in (limit, used))
        if most.isdigit():
            counts = dict(line.split() for line in control_groups.text_of(group / "memory.stat").splitlines())
            return max(0, int(most) - int(now or 0) + sum(int(counts.get(name, 0)) for name in files))
    return None
