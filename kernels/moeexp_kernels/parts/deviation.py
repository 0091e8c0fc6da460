"""How far a tensor is from its reference: as a whole, and row by row, as an aggregate hides one bad row.

"RMSE ratio" is rms(error) / rms(reference); a row's likewise, its denominator floored at FLOOR times the tensor's rms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.1  # a row that is nearly zero has no meaningful ratio, yet must not hide a large error


@dataclass(frozen=True)
class Rows:
    """Per row of a tensor, each of shape [rows...]: mean squares of error and reference (float64), largest error."""

    error: Tensor
    reference: Tensor
    max_abs: Tensor

    def ratio(self) -> float:
        return quotient(self.error.mean().sqrt(), self.reference.mean().sqrt())

    def row_ratios(self) -> Tensor:
        """Of each row; one that is not finite gives inf."""
        floored = self.reference.sqrt().clamp(min=FLOOR * self.reference.mean().sqrt().item())
        ratios = self.error.sqrt() / floored
        ratios = torch.where(self.error == 0, 0.0, ratios)  # 0/0: an all-zero row that is met exactly
        return ratios.nan_to_num(nan=math.inf, posinf=math.inf)


def quotient(value: Tensor | float, base: Tensor | float) -> float:
    """value / base; 0/0 is 0 (nothing is off), anything else that is not a number is inf (fails every tolerance)."""
    value, base = float(value), float(base)
    if value == 0 and not math.isnan(base):
        return 0.0
    if base == 0 or not math.isfinite(value) or not math.isfinite(base):
        return math.inf
    return value / base


def compare_rows(value: Tensor, reference: Tensor, row_dims: tuple[int, ...] | None = None) -> Rows:
    """`row_dims` are kept (by default all but the last), all others make up a row. Same shapes; `value` may be of another
    dtype or device."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    row_dims = tuple(range(reference.ndim - 1)) if row_dims is None else row_dims
    reference = reference.float()
    error = value.to(reference.device, torch.float32) - reference
    inner = [dim for dim in range(reference.ndim) if dim not in row_dims]
    assert inner, "a row needs at least one dimension"
    size = math.prod(reference.shape[dim] for dim in inner)

    def mean_square(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=inner, dtype=torch.float64).square() / size

    return Rows(mean_square(error), mean_square(reference), error.abs().amax(dim=inner))
