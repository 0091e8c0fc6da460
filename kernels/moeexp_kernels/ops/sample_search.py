"""Which tokens a draw may return: top_k and top_p, found without sorting. The searches of `sample.py`.

Shape letters: B batch, V vocabulary, C chunks of the vocabulary (one program each).

The k-th largest logit, and the smallest one inside top_p, are found four bits at a time in an order-preserving integer image
of the logits, by counting (or weighing) what lies above sixteen candidates.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.parts.pdl import after_previous, has_pdl

DIGIT_BITS = 4


@triton.jit
def ordered(x):
    """int64 in [0, 2^32) that sorts as the float32 x does; -0 equals +0 and NaN comes last, as in torch.argmax."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def found_by_step(
    sums, prefixes, cell, first_cell, shift, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BY_MASS: tl.constexpr,
    SIZES: tl.constexpr,
):  # fmt: skip
    """What a search step (row `cell` of sums and prefixes) found: the largest candidate with still enough at or above it.

    Every program that needs it adds up the chunks itself, in the same order and so to the same bits."""
    CHUNKS: tl.constexpr = SIZES[0]
    DIGITS: tl.constexpr = SIZES[2]
    chunk, digit = tl.arange(0, SIZES[1]), tl.arange(0, DIGITS)
    inside = chunk < CHUNKS
    table = tl.load(sums + (cell * CHUNKS + chunk)[:, None] * DIGITS + digit[None, :], mask=inside[:, None], other=0.0)
    above = tl.sum(table, 0)
    if BY_MASS:
        goal = TOP_P * tl.sum(tl.load(sums + (first_cell * CHUNKS + chunk) * DIGITS, mask=inside, other=0.0), 0)
    else:
        goal = TOP_K * 1.0
    best = tl.maximum(tl.sum((above >= goal).to(tl.int32), 0) - 1, 0)
    return tl.load(prefixes + cell) + (best.to(tl.int64) << shift)


@triton.jit
def _narrow_kernel(
    logits, peaks, sums, prefixes, vocabulary, stride_b, first, step, shift, previous_shift,
    STEPS: tl.constexpr, INVERSE_T: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BY_MASS: tl.constexpr,
    OPENING: tl.constexpr, FLOORED: tl.constexpr, SIZES: tl.constexpr, NARROW_STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B, C), SIZES as of `sizes_of`. Per chunk, how many tokens (or what unnormalised probability, BY_MASS) lie at or
    above each candidate prefix + j << shift: sums [B, STEPS, C, DIGITS]. prefixes [B, STEPS] is what each step starts from.

    OPENING: first step of a search. FLOORED: the search by mass, where one by count came before it: its opening weighs
    only what that kept, which sets the goal. Later steps need no floor: below it there is always enough."""
    CHUNKS: tl.constexpr = SIZES[0]
    BLOCK_CHUNKS: tl.constexpr = SIZES[1]
    DIGITS: tl.constexpr = SIZES[2]
    BLOCK: tl.constexpr = SIZES[3]
    chunk, b = tl.program_id(1), tl.program_id(0).to(tl.int64)
    cell = b * STEPS + step
    ready = after_previous(PDL)  # the logits may be the previous kernel's, and what the last step found is
    logits += ready
    peaks += ready
    sums += ready
    prefixes += ready
    prefix = cell * 0
    floor = cell * 0
    if OPENING:
        if FLOORED:
            floor = found_by_step(sums, prefixes, cell - 1, cell, previous_shift, TOP_K, TOP_P, False, SIZES)
    else:
        prefix = found_by_step(
            sums, prefixes, cell - 1, b * STEPS + first, previous_shift, TOP_K, TOP_P, BY_MASS, SIZES
        )  # fmt: skip
    tl.store(prefixes + cell, prefix, mask=chunk == 0)

    digit = tl.arange(0, DIGITS)
    candidate = prefix + (digit.to(tl.int64) << shift)
    if BY_MASS:
        each = tl.arange(0, BLOCK_CHUNKS)
        peak = tl.max(tl.load(peaks + b * CHUNKS + each, mask=each < CHUNKS, other=-1), 0) >> 31
        bits = tl.where(peak < 2147483648, -1 - peak, peak - 2147483648).to(tl.int32)
        largest = bits.to(tl.float32, bitcast=True)
    total = tl.zeros([DIGITS, NARROW_STEP], tl.float32)
    for i in tl.static_range(BLOCK // NARROW_STEP):
        token = chunk * BLOCK + i * NARROW_STEP + tl.arange(0, NARROW_STEP)
        x = tl.load(logits + b * stride_b + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        key = ordered(x)
        key = tl.where((token < vocabulary) & (key >= floor), key, -1)
        if BY_MASS:
            weight = tl.exp((x - largest) * INVERSE_T)
        else:
            weight = tl.full([NARROW_STEP], 1.0, tl.float32)
        total += tl.where(key[None, :] >= candidate[:, None], weight[None, :], 0.0)
    tl.store(sums + (cell * CHUNKS + chunk) * DIGITS + digit, tl.sum(total, 1))


def sizes_of(vocabulary: int, block: int) -> tuple[int, int, int, int]:
    """How a row of logits is cut: chunks, the same rounded up to a power of 2, candidates of a search step, tokens of a chunk."""
    chunks = triton.cdiv(vocabulary, block)
    return chunks, triton.next_power_of_2(chunks), 1 << DIGIT_BITS, block


def search_steps(*, dtype: torch.dtype, vocabulary: int, top_k: int, top_p: float) -> list[tuple[bool, int]]:
    """(by mass, shift) of each step: of the search by count where top_k filters, then of that by mass where top_p does."""
    # bfloat16 as float32 has its low 16 bits all equal, so no candidate needs them; float16 has more exponents than that.
    shifts = range(28, 12 if dtype == torch.bfloat16 else -1, -DIGIT_BITS)
    kinds = [False] * (0 < top_k < vocabulary) + [True] * (top_p < 1)
    return [(by_mass, shift) for by_mass in kinds for shift in shifts]


def launch_searches(
    *, logits: Tensor, peaks: Tensor | None, steps: list[tuple[bool, int]], sizes: tuple[int, int, int, int],
    tuned: dict[str, int], constants: dict[str, Any],
) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    """sums and prefixes of all steps, the first step of the last search and the shift of its last. logits [B, 1, V], checked;
    peaks [B, C] int64: the packed largest logit of each chunk, which a search by mass needs."""
    rows, _, vocabulary = logits.shape
    sums = torch.empty((rows, len(steps), sizes[0], sizes[2]), dtype=torch.float32, device=logits.device)
    prefixes = torch.empty((rows, len(steps)), dtype=torch.int64, device=logits.device)
    first, (_, opening_shift), (_, last_shift) = 0, steps[0], steps[-1]
    floored = len({by_mass for by_mass, _ in steps}) == 2
    for step, (by_mass, shift) in enumerate(steps):
        opening = shift == opening_shift
        first = step if opening else first
        wrap_triton(_narrow_kernel)[(rows, sizes[0])](
            logits, prefixes if peaks is None else peaks, sums, prefixes, vocabulary, logits.stride(0), first, step, shift,
            last_shift if opening else shift + DIGIT_BITS, **constants, BY_MASS=by_mass, OPENING=opening,
            FLOORED=by_mass and floored, SIZES=sizes, NARROW_STEP=tuned["NARROW_STEP"], PDL=has_pdl(logits),
            num_warps=tuned["narrow_warps"],
        )  # fmt: skip
    return sums, prefixes, first, last_shift
