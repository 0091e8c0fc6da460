"""Triton launches inside a CUDA-graph capture under torch's cudaMallocAsync backend.

Triton's launcher asks the driver about the pointer of each tensor. Memory that cudaMallocAsync hands out during a capture
becomes a node of the graph, of which the driver knows nothing before the graph runs; the launcher then says "cannot be
accessed from Triton (cpu tensor?)". Integers it takes as they are, and a tensor's address is what it would have passed on.
Source: `cuPointerGetAttribute`, and "Graph Memory Nodes" of the CUDA programming guide.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def by_address(launcher: type) -> None:
    """From now on a launcher of this class (Triton's for CUDA: `CudaLauncher`) gets addresses in place of tensors. Twice is
    as good as once."""
    call = launcher.__call__
    if getattr(call, "by_address", False):
        return

    @functools.wraps(call)
    def launch(self: Any, *arguments: Any) -> Any:
        return call(self, *(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments))

    launch.by_address = True  # type: ignore[attr-defined]
    launcher.__call__ = launch  # type: ignore[method-assign]


def launch_by_address() -> None:
    """`by_address` for Triton's own launcher of CUDA kernels, and for what torch.compile makes of them."""
    from torch._inductor import config
    from triton.backends.nvidia.driver import CudaLauncher

    by_address(CudaLauncher)
    # Inductor's own launcher asks the driver in the same way, from C++.
    config.use_static_cuda_launcher = False
