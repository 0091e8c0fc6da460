"""A GEMV on packed activations (`packed.py`) in which a warp has rows of its own: it reads a row whole and sums it alone.

Nothing goes from warp to warp, so that no barrier stands between the loads and the sums. A program is of several such warps,
because an H100 starts some 600 programs in a microsecond, however small they are.

Of the tensors here the dimensions are: W warps, C chunks of a row, each what 32 lanes load at once, R rows of a warp, K words of
a chunk, V vectors of a chunk. The compiler spreads what it loads over lanes by the dimension with contiguous addresses, then over
warps by the first; without one, over lanes by the first and warps by the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeexp_kernels.parts.int_dot import integer_products
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, VECTOR, WORDS
from moeexp_kernels.parts.spread import turned

# SPREAD: how a program's rows lie over its warps, by these names.
CHUNK: tl.constexpr = tl.constexpr(0)  # words of a chunk
EACH: tl.constexpr = tl.constexpr(1)  # rows of a warp
WARPS: tl.constexpr = tl.constexpr(2)
BY_EXPERT: tl.constexpr = tl.constexpr(3)  # whether the programs of several experts go in the order of these
WHOLE: tl.constexpr = tl.constexpr(4)  # whether every program has all its rows: what is masked costs an instruction a load


def spread_of(
    form: tuple[int, ...], *, each: int, warps: int, by_expert: bool = False, whole: bool = False
) -> tuple[int, ...]:  # fmt: skip
    """SPREAD for rows of FORMAT `form` (`matrix.py`)."""
    return min(form[4], 32 * form[5]), each, warps, int(by_expert), int(whole)


@triton.jit
def chunk_words(FORMAT: tl.constexpr, SPREAD: tl.constexpr):
    """Word of the row, [C, K], written so that the compiler sees no runs longer than VECTOR."""
    i = tl.arange(0, SPREAD[CHUNK])
    word = (i // FORMAT[VECTOR]) * FORMAT[VECTOR] + i % FORMAT[VECTOR]
    return tl.arange(0, FORMAT[WORDS] // SPREAD[CHUNK])[:, None] * SPREAD[CHUNK] + word[None, :]


@triton.jit
def chunk_vectors(FORMAT: tl.constexpr, SPREAD: tl.constexpr):
    """Vector of the row, [V, C], of which the compiler sees no runs."""
    each: tl.constexpr = SPREAD[CHUNK] // FORMAT[VECTOR]
    return (tl.arange(0, each) * 2 // 2)[:, None] + tl.arange(0, FORMAT[WORDS] // SPREAD[CHUNK])[None, :] * each


@triton.jit
def load_warp_rows(
    w_ptr, s_ptr, row, base, limit, FORMAT: tl.constexpr, SPREAD: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """Rows `row` [W, R] of the matrix that begins `base` rows behind w_ptr, [W, 1] or a number, those below `limit`: words int32
    [W, C, R, K], pairs [W, C, R, V]."""
    width: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32
    groups: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
    word = chunk_words(FORMAT, SPREAD)[None, :, None, :]
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32)) + ((row + base) * width)[:, None, :, None] + word
    group = (chunk_vectors(FORMAT, SPREAD) * FORMAT[VECTOR] // (FORMAT[GROUP] * FORMAT[BITS] // 32))[:, None, :, None]
    s_ptr = s_ptr.to(tl.pointer_type(tl.int32)) + ((row + base) * groups)[None, :, None, :] + group
    if SPREAD[WHOLE] and width == FORMAT[WORDS]:
        words, pair = tl.load(turned(w_ptr, True), cache_modifier=CACHE), tl.load(turned(s_ptr, False))
    else:
        mask = (row < limit)[:, None, :, None] & (word < width)
        words = tl.load(turned(w_ptr, True), mask=turned(mask, True), other=0, cache_modifier=CACHE)
        mask = (row < limit)[None, :, None, :] & (group < groups)
        pair = tl.load(turned(s_ptr, False), mask=turned(mask, False), other=0)
    return turned(words, True), tl.permute(turned(pair, False), [1, 2, 3, 0])


@triton.jit
def load_words(packed_ptr, FORMAT: tl.constexpr, SPREAD: tl.constexpr):
    """What a packed row has for each word, to each warp: [W, C, 1, K]."""
    word = chunk_words(FORMAT, SPREAD)[None, :, :] + (tl.arange(0, SPREAD[WARPS]) * 0)[:, None, None]
    width: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32
    if width == FORMAT[WORDS]:
        found = tl.load(packed_ptr + turned(word, True))
    else:
        found = tl.load(packed_ptr + turned(word, True), mask=turned(word < width, True), other=0)
    return tl.expand_dims(turned(found, True), 2)


@triton.jit
def load_vectors(packed_ptr, FORMAT: tl.constexpr, SPREAD: tl.constexpr):
    """What it has for each vector, to each warp: [W, C, 1, V]."""
    vector = chunk_vectors(FORMAT, SPREAD)[:, None, :] + (tl.arange(0, SPREAD[WARPS]) * 0)[None, :, None]
    width: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32
    if width == FORMAT[WORDS]:
        found = tl.load(packed_ptr + turned(vector, False))
    else:
        found = tl.load(packed_ptr + turned(vector, False), mask=turned(vector < width // FORMAT[VECTOR], False), other=0)
    return tl.expand_dims(tl.permute(turned(found, False), [1, 2, 0]), 2)


@triton.jit
def load_limb(packed_ptr, FORMAT: tl.constexpr, SPREAD: tl.constexpr):
    """(pairs, totals) of the limb at packed_ptr."""
    first = load_words(packed_ptr, FORMAT, SPREAD)
    second = load_words(packed_ptr + FORMAT[WORDS], FORMAT, SPREAD)
    if FORMAT[BITS] == 4:
        third = load_words(packed_ptr + 2 * FORMAT[WORDS], FORMAT, SPREAD)
        fourth = load_words(packed_ptr + 3 * FORMAT[WORDS], FORMAT, SPREAD)
        return (first, second, third, fourth), load_vectors(packed_ptr + 4 * FORMAT[WORDS], FORMAT, SPREAD)
    else:
        return (first, second), load_vectors(packed_ptr + 2 * FORMAT[WORDS], FORMAT, SPREAD)


@triton.jit
def load_packed(packed_ptr, FORMAT: tl.constexpr, SPREAD: tl.constexpr, LIMBS: tl.constexpr):
    """(units, limb) or (units, limb, limb) of the packed row at packed_ptr."""
    limb: tl.constexpr = (4 if FORMAT[BITS] == 4 else 2) * FORMAT[WORDS] + FORMAT[WORDS] // FORMAT[VECTOR]
    unit = load_vectors(packed_ptr + LIMBS * limb, FORMAT, SPREAD).to(tl.float32, bitcast=True)
    if LIMBS == 1:
        return unit, load_limb(packed_ptr, FORMAT, SPREAD)
    else:
        second = load_limb(packed_ptr + limb, FORMAT, SPREAD)
        return unit, load_limb(packed_ptr, FORMAT, SPREAD), second


@triton.jit
def dot_warp_rows(words, pair, features, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Weights as `load_warp_rows` has them times packed features: float32 [W, R], every sum in a fixed order."""
    part = integer_products(words, pair, features, FORMAT, LIMBS, INTERPRETED)
    return tl.sum(tl.sum(part, axis=1), axis=2)
