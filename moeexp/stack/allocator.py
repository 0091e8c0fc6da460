"""Which CUDA allocator torch uses. torch reads that from the environment once, when its CUDA library is loaded."""

from __future__ import annotations

import os
import sys
from typing import Any

from moeexp.config.schema import Config

# `allocator` -> torch's name of the backend.
BACKENDS = {"native": "native", "cuda_malloc_async": "cudaMallocAsync"}
# Both are read; which one wins where both are set has changed between releases.
VARIABLE, GENERAL = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def environment_of(allocator: str) -> dict[str, str]:
    """What the environment of a process needs *before it imports torch* so that it gets this allocator, for whoever starts
    processes. What the variables say about other things is kept; empty where the default will do."""
    present = {name: os.environ[name] for name in (VARIABLE, GENERAL) if name in os.environ}
    if allocator == "native" and not any("backend:" in value for value in present.values()):
        return {}
    settings = {}
    for name, value in {VARIABLE: "", **present}.items():
        kept = [part for part in value.split(",") if part.strip() and not part.strip().startswith("backend:")]
        settings[name] = ",".join([f"backend:{BACKENDS[allocator]}", *kept])
    return settings


def described(allocator: str) -> dict[str, Any]:
    """The backend of a process with this allocator, and what the environment says about anything else of it."""
    values = [os.environ.get(name, "") for name in (VARIABLE, GENERAL)]
    parts = {part.strip() for value in values for part in value.split(",")}
    settings = sorted(part for part in parts if part and not part.startswith("backend:"))
    return {"backend": BACKENDS[allocator], "settings": settings}


def prepare(cfg: Config) -> None:
    """The one place where a run chooses its allocator: at its start, before anything imports torch. Does nothing where
    torch is loaded already; `check` then says whether that matters."""
    if "torch" not in sys.modules:
        os.environ.update(environment_of(cfg.allocator))


def check(cfg: Config) -> None:
    """`RuntimeError` unless this process has the allocator that a resolved config asks for: it cannot be changed now.
    Makes Triton's launches fit it."""
    import torch

    if cfg.device != "cuda":
        return
    found, wanted = torch.cuda.get_allocator_backend(), BACKENDS[cfg.allocator]
    if found != wanted:
        needed = " ".join(f"{name}={value}" for name, value in environment_of(cfg.allocator).items())
        raise RuntimeError(
            f"allocator={cfg.allocator} needs torch's backend {wanted}, and this process started with {found}, which "
            f"cannot be changed: run it in a process of its own ({needed or 'the default environment'})"
        )
    if cfg.allocator == "cuda_malloc_async":
        from moeexp_kernels.parts.launch import launch_by_address

        launch_by_address()
