"""A linear layer of very many rows: the weight is dequantised into memory, then multiplied by torch's own matrix product.

Shape letters and weight formats: `linear.py`. With thousands of rows a weight is used so often that writing it out costs less
than what the vendor's product of two plain matrices gains over one that dequantises in registers. The dequantised weight lives as
long as the call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.gemm import widened
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int_dot import unpack_scales


@triton.jit
def dequantise_kernel(
    w_ptr, s_ptr, y_ptr, groups, GROUP: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = the weights of BLOCK groups, rounded once. COLUMNS: stored bytes of a group, rounded up to a power of 2."""
    stored: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    there = group < groups
    mask = there[:, None] & (column < stored)[None, :]
    q = tl.load(w_ptr + group[:, None] * stored + column[None, :], mask=mask, other=0)
    scale, shift = unpack_scales(tl.load(s_ptr.to(tl.pointer_type(tl.int32)) + group[:, None], mask=there[:, None], other=0))
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    place = y_ptr + group[:, None] * GROUP + column[None, :]
    tl.store(place, widened(q, scale, shift, False, dtype, BITS, FAST), mask=mask)
    if BITS == 4:
        tl.store(place + stored, widened(q, scale, shift, True, dtype, BITS, FAST), mask=mask)


def dequantised(*, weight: Tensor, scales: Tensor | None, features: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """weight [N, K] in dtype; a plain weight of that dtype is returned as it is."""
    if scales is None:
        return weight.to(dtype)
    out_features = weight.shape[0]
    y = torch.empty((out_features, features), dtype=dtype, device=weight.device)
    config = tuning.lookup("dequantise", tuning.weight_class(bits), tuning.architecture(weight.device))
    groups, stored = out_features * features // group, group // 2 if bits == 4 else group
    wrap_triton(dequantise_kernel)[(triton.cdiv(groups, config["BLOCK"]),)](
        weight, scales, y, groups, GROUP=group, BITS=bits, COLUMNS=triton.next_power_of_2(stored), FAST=weight.is_cuda, **config
    )
    return y


def matmul(
    *, x: Tensor, weight: Tensor, scales: Tensor | None, residual: Tensor | None, bits: int, group: int
) -> Tensor:  # fmt: skip
    """[M, N] = residual + x [M, K] @ weight.T in x's dtype; all flat and checked."""
    wide = dequantised(weight=weight, scales=scales, features=x.shape[1], bits=bits, group=group, dtype=x.dtype).t()
    return torch.mm(x, wide) if residual is None else torch.addmm(residual, x, wide)
