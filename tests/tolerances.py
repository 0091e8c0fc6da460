"""How far an op may be from its float32 reference: one table, a reason a row.

A number is the RMSE ratio, rms(error) / rms(reference); the worst row may have ten times that. Two columns for bfloat16: a
GPU rounds to nearest (rms error 1.7e-3 of a value), Triton's interpreter cuts, which is twice that, and biased.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ON_GPU = torch.cuda.is_available()


class Tolerance(NamedTuple):
    single: float
    half_on_gpu: float
    half_interpreted: float
    reason: str


TOLERANCES = {
    "one rounding": Tolerance(1e-5, 3e-3, 7e-3, "sums in another order; the result is rounded once"),
    "gdn decode": Tolerance(1e-5, 3e-3, 8e-3, "as one rounding; the conv state holds cut values in the interpreter"),
    "gdn prefill": Tolerance(1e-5, 6e-3, 2e-2, "q, k, v, the chunk's matrices and the state as operand are rounded too"),
    "gemm": Tolerance(1e-5, 4e-3, 7e-3, "normed activations and dequantised weights are rounded for the tensor cores"),
    "moe decode": Tolerance(1e-5, 3e-3, 1.4e-2, "activations between the two kernels stay float32; interpreted, two cuts show"),
    "moe prefill": Tolerance(1e-5, 6e-3, 1.4e-2, "normed rows, weights, activations and each expert's result are rounded"),
}  # fmt: skip
FLOAT16 = 1e-3  # eight times as fine as bfloat16; the interpreter rounds it as a GPU does


def tolerance(name: str) -> dict[torch.dtype, float]:
    """dtype of the activations -> RMSE ratio allowed here."""
    tolerance = TOLERANCES[name]
    half = tolerance.half_on_gpu if ON_GPU else tolerance.half_interpreted
    return {torch.float32: tolerance.single, torch.bfloat16: half, torch.float16: FLOAT16}
