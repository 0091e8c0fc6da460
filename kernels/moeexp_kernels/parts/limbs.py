"""Activations as signed 8-bit limbs, which is what int8 tensor cores multiply.

A quantisation group of a row has one float unit, its largest magnitude / 32,639, and 16-bit integers X_i = round(x_i / unit).
Each integer is two limbs, a high and a low signed byte:

    x_i = unit * X_i,   X_i = 256 * high_i + low_i,   high_i and low_i in -128 .. 127   (32,639 = 256 * 127 + 127)

so that sum_i q_i X_i = 256 * sum_i q_i high_i + sum_i q_i low_i, both sums exact in int32. 16 bits hold a group's
activations to 1.6e-5 of its largest, a hundred times finer than bfloat16 holds them. float32 activations take a third limb: it
holds what the integer leaves over, at most half a unit, in 1 / 254 of the unit, and so the activations to 6e-8 of the largest.

Memory: limbs int8 [M, LIMBS, K], units float32 [M, K / GROUP, 2]: a group's unit, and its sum of activations for the weights'
shift. An RMSNorm's factor 1 / rms multiplies both, so that who reads them need not know of the norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeexp_kernels.parts.checks import check_argument

LARGEST: tl.constexpr = tl.constexpr(32639.0)  # 256 * 127 + 127
FINER: tl.constexpr = tl.constexpr(254.0)  # units of the third limb in one of the integers: half of one is 127
TINY: tl.constexpr = tl.constexpr(1e-30)  # a group without larger values counts as zeros: LARGEST / TINY is a float32 still
# A float of this size has 1 as the unit of its last place, so that adding it rounds to an integer, to nearest even, which the
# low bits of the sum then hold.
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23
ROUND_BITS: tl.constexpr = tl.constexpr(0x4B400000)  # of that float: exponent 127 + 23, mantissa 2^22


def limbs_of(dtype: torch.dtype) -> int:
    """Limbs of an activation: two are finer than a 2-byte dtype, float32 takes three."""
    return 3 if dtype == torch.float32 else 2


def empty_limbs(*, rows: int, features: int, group: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised (limbs int8 [rows, LIMBS, features], units float32 [rows, features / group, 2])."""
    limbs = torch.empty((rows, limbs_of(dtype), features), dtype=torch.int8, device=device)
    return limbs, torch.empty((rows, features // group, 2), dtype=torch.float32, device=device)


def check_limbs(
    limbs: Tensor | None, units: Tensor | None, *, x: Tensor, group: int, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(limbs, units) of x [M, K] where they are given; `ValueError` for others than such."""
    if limbs is None or units is None:
        return None
    if norm_weight is not None:
        raise ValueError("limbs are of x as it is: they do not go with norm_weight")
    rows, features = x.shape
    check_argument(limbs, name="limbs", shape=(rows, limbs_of(x.dtype), features), dtypes=(torch.int8,))
    check_argument(units, name="units", shape=(rows, features // group, 2), dtypes=(torch.float32,))
    return limbs, units


@triton.jit
def integer_of(x):
    """round(x) of |x| < 2^22 as int32, and what is left over, float32."""
    rounded = x + ROUND
    return rounded.to(tl.int32, bitcast=True) - ROUND_BITS, x - (rounded - ROUND)


@triton.jit
def store_limbs(limbs_ptr, units_ptr, x, factor, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LIMBS: tl.constexpr):
    """Stores a row x [GROUPS, GROUP] float32, times `factor`, as limbs at limbs_ptr [LIMBS, K] and units at units_ptr
    [K / GROUP, 2]. GROUPS is rounded up to a power of 2; groups beyond the row are not stored.

    A feature that is not finite makes its group's unit NaN, and so every result of the row."""
    group = tl.arange(0, GROUPS)
    inside = group < K // GROUP
    offsets = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = tl.broadcast_to(inside[:, None], [GROUPS, GROUP])
    largest = tl.max(tl.abs(x), axis=1)
    poison = tl.sum(x * 0.0, axis=1)
    scale = tl.where(largest > TINY, LARGEST / tl.where(largest > TINY, largest, 1.0), 0.0)
    integer, rest = integer_of(x * scale[:, None])
    total = tl.sum(integer, axis=1).to(tl.float32)
    tl.store(limbs_ptr + offsets, ((integer + 128) >> 8).to(tl.int8), mask=mask)  # 128: as the low limb is signed
    tl.store(limbs_ptr + K + offsets, integer.to(tl.int8), mask=mask)
    if LIMBS == 3:
        integer, _ = integer_of(rest * FINER)
        total += tl.sum(integer, axis=1).to(tl.float32) * (1.0 / FINER)
        tl.store(limbs_ptr + 2 * K + offsets, integer.to(tl.int8), mask=mask)
    unit = factor * (largest * (1.0 / LARGEST) + poison)
    at = group[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(units_ptr + at, tl.join(unit, total * unit), mask=tl.broadcast_to(inside[:, None], [GROUPS, 2]))


@triton.jit
def store_part_limbs(
    limbs_ptr, units_ptr, x, row, first, K: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Stores features `first` .. of a row of K as limbs and units: x float32 [n * GROUP], a power of 2 of them, rounded to DTYPE
    already."""
    LIMBS: tl.constexpr = 3 if DTYPE == tl.float32 else 2  # as `limbs_of`
    groups: tl.constexpr = x.shape[0] // GROUP
    limbs_ptr += row * (LIMBS * K) + first
    units_ptr += row * (K // GROUP * 2) + first // GROUP * 2
    store_limbs(limbs_ptr, units_ptr, tl.reshape(x, [groups, GROUP]), 1.0, K, GROUP, groups, LIMBS)
