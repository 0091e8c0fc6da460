"""What a run ran on: versions, machine, GPU and its state, source revision. No host or user name."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from moeexp import __version__
from moeexp.record.gpus import nvidia_smi

DISTRIBUTIONS = ("torch", "triton", "transformers", "hqq", "safetensors", "hydra-core", "wandb", "numpy")

# nvidia-smi's field -> our key; all but the uuid are numbers.
GPU_STATE = {
    "uuid": "uuid",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
    "memory.used": "memory_used_mib",
}


def collect(device: str, threads: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `environment` of a record; `device` is `cpu` or `cuda`, `threads` what `threads.describe` says of a run's. `gpu_after`
    is filled in when the run has ended."""
    import torch

    cpu = {"name": cpu_name(), "cores": cores(), "torch_threads": torch.get_num_threads()}
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
    """Clocks, power and temperature of the GPU that torch calls 0; {"error": why} where nvidia-smi does not tell."""
    import torch

    try:
        rows = nvidia_smi(*GPU_STATE)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"nvidia-smi: {error}"}
    wanted = str(torch.cuda.get_device_properties(0).uuid)
    for row in rows:
        if row["uuid"].removeprefix("GPU-") == wanted:
            return {key: _number(row[field]) for field, key in GPU_STATE.items() if key != "uuid"}
    return {"error": f"nvidia-smi lists no GPU {wanted}"}


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
        return nvidia_smi("driver_version")[0]["driver_version"]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown (nvidia-smi: {error})"


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


def _number(text: str) -> float | None:
    """None for nvidia-smi's `[N/A]` and the like."""
    try:
        return float(text)
    except ValueError:
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


def cores() -> int | None:
    """Those this process may use, where the system tells (Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
