"""Activations of a row as the integers that a GEMV multiplies (`int_dot.py`), made once by a kernel that runs anyway, so that the
hundreds of programs of a GEMV need not each make them.

A packed row for a quantised FORMAT, int32; P is 4 for int4 and 2 for int8, words and vectors (VECTORS = WORDS / VECTOR) are
those of the weights:

    for each limb:  pairs [P, WORDS] | totals [VECTORS]
    then:           units float32 [VECTORS] | r, the norm's factor | the shared expert's share | 2 words of padding

The last two are float32 as well. What stands for the padding of a row to WORDS is neither written nor read. Who reads a row:
`warp_rows.py`. PACKED: its length, 0 where none is packed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from moeexp_kernels.parts.int_dot import features_of_words, int16_limbs, load_norm, stored_features
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, VECTOR, WORDS

SMALLEST_GROUP = 32


def packable(*, bits: int, group: int) -> bool:
    """Whether rows for weights of `bits` in groups of `group` can be packed, a program for each group."""
    return bits in (4, 8) and group >= SMALLEST_GROUP and group & (group - 1) == 0


def packed_format(*, bits: int, group: int, features: int) -> tuple[int, ...]:
    """FORMAT (`matrix.py`) of the matrices that a row of so many features is packed for, but for their rows: 1."""
    words = features * bits // 32
    return 1, features, bits, group, triton.next_power_of_2(words), math.gcd(4, group * bits // 32), False


def packed_length(form: tuple[int, ...], dtype: torch.dtype) -> int:
    """PACKED for rows of `dtype` and matrices of FORMAT `form`: int32 words."""
    words, vectors = form[4], form[4] // form[5]
    return int16_limbs(dtype) * ({4: 4, 8: 2}[form[2]] * words + vectors) + vectors + 4


def of_one_group(form: tuple[int, ...]) -> tuple[int, ...]:
    """The FORMAT of a matrix whose rows are one group of those of `form`."""
    rows, _, bits, group, _, vector, float16 = form
    return rows, group, bits, group, group * bits // 32, vector, float16


@triton.jit
def pack_group(
    x_ptr, norm_ptr, packed_ptr, group, FORMAT: tl.constexpr, PART: tl.constexpr, LIMBS: tl.constexpr
):  # fmt: skip
    """Packs one group of the row at x_ptr, times 1 + norm; PART: `of_one_group` of FORMAT. x is older than the kernel before
    this one; past L1, which may hold what lay there in another layer."""
    PAIRS: tl.constexpr = 4 if FORMAT[BITS] == 4 else 2
    first = group * FORMAT[GROUP]
    norm = load_norm(norm_ptr + first, True, PART)
    k = first + stored_features(PART)
    low = tl.load(x_ptr + k, cache_modifier=".cg").to(tl.float32) * norm[0]
    high = low
    if FORMAT[BITS] == 4:
        high = tl.load(x_ptr + k + FORMAT[GROUP] // 2, cache_modifier=".cg").to(tl.float32) * norm[1]
    features = features_of_words(low, high, PART, LIMBS)
    word = group * PART[WORDS] + tl.arange(0, PART[WORDS])
    vector = group * (PART[WORDS] // PART[VECTOR]) + tl.arange(0, PART[WORDS] // PART[VECTOR])
    for limb in tl.static_range(LIMBS):
        pairs, total = features[1 + limb]
        for pair in tl.static_range(PAIRS):
            tl.store(packed_ptr + pair * FORMAT[WORDS] + word, pairs[pair])
        tl.store(packed_ptr + PAIRS * FORMAT[WORDS] + vector, total)
        packed_ptr += PAIRS * FORMAT[WORDS] + FORMAT[WORDS] // FORMAT[VECTOR]
    tl.store(packed_ptr + vector, features[0].to(tl.int32, bitcast=True))


@triton.jit
def pack_factor(
    x_ptr, norm_ptr, gate_ptr, packed_ptr, IS_SHARE: tl.constexpr, EPS: tl.constexpr, FORMAT: tl.constexpr,
    PACKED: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Stores r = 1 / rms of the row x at x_ptr, or with IS_SHARE the shared expert's share, sigmoid(gate @ norm(x)). Each warp
    sums the row by itself, in an order that does not depend on how many there are: tensors [W, C, K] as in `choice.py`."""
    padded: tl.constexpr = FORMAT[WORDS] * 32 // FORMAT[BITS]  # FEATURES, rounded up to a power of 2, as WORDS is
    chunk: tl.constexpr = min(padded, 128)  # 32 lanes load four each
    i, warp = tl.arange(0, chunk), tl.arange(0, WARPS) * 0
    k = (tl.arange(0, padded // chunk) * chunk)[None, :, None] + (i // 4 * 4 + i % 4)[None, None, :] + warp[:, None, None]
    mask = k < FORMAT[FEATURES]
    x = tl.load(x_ptr + k, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=1) / FORMAT[FEATURES] + EPS)
    if IS_SHARE:
        x *= 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + k, mask=mask, other=0.0).to(tl.float32)
        factor = tl.sigmoid(factor * tl.sum(tl.sum(x * gate, axis=1), axis=1))
    tl.store(packed_ptr + PACKED - 4 + IS_SHARE + warp, factor.to(tl.int32, bitcast=True))
