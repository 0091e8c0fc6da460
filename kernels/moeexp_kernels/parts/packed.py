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
from moeexp_kernels.parts.spread import turned

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


def lanes_filled(form: tuple[int, ...]) -> bool:
    """Whether half a row of FORMAT `form` gives each lane of a warp four features, as `lane_features` has them."""
    return form[4] * 16 // form[2] >= 128


@triton.jit
def load_group_norm(norm_ptr, group, FORMAT: tl.constexpr, PART: tl.constexpr):
    """1 + the norm's weights of one group, as `pack_group` takes them; PART: `of_one_group` of FORMAT."""
    return load_norm(norm_ptr + group * FORMAT[GROUP], True, PART)


@triton.jit
def pack_group(x_ptr, norm, packed_ptr, group, FORMAT: tl.constexpr, PART: tl.constexpr, LIMBS: tl.constexpr):
    """Packs one group of the row at x_ptr, times the norm of `load_group_norm`. x is older than the kernel before this one; past
    L1, which may hold what lay there in another layer."""
    PAIRS: tl.constexpr = 4 if FORMAT[BITS] == 4 else 2
    k = group * FORMAT[GROUP] + stored_features(PART)
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
def lane_features(FORMAT: tl.constexpr, WARPS: tl.constexpr):
    """0 .. FEATURES - 1, rounded up to a power of 2, as two halves of a row, each of chunks of which lanes have four features:
    [P, 2, C, K]. P: as often as gives each of WARPS a half, so that no half is shared."""
    half: tl.constexpr = FORMAT[WORDS] * 16 // FORMAT[BITS]  # of as many features as WORDS, which is a power of 2, can hold
    chunk: tl.constexpr = min(half, 128)
    i = tl.arange(0, chunk)
    first = (tl.arange(0, 2) * half)[:, None] + (tl.arange(0, half // chunk) * chunk)[None, :]
    k = first[:, :, None] + (i // 4 * 4 + i % 4)[None, None, :]
    return k[None, :, :, :] + (tl.arange(0, max(1, WARPS // 2)) * 0)[:, None, None, None]


@triton.jit
def sum_halves(x):
    """The sum of a row [P, 2, C, K], P times. A half is summed by one warp, whichever, so that the order does not depend on how
    many there are."""
    first, second = tl.split(tl.sum(tl.sum(x, axis=2), axis=2))
    return first + second


@triton.jit
def load_share_gate(norm_ptr, gate_ptr, FORMAT: tl.constexpr, WARPS: tl.constexpr):
    """The shared expert's gate times 1 + norm, as `pack_factors` takes it."""
    k = lane_features(FORMAT, WARPS)
    mask = k < FORMAT[FEATURES]
    k, mask = turned(k, True), turned(mask, True)
    norm = 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    return turned(norm * tl.load(gate_ptr + k, mask=mask, other=0.0).to(tl.float32), True)


@triton.jit
def pack_factors(
    x_ptr, gate, packed_ptr, EPS: tl.constexpr, FORMAT: tl.constexpr, PACKED: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Stores r = 1 / rms of the row x at x_ptr, and the shared expert's share, sigmoid(gate @ norm(x)), with the gate of
    `load_share_gate`, of a program of WARPS."""
    k = lane_features(FORMAT, WARPS)
    mask = turned(k < FORMAT[FEATURES], True)
    x = turned(tl.load(x_ptr + turned(k, True), mask=mask, other=0.0, cache_modifier=".cg"), True).to(tl.float32)
    r = 1.0 / tl.sqrt(sum_halves(x * x) / FORMAT[FEATURES] + EPS)
    share = tl.sigmoid(r * sum_halves(x * gate))
    again = tl.arange(0, max(1, WARPS // 2)) * 0
    tl.store(packed_ptr + PACKED - 4 + again, r.to(tl.int32, bitcast=True))
    tl.store(packed_ptr + PACKED - 3 + again, share.to(tl.int32, bitcast=True))
