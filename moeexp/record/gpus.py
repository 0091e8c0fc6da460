"""The GPUs of this machine, seen without CUDA: a sweep's parent must not hold a context on them.

Names and ids come from the driver, as torch's do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pynvml
from moeexp_runner import nvml


@dataclass(frozen=True)
class Gpu:
    """`id` is what CUDA_VISIBLE_DEVICES takes."""

    index: int
    id: str
    name: str


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that a process started now could use, in its order: torch built with CUDA, driver there, not hidden by
    CUDA_VISIBLE_DEVICES."""
    import torch

    if torch.version.cuda is None:
        return []
    try:
        gpus = nvml.ask(_of_the_machine)
    except RuntimeError:
        return _ask_torch()
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return gpus
    return _ask_torch() if "MIG-" in shown else _selected(gpus, shown)  # that list has no parts of GPUs


def _of_the_machine() -> list[Gpu]:
    handles = enumerate(map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())))
    return [Gpu(index, pynvml.nvmlDeviceGetUUID(gpu), pynvml.nvmlDeviceGetName(gpu)) for index, gpu in handles]


def _selected(gpus: list[Gpu], shown: str) -> list[Gpu]:
    """As CUDA reads the variable: indices or ids (which may be shortened), up to the first that does not exist."""
    chosen = []
    for position, token in enumerate(filter(None, (part.strip() for part in shown.split(",")))):
        matches = [gpu for gpu in gpus if token == str(gpu.index) or (len(token) > 4 and gpu.id.startswith(token))]
        if not matches:
            break
        chosen.append(Gpu(position, matches[0].id, matches[0].name))
    return chosen


def _ask_torch() -> list[Gpu]:
    """In a process of its own, where NVML does not tell."""
    code = (
        "import torch\n"
        "if torch.cuda.is_available():\n"
        "    for i in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(i))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    shown = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    names = done.stdout.splitlines()
    return [Gpu(i, shown[i] if i < len(shown) else str(i), name) for i, name in enumerate(names)]


def choose(gpus: list[Gpu], wanted: Any) -> list[Gpu]:
    """The GPUs that `launcher.gpus` names: a number, `all`, or a list of indices. `ValueError` for one that is not
    there. Without GPUs any number and `all` give none: such a sweep runs on the CPU, one run after the other."""
    if wanted == "all" or (_is_count(wanted) and not gpus):
        return gpus
    if _is_count(wanted):
        if wanted > len(gpus):
            raise ValueError(f"launcher.gpus={wanted}, and this machine shows {len(gpus)}: use at most that, or all")
        return gpus[:wanted]
    if not isinstance(wanted, list) or not wanted or not all(type(index) is int for index in wanted):
        raise ValueError(f"launcher.gpus={wanted} is not a number of 1 or more, all, or a list of indices like [0,2]")
    known = {gpu.index: gpu for gpu in gpus}
    for index in wanted:
        if index not in known or wanted.count(index) > 1:
            why = "is named twice" if index in known else "is not there"
            raise ValueError(f"launcher.gpus={wanted}: GPU {index} {why}; this machine shows {sorted(known)}")
    return [known[index] for index in wanted]


def others_on(gpu_id: str, *, own: int) -> int | None:
    """Compute processes on a GPU beyond the `own` of the caller; None where the driver does not tell (it lists none
    while the caller has a context there). They are counted, since in a container their ids say nothing."""
    try:
        found = nvml.ask(lambda: len(_contexts(gpu_id)))
    except RuntimeError:
        return None
    return None if found < own else found - own


def _contexts(gpu_id: str) -> list[Any]:
    return pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(gpu_id))


def _is_count(wanted: Any) -> bool:
    return type(wanted) is int and wanted >= 1
