"""One thing to measure: an op at one shape, its inputs in as many cold copies as it takes, and its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeexp_kernels.parts.deviation import compare_rows

# RMSE ratio that an op may deviate from its reference in bfloat16; a single row ten times that. Decode: one rounding on each
# side, 1.7e-3 each. Prefill: also rounded operands of the tensor cores and, between kernels, rounded activations.
DECODE_TOLERANCE, PREFILL_TOLERANCE = 4e-3, 1e-2
Result = tuple[str, float, float, float]  # name, RMSE ratio, its tolerance, worst position's ratio


@dataclass
class Case:
    op: str
    shape: str
    phase: str  # "decode": `tokens` sequences of one token; "prefill": one sequence of `tokens`
    tokens: int
    call: Callable[..., Any]
    reference: Callable[..., Any]
    copies: list[dict]  # keyword arguments of one call each
    moved: int  # bytes that one call must read and write
    tolerance: float
    flops: int = 0
    mutated: tuple[str, ...] = ()  # arguments that the op updates in place, compared as well
    compare: Callable[[tuple, tuple], list[Result]] | None = None  # instead of `ratios`
    tuned: tuple[tuple[str, str], ...] = ()  # (op, key) of the tuning table that it runs with
    info: dict = field(default_factory=dict)  # what peers need to know

    def check(self) -> list[Result]:
        """The op's outputs and updated arguments against the reference's, on copies of the first call's arguments."""
        results = []
        for function in (self.call, self.reference):
            arguments = {k: v.clone() if k in self.mutated else v for k, v in self.copies[0].items()}
            out = function(**arguments)
            out = out if isinstance(out, tuple) else (out,)
            results.append((*out, *(arguments[name] for name in self.mutated)))
        if self.compare is not None:
            return self.compare(*results)
        outputs = len(results[0]) - len(self.mutated)
        names = [f"output {i}" if outputs > 1 else "output" for i in range(outputs)] + list(self.mutated)
        return [ratios(name, one, other, self.tolerance) for name, one, other in zip(names, *results, strict=True)]


def ratios(name: str, actual: Tensor, reference: Tensor, tolerance: float) -> Result:
    """RMSE ratio and worst row's ratio; infinite where a value is not finite."""
    if actual.shape != reference.shape:
        return name, float("inf"), tolerance, float("inf")
    rows = compare_rows(actual, reference)
    return name, rows.ratio(), tolerance, rows.row_ratios().max().item()


def red(results: list[Result]) -> str | None:
    """What failed, in words; None where every tolerance holds."""
    for name, ratio, tolerance, worst in results:
        if not ratio <= tolerance or not worst <= 10 * tolerance:
            return f"{name}: RMSE ratio {ratio:.1e} (limit {tolerance:.0e}), worst row {worst:.1e} (limit {10 * tolerance:.0e})"
    return None


class SeededTensors:
    """Seeded random tensors, made where they will live. Weights stay within bfloat16, so that peers can hold them."""

    def __init__(self, device: str, seed: int = 0):
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.mul_(scale).to(dtype)

    def weight(self, *shape: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
        """(codes uint8 [..., N, K or K/2], scales float16 [..., N, K/group, 2]): weights of deviation about 1/sqrt(K)."""
        features = shape[-1]
        stored = features * bits // 8
        options: dict[str, Any] = {"generator": self.generator, "device": self.device}
        codes = torch.randint(0, 256, (*shape[:-1], stored), dtype=torch.uint8, **options)
        scales = torch.rand(*shape[:-1], features // group, 2, **options)
        scales[..., 0] = (0.5 + scales[..., 0]) * features**-0.5 / 2 ** (bits - 1)
        scales[..., 1] = (scales[..., 1] - 0.5) * 0.2 * features**-0.5
        return codes, scales.bfloat16().half()

    def choices(self, tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        """Uniform routing: ids int32 [tokens, k] distinct in a row, shares float32 [tokens, k] that sum to 1."""
        scores = torch.rand(tokens, experts, generator=self.generator, device=self.device)
        shares, ids = scores.topk(top_k, dim=-1)
        return ids.to(torch.int32), shares / shares.sum(-1, keepdim=True)


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def count_for(cold: int, size: int, at_most: int = 256) -> int:
    """How many copies of `size` bytes it takes to move more than `cold` bytes before the first comes up again."""
    return max(2, min(at_most, -(-cold // max(size, 1)) + 1))
