"""How far logits and expert choices are from their reference, without ever holding large copies.

Shape letters: B batch, S sequence, n positions of a slice, V vocabulary, L layers, E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from moeexp_kernels.parts.deviation import Rows, compare_rows
from torch import Tensor

# float32 elements of one slice of logits: a handful of temporaries of 64 MB each, whatever vocabulary and batch are.
SLICE_ELEMENTS = 2**24

Slicer = Callable[[int, int], Tensor]  # (start, stop) -> logits of these positions, [B, n, V]


@dataclass(frozen=True)
class LogitRows:
    """Comparison of logits, per position from `start` on; every tensor [B, n]."""

    rows: Rows
    kl: Tensor  # KL(reference || value), nats
    margin: Tensor  # how far value's argmax trails the reference's, in the reference, / sd of that position's logits
    same_argmax: Tensor  # bool


def compare_logits(value: Slicer, reference: Slicer, batch: int, start: int, stop: int, vocab: int) -> LogitRows:
    """Positions start..stop-1, in slices."""
    parts = []
    for first, last in slices(batch, start, stop, vocab):
        right = reference(first, last).float()
        left = value(first, last).to(right.device, torch.float32)
        rows = compare_rows(left, right, (0, 1))
        argmax = left.argmax(-1, keepdim=True)
        margin = (right.amax(-1) - right.gather(-1, argmax)[..., 0]) / right.std(-1)
        same = right.argmax(-1) == argmax[..., 0]
        left, right = torch.log_softmax(left, -1), torch.log_softmax(right, -1)
        kl = (right.exp() * (right - left)).sum(-1)
        parts.append((rows.error, rows.reference, rows.max_abs, kl, margin, same))
    error, square, max_abs, kl, margin, same = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return LogitRows(Rows(error, square, max_abs), kl, margin, same)


def slices(batch: int, start: int, stop: int, vocab: int) -> list[tuple[int, int]]:
    """Ranges of positions of at most SLICE_ELEMENTS logits each (one position at least)."""
    step = max(1, SLICE_ELEMENTS // (batch * vocab))
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def choice_gaps(choices: Tensor, router_logits: Tensor) -> Tensor:
    """One layer: choices [B, S, k], the reference's router_logits [B, S, E] -> gap [B, S], 0 where they agree.

    Both sides of a swap count: how far the worst chosen expert lies below the reference's k-th best, and how far the
    best expert left out lies above its k+1-th best. (Only the first would let a path drop the best expert for the
    k+1-th wherever that one is nearly tied with the k-th.)
    """
    k, experts = choices.shape[-1], router_logits.shape[-1]
    best = router_logits.topk(min(k + 1, experts), dim=-1).values
    chosen = router_logits.gather(-1, choices.to(router_logits.device, torch.int64))
    gap = best[..., k - 1] - chosen.amin(-1)
    if experts > k:
        left_out = router_logits.scatter(-1, choices.to(router_logits.device, torch.int64), -math.inf).amax(-1)
        gap = torch.maximum(gap, left_out - best[..., k])
    return gap.clamp(min=0)  # keeps NaN


def count_not_finite(tensor: Tensor) -> int:
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))
