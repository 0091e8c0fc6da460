"""What a run ran on: versions, machine, GPU and its state, source revision. No host or user name."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pynvml
from moeexp_runner import nvml

from moeexp import __version__
from moeexp.record import cpus

DISTRIBUTIONS = ("torch", "triton", "transformers", "hqq", "safetensors", "hydra-core", "wandb", "numpy")

GPU_STATE = nvml.READINGS | {
    "power_limit_w": lambda gpu: pynvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1e3,
    # Of version 2, which does not count what the driver keeps for itself.
    "memory_used_mib": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu, pynvml.nvmlMemory_v2).used >> 20,
}


def collect(device: str, threads: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `environment` of a record; `device` is `cpu` or `cuda`, `threads` what `threads.describe` says of a run's. `gpu_after`
    is filled in when the run has ended."""
    import torch

    cpu = {"name": cpus.name(), "cores": len(cpus.usable()), "torch_threads": torch.get_num_threads()}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {"moeexp": __version__} | {name: version(name) for name in DISTRIBUTIONS},
        "cuda": torch.version.cuda,
        "cpu": cpu | (threads or {}),
        "gpu": _gpu() if device == "cuda" else None,
        "gpu_before": gpu_state() if device == "cuda" else None,
        "gpu_after": None,
        "git": git_state(Path(__file__).resolve().parents[1]),
    }


def gpu_state() -> dict[str, Any]:
    """Clocks, power and temperature of the GPU that torch calls 0, each None where that GPU does not tell; {"error": why}
    where the driver does not."""

    def read() -> dict[str, float | None]:
        gpu = nvml.handle_of(0)
        return {key: _reading(gpu, key) for key in GPU_STATE}

    try:
        return nvml.ask(read)
    except RuntimeError as error:
        return {"error": str(error)}


def git_state(package: Path) -> dict[str, Any] | None:
    """{sha, dirty} of the checkout that `package` is part of; None for an installed package, or without git."""
    root = package.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # A package in a virtual environment inside some checkout is not that checkout's code.
    if top is None or Path(top) != root:
        return None
    sha, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    return None if sha is None or changes is None else {"sha": sha, "dirty": bool(changes)}


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0)


def compute_capability(device: str) -> tuple[int, int] | None:
    """Of the GPU that torch calls current; None on a CPU."""
    import torch

    return torch.cuda.get_device_capability() if device == "cuda" else None


def driver() -> str:
    """NVIDIA's, or why it is not known. Asks no CUDA."""
    try:
        return nvml.ask(pynvml.nvmlSystemGetDriverVersion)
    except RuntimeError as error:
        return f"unknown ({error})"


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "driver": driver(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "multiprocessors": properties.multi_processor_count,
    }


def _reading(gpu: Any, key: str) -> float | None:
    try:
        return GPU_STATE[key](gpu)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_FunctionNotFound):
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
