"""Activations between two kernels of few tokens: as floats, for kernels that make integers of them themselves, or as the integers
that the second multiplies (`int_dot.py`), packed by the first, which has them: gate/up for `down`, the delta rule for the output
projection.

A packed row is one token's. `down`'s is of TOP_K experts and the shared one, side by side as if they were one row of its format.
int32:

    for each limb:  pairs [P, WORDS] | totals [VECTORS]
    then:           units float32 [VECTORS] | padding to 16 bytes

P is 4 for int4 and 2 for int8. An int4 vector has the activations of two runs, half a group apart: a program of the first kernel
has those of whole vectors, so that no other has to know what it found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeexp_kernels.parts.int_dot import FINER_INT16, LARGEST_INT16, features_of_words, int16_limbs, larger
from moeexp_kernels.parts.limbs import TINY, integer_of
from moeexp_kernels.parts.matrix import BITS, GROUP, VECTOR, WORDS
from moeexp_kernels.parts.warp_rows import EACH, WARPS

# ACT: FORMAT (`matrix.py`) of a matrix that would take a packed row, of WORDS without padding, and then, by these names:
LENGTH: tl.constexpr = tl.constexpr(7)  # of a packed row, int32
EXPERTS: tl.constexpr = tl.constexpr(8)  # TOP_K


UNPACKED = (0,)  # ACT of a kernel that packs nothing


def act_format(
    *, bits: int, group: int, vector: int, features: int, dtype: torch.dtype, top_k: int = 0
) -> tuple[int, ...]:  # fmt: skip
    """ACT of tokens of `dtype` and so many activations, for matrices with bits, group and VECTOR."""
    words, limbs = features * bits // 32, int16_limbs(dtype)
    vectors = words // vector
    length = limbs * ({4: 4, 8: 2}[bits] * words + vectors) + vectors
    return 1, features, bits, group, words, vector, False, -(-length // 4) * 4, top_k


@triton.jit
def rows_of_vectors(first, ACT: tl.constexpr, SPREAD: tl.constexpr):
    """The rows of gate and up, [W, R], that make the vectors from `first` on of one expert's activations."""
    place = tl.arange(0, SPREAD[WARPS])[:, None] + tl.arange(0, SPREAD[EACH])[None, :] * SPREAD[WARPS]
    return features_of_vectors(first, place, ACT)


@triton.jit
def features_of_vectors(first, place, ACT: tl.constexpr):
    """Which activations stand at `place` of the vectors from `first` on."""
    run: tl.constexpr = ACT[VECTOR] * 4  # consecutive activations of a vector
    if ACT[BITS] == 4:
        runs: tl.constexpr = ACT[GROUP] // 2 // run  # of half a group
        vector, inside = first + place // (2 * run), place % (2 * run)
        return vector // runs * ACT[GROUP] + vector % runs * run + inside // run * (ACT[GROUP] // 2) + inside % run
    else:
        return first * run + place


@triton.jit
def columns_of_vectors(first, COLUMNS: tl.constexpr, ACT: tl.constexpr):
    """Which activations stand in the vectors from `first` on, [COLUMNS], written so that the compiler sees runs of four."""
    i = tl.arange(0, COLUMNS)
    return features_of_vectors(first, i // 4 * 4, ACT) + i % 4


@triton.jit
def store_vectors(act_ptr, x, first, ACT: tl.constexpr, LIMBS: tl.constexpr):
    """Packs x float32 [1, n * each], whole vectors of so many activations in the order of `columns_of_vectors`, as vectors
    `first` .. of the row at act_ptr. A thread that has four neighbours needs nothing of another's but a vector's largest and
    sum."""
    each: tl.constexpr = ACT[VECTOR] * 32 // ACT[BITS]
    count: tl.constexpr = x.shape[1] // each
    PAIRS: tl.constexpr = 4 if ACT[BITS] == 4 else 2
    x = tl.reshape(x, [count, each])
    largest = tl.reduce(tl.abs(x), 1, larger)
    unit = largest * (1.0 / LARGEST_INT16) + (largest - largest)  # as in `integers_of`
    x *= tl.where(largest > TINY, LARGEST_INT16 / tl.where(largest > TINY, largest, 1.0), 0.0)[:, None]
    run: tl.constexpr = ACT[VECTOR] * 2  # pairs of consecutive activations
    pair, vector = tl.arange(0, each // 2), first + tl.arange(0, count)
    inside = (pair // run * 2 + pair % 2) * ACT[WORDS] + pair % run // 2
    at = (vector * ACT[VECTOR])[:, None] + inside[None, :]
    for _ in tl.static_range(LIMBS):
        i, left = integer_of(x)
        x = left * FINER_INT16
        low, high = tl.split(tl.reshape(i, [count, each // 2, 2]))
        tl.store(act_ptr + at, (low & 0xFFFF) | (high << 16))
        tl.store(act_ptr + PAIRS * ACT[WORDS] + vector, tl.sum(i, axis=1))
        act_ptr += PAIRS * ACT[WORDS] + ACT[WORDS] // ACT[VECTOR]
    tl.store(act_ptr + vector, unit.to(tl.int32, bitcast=True))


@triton.jit
def store_packed_act(act_ptr, values, first, last, ACT: tl.constexpr, SPREAD: tl.constexpr, LIMBS: tl.constexpr):
    """Packs values float32 [W, R] of `rows_of_vectors`, as vectors first .. of the row at act_ptr, those before `last`."""
    PAIRS: tl.constexpr = 4 if ACT[BITS] == 4 else 2
    words: tl.constexpr = SPREAD[EACH] * SPREAD[WARPS] * ACT[BITS] // 32
    vectors: tl.constexpr = words // ACT[VECTOR]
    low = tl.reshape(tl.permute(values, [1, 0]), [SPREAD[EACH] * SPREAD[WARPS]])
    high = low
    if ACT[BITS] == 4:
        low, high = tl.split(tl.permute(tl.reshape(low, [vectors, 2, ACT[VECTOR] * 4]), [0, 2, 1]))
        low, high = tl.reshape(low, [words * 4]), tl.reshape(high, [words * 4])
    features = features_of_words(low, high, ACT, LIMBS)
    word, vector = first * ACT[VECTOR] + tl.arange(0, words), first + tl.arange(0, vectors)
    for limb in tl.static_range(LIMBS):
        pairs, total = features[1 + limb]
        for pair in tl.static_range(PAIRS):
            tl.store(act_ptr + pair * ACT[WORDS] + word, pairs[pair], mask=word < last * ACT[VECTOR])
        tl.store(act_ptr + PAIRS * ACT[WORDS] + vector, total, mask=vector < last)
        act_ptr += PAIRS * ACT[WORDS] + ACT[WORDS] // ACT[VECTOR]
    tl.store(act_ptr + vector, features[0].to(tl.int32, bitcast=True), mask=vector < last)


@triton.jit
def load_act_limb(act_ptr, word, word_mask, vector, vector_mask, ACT: tl.constexpr):
    """(pairs, totals) of the limb at act_ptr."""
    first = tl.load(act_ptr + word, mask=word_mask, other=0)
    second = tl.load(act_ptr + ACT[WORDS] + word, mask=word_mask, other=0)
    if ACT[BITS] == 4:
        third = tl.load(act_ptr + 2 * ACT[WORDS] + word, mask=word_mask, other=0)
        fourth = tl.load(act_ptr + 3 * ACT[WORDS] + word, mask=word_mask, other=0)
        return (first, second, third, fourth), tl.load(act_ptr + 4 * ACT[WORDS] + vector, mask=vector_mask, other=0)
    else:
        return (first, second), tl.load(act_ptr + 2 * ACT[WORDS] + vector, mask=vector_mask, other=0)


@triton.jit
def load_packed_act(
    act_ptr, start, PIECES: tl.constexpr, USED: tl.constexpr, STORED: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr,
    ACT: tl.constexpr, LIMBS: tl.constexpr,
):  # fmt: skip
    """Features as `dot_rows` takes them of PIECES of PADDED words side by side. USED of them have STORED words each, the
    first from word `start` of the packed row at act_ptr on, each other STEP further on; all else is 0."""
    PAIRS: tl.constexpr = 4 if ACT[BITS] == 4 else 2
    each: tl.constexpr = PADDED // ACT[VECTOR]
    limb: tl.constexpr = PAIRS * ACT[WORDS] + ACT[WORDS] // ACT[VECTOR]
    # Written so that the compiler sees runs of VECTOR words, and of one vector: so threads load what they multiply.
    i, j = tl.arange(0, PIECES * PADDED), tl.arange(0, PIECES * each) * 2 // 2
    word, vector = i // ACT[VECTOR] * ACT[VECTOR] + i % ACT[VECTOR], j
    word_mask, vector_mask = i // PADDED < USED, j // each < USED
    if STORED < PADDED:
        word_mask = word_mask & (i % PADDED < STORED)
        vector_mask = vector_mask & (j % each < STORED // ACT[VECTOR])
    word += start + i // PADDED * (STEP - PADDED)
    vector += start // ACT[VECTOR] + j // each * ((STEP - PADDED) // ACT[VECTOR])
    unit = tl.load(act_ptr + LIMBS * limb + vector, mask=vector_mask, other=0).to(tl.float32, bitcast=True)
    first = load_act_limb(act_ptr, word, word_mask, vector, vector_mask, ACT)
    if LIMBS == 1:
        return unit, first
    else:
        return unit, first, load_act_limb(act_ptr + limb, word, word_mask, vector, vector_mask, ACT)


@triton.jit
def load_packed_row(act_ptr, FORMAT: tl.constexpr, ACT: tl.constexpr, LIMBS: tl.constexpr):
    """Features as `dot_rows` takes them, for weights of FORMAT, of the packed row at act_ptr."""
    return load_packed_act(act_ptr, 0, 1, 1, ACT[WORDS], FORMAT[WORDS], ACT[WORDS], ACT, LIMBS)


@triton.jit
def store_act(act_ptr, offsets, values, mask, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr):
    """Stores activations as floats: float32, or for 2-byte dtypes (LIMBS 1) as two bfloat16, the second ACT_ROW further
    on, what the first leaves over: to 2^-17 of each value, finer than the integers that `down_kernel` makes of it. Loads of
    2-byte elements give a thread the words that it multiplies."""
    if LIMBS == 1:
        first = values.to(tl.bfloat16)
        tl.store(act_ptr + offsets, first, mask=mask)
        tl.store(act_ptr + ACT_ROW + offsets, (values - first.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(act_ptr + offsets, values, mask=mask)


@triton.jit
def load_act(act_ptr, offsets, mask, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr):
    """What `store_act` stored, float32."""
    values = tl.load(act_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if LIMBS == 1:
        values += tl.load(act_ptr + ACT_ROW + offsets, mask=mask, other=0.0).to(tl.float32)
    return values
