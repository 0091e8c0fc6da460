"""FORMAT: what a kernel knows of one stored matrix [ROWS, FEATURES] when it is compiled, as one constexpr.

A kernel reads `FORMAT[BITS]`, `FORMAT[GROUP]`, … by the names below. FORMAT is a plain tuple of numbers, and so is every other
constexpr that is more than one: Inductor writes a kernel's constants by their repr into the code that it makes, which has no
class of a NamedTuple. It copies the functions and constexprs that a kernel names into that code, all into one scope: so these
names are no other constexpr's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS: tl.constexpr = tl.constexpr(0)  # output features
FEATURES: tl.constexpr = tl.constexpr(1)  # of a row, K
BITS: tl.constexpr = tl.constexpr(2)  # of a weight: 4, 8, 16, or 32 for float32
GROUP: tl.constexpr = tl.constexpr(3)  # weights under one scale; FEATURES without scales
WORDS: tl.constexpr = tl.constexpr(4)  # of 32 bits in a row, rounded up to a power of 2
VECTOR: tl.constexpr = tl.constexpr(5)  # words that a thread loads at once, all under one scale
FLOAT16: tl.constexpr = tl.constexpr(6)  # whether plain weights of 16 bits are float16, not bfloat16


def matrix_format(weight: Tensor, *, bits: int, group: int, widest: int = 4, fold: int = 1) -> tuple[int, ...]:
    """FORMAT of weight [..., N, K], bits and group as `weight_format` finds them. VECTOR is `widest` (a power of 2), less where a
    scale is for fewer words. With `fold` so many rows side by side are one row of the format."""
    features = weight.shape[-1] * weight.element_size() * 8 // bits * fold
    words, vector = triton.next_power_of_2(features * bits // 32), math.gcd(widest, group * bits // 32)
    return weight.shape[-2] // fold, features, bits, group, words, vector, weight.dtype == torch.float16


@triton.jit
def at_row(w_ptr, s_ptr, row, FORMAT: tl.constexpr):
    """Where `row` of the matrix at w_ptr, and of its scales, begins."""
    w_ptr += row * (FORMAT[FEATURES] // 2 if FORMAT[BITS] == 4 else FORMAT[FEATURES])
    if FORMAT[BITS] <= 8:
        s_ptr += row * (2 * (FORMAT[FEATURES] // FORMAT[GROUP]))
    return w_ptr, s_ptr
