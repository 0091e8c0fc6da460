"""The (token, expert) pairs of many tokens sorted by expert, and cut into blocks of pairs that share one.

Shape letters: E experts, k choices of a token, A = tokens * k pairs; pair a is choice a % k of token a // k.

    counts    how many pairs each expert has, counted by one program per expert
    order     [A] int32, a counting sort: the experts' pairs one after another, each expert's in token order
    lists     one [blocks, 3] int32 for each height, the tallest first; a row is (expert, its first place in `order`, pairs)

An expert's pairs fill blocks of the tallest height. What is left goes into one block of the lowest height that holds it: an
expert's weights are read as seldom as can be, and few rows of a block are empty. How many blocks of a height there are depends on
the data, the most that there can be does not; rows of a list that no block needs have no pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

STEP = 4096  # ids that a program looks at at a time


@triton.jit
def count_kernel(ids_ptr, counts_ptr, A, BLOCK: tl.constexpr):
    e = tl.program_id(0)
    count = 0
    for start in range(0, A, BLOCK):
        a = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + a, mask=a < A, other=-1)
        count += tl.sum((ids == e).to(tl.int32), axis=0)
    tl.store(counts_ptr + e, count)


@triton.jit
def write_rows(
    list_ptr, bound, needed, e, first, count, E: tl.constexpr, E_PADDED: tl.constexpr, HEIGHT: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Expert e's rows of one list, for `count` pairs from place `first` on; the last expert's program marks the unused rows.

    needed int32 [E padded]: blocks of this height by expert."""
    others = tl.arange(0, E_PADDED)
    row = tl.sum(tl.where(others < e, needed, 0), axis=0)
    mine = tl.sum(tl.where(others == e, needed, 0), axis=0)
    for start in range(0, mine, STEP):
        j = start + tl.arange(0, STEP)
        place = list_ptr + (row + j) * 3
        tl.store(place, j * 0 + e, mask=j < mine)
        tl.store(place + 1, first + j * HEIGHT, mask=j < mine)
        tl.store(place + 2, tl.minimum(count - j * HEIGHT, HEIGHT), mask=j < mine)
    if e == E - 1:
        for start in range(row + mine, bound, STEP):
            j = start + tl.arange(0, STEP)
            for column in tl.static_range(3):
                tl.store(list_ptr + j * 3 + column, j * 0, mask=j < bound)


@triton.jit
def sort_kernel(
    ids_ptr, counts_ptr, order_ptr, tall_ptr, middle_ptr, low_ptr, A, tall_bound, middle_bound, low_bound,
    E: tl.constexpr, E_PADDED: tl.constexpr, TALL: tl.constexpr, MIDDLE: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program e writes expert e's part of `order` and its rows of the lists. Every element is written once, by one program."""
    e = tl.program_id(0)
    others = tl.arange(0, E_PADDED)
    counts = tl.load(counts_ptr + others, mask=others < E, other=0)
    first = tl.sum(tl.where(others < e, counts, 0), axis=0)
    count = tl.sum(tl.where(others == e, counts, 0), axis=0)
    left = counts % TALL
    tall = counts // TALL + (left > MIDDLE).to(tl.int32)
    write_rows(tall_ptr, tall_bound, tall, e, first, count, E, E_PADDED, TALL, 128)
    whole = count // TALL * TALL
    middle = ((left > LOW) & (left <= MIDDLE)).to(tl.int32)
    write_rows(middle_ptr, middle_bound, middle, e, first + whole, count - whole, E, E_PADDED, MIDDLE, 128)
    low = ((left > 0) & (left <= LOW)).to(tl.int32)
    write_rows(low_ptr, low_bound, low, e, first + whole, count - whole, E, E_PADDED, LOW, 128)
    done = 0
    for start in range(0, A, BLOCK):
        a = start + tl.arange(0, BLOCK)
        match = (tl.load(ids_ptr + a, mask=a < A, other=-1) == e).to(tl.int32)
        place = first + done + tl.cumsum(match, axis=0) - 1
        tl.store(order_ptr + place, a, mask=match != 0)
        done += tl.sum(match, axis=0)


def block_bounds(*, pairs, experts: int, heights: tuple[int, ...]) -> tuple:
    """Blocks of each height that any routing fits into; `pairs` may be symbolic. A block of what is left holds more pairs than
    the next lower height."""
    lower = (*heights[1:], 0)
    left = tuple(torch.sym_min(pairs // (less + 1), experts) for less in lower)
    return (pairs // heights[0] + left[0], *left[1:])


def sort_by_expert(*, ids: Tensor, experts: int, heights: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """ids int32 [..., k] contiguous, in 0..E-1; heights: one to three powers of 2, none taller than the one before it.
    Returns (order [A], lists), as in the module's docstring."""
    pairs = ids.numel()
    whole: dict[str, Any] = {"dtype": torch.int32, "device": ids.device}
    counts, order = torch.empty((experts,), **whole), torch.empty((pairs,), **whole)
    bounds = block_bounds(pairs=pairs, experts=experts, heights=heights)
    lists = tuple(torch.empty((bound, 3), **whole) for bound in bounds)
    none = 3 - len(heights)  # of a height 0 there are no blocks
    tall, middle, low = (*heights, *(0,) * none)
    wrap_triton(count_kernel)[(experts,)](ids, counts, pairs, BLOCK=STEP, num_warps=8)
    wrap_triton(sort_kernel)[(experts,)](
        ids, counts, order, *lists, *(order,) * none, pairs, *bounds, *(0,) * none,
        E=experts, E_PADDED=triton.next_power_of_2(experts), TALL=tall, MIDDLE=middle, LOW=low, BLOCK=STEP, num_warps=8,
    )  # fmt: skip
    return order, lists
