"""What a run held in memory."""

from __future__ import annotations

import resource
import sys

import torch

from moeexp.stack.factory import Stack

GIB = 2.0**30


def memory(stack: Stack) -> dict[str, float]:
    """The record's `memory_gib`."""
    seen: dict[int, int] = {}
    for buffer in stack.model.buffers():
        seen[buffer.data_ptr()] = buffer.nbytes
    known = {"weights": sum(seen.values()) / GIB, "state": stack.arena.nbytes() / GIB}
    return {name: round(value, 5) for name, value in known.items()} | peaks(stack.device)


def peaks(device: torch.device) -> dict[str, float]:
    """Of this process until now, in GiB. device_in_use: the most of the GPU's memory at one time, as the driver counts it now
    and torch's own share at its peak; contexts, this process's and others', are in it."""
    memory: dict[str, float] = {}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        reserved, most = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        memory |= {
            "peak_allocated": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved": most / GIB,
            "device_in_use": (total - free - reserved + most) / GIB,
        }
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    memory["peak_host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return {name: round(value, 5) for name, value in memory.items()}
