"""The methods of a model: `prefill` and `decode` as modules, exported with torch.export, compiled with AOTInductor."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .model import Ops, Qwen35MoE

METHODS = ("prefill", "decode")

# All compile-time switches of Inductor, set here alone and recorded with every artifact.
INDUCTOR_CONFIG = {
    # Weights are bound at load time, so that methods share them and a package is small.
    "aot_inductor.package_constants_in_so": False,
    # The wrapper only launches kernels: optimising it costs minutes of g++ and gains nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


class Prefill(nn.Module):
    """(tokens [B, T], positions [B], logit_positions [n]) int64 -> logits [B, n, V]."""

    def __init__(self, model: Qwen35MoE, ops: Ops):
        super().__init__()
        self.model, self.ops = model, ops

    def forward(self, tokens: Tensor, positions: Tensor, logit_positions: Tensor) -> Tensor:
        return self.model(tokens, positions, logit_positions, ops=self.ops, phase="prefill")


class Decode(nn.Module):
    """(token [B, 1], positions [B]) int64 -> logits [B, 1, V]."""

    def __init__(self, model: Qwen35MoE, ops: Ops):
        super().__init__()
        self.model, self.ops = model, ops

    def forward(self, token: Tensor, positions: Tensor) -> Tensor:
        return self.model(token, positions, None, ops=self.ops, phase="decode")


MODULES = {"prefill": Prefill, "decode": Decode}


def example_inputs(method: str, *, batch: int, device: torch.device) -> tuple[Tensor, ...]:
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    if method == "decode":
        return torch.zeros(batch, 1, dtype=torch.int64, device=device), positions
    # Neither T nor n may equal 1 or each other here: export would take that for a law.
    tokens = torch.zeros(batch, 7, dtype=torch.int64, device=device)
    return tokens, positions, torch.arange(3, dtype=torch.int64, device=device)


def export_method(method: str, model: Qwen35MoE, ops: Ops, *, batch: int, max_seq_len: int) -> ExportedProgram:
    """`model` has its state attached. Buffers keep their names (`model.layers.0.…`) in every method."""
    module = MODULES[method](model, ops).eval()
    inputs = example_inputs(method, batch=batch, device=model.norm.device)
    shapes = None
    if method == "prefill":
        tokens = Dim("T", min=1, max=max_seq_len)
        shapes = {"tokens": {1: tokens}, "positions": None, "logit_positions": {0: Dim("n", min=1, max=max_seq_len)}}
    with torch.no_grad(), _sizes_may_be_one():
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def compile_method(program: ExportedProgram, path: Path) -> None:
    """Writes an AOTInductor package without weights to `path` (.pt2)."""
    from torch._inductor import aoti_compile_and_package

    with torch.no_grad(), _sizes_may_be_one(), warnings.catch_warnings():
        # torch's own, about its own pytrees; nothing that a user could act on.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(INDUCTOR_CONFIG))


@contextlib.contextmanager
def _sizes_may_be_one() -> Iterator[None]:
    """Lets a dynamic dimension of size 1 through export: a one-token prompt is a prompt."""
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    _config.backed_size_oblivious = True
    try:
        yield
    finally:
        _config.backed_size_oblivious = before
