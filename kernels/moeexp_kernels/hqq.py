"""Half-quadratic quantisation (HQQ, https://mobiusml.github.io/hqq_blog) of a weight where it lies, as two Triton kernels.

Letters: N rows, K features, G group size; R groups a program. Formats: `ops/linear.py`.

The algorithm is hqq's `Quantizer.quantize` along axis 1 with its default optimiser, `optimize_weights_proximal_legacy`. A
group's scale s is that of its range; its zero z is refined. With u = w s, the code q = round(u + z) within 0..2^bits - 1 and the
deviation d = u - (q - z), which is s times the error e = w - (q - z) / s, an update is

    z <- mean(q - (w - shrink(e)) s) = z - mean(sign(d) min(|d|, c |d|^(p - 1))),   c = s^(2 - p) / beta

because shrink(e) = sign(e) max(|e| - |e|^(p - 1) / beta, 0). That optimiser takes a kappa, too, and does not use it: beta stays.
It stops at the first iteration in which the mean |e| of the slice that it was given does not fall, whose update it keeps.

    errors    `hqq_errors_kernel` reads a slice's groups once, holds u in registers, makes all updates and stores its share of
              the sum of |e| of each iteration
    choice    torch, on the device, finds how many updates hqq would have made of each slice; the host does not wait
    codes     `hqq_codes_kernel` makes so many updates again, which costs less memory than zeros of all iterations, and writes

Iterations are in float32 on the weight as it is, as hqq's are on a CPU. On a GPU hqq rounds weight, scale, zero and every step to
float16. In groups of 128, of a hundred codes 1.5 (int4) or 7 (int8) then differ by one, and the mean error is larger, by 0.04 to
0.2 % (int4) or 2 % (int8): a zero near 128 has three bits after the point, and an error that falls by less than 2^-11 ends the
loop. From hqq in float32 only rounding differs: a code on a tie, or an iteration more or less where errors agree to float32's
last digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeexp_kernels.ops.linear import MIDDLE_CODE

# hqq's defaults; a test compares them.
ITERATIONS = 20
LP_NORM: tl.constexpr = tl.constexpr(0.7)  # p
BETA: tl.constexpr = tl.constexpr(10.0)
LARGEST_SCALE: tl.constexpr = tl.constexpr(2e4)
NO_FRACTION: tl.constexpr = tl.constexpr(2.0**23)  # from here on a float32 is an integer

ELEMENTS = 4096  # of a program
LARGEST_GROUP = 2**20  # Triton's largest block


@triton.jit
def _nearest(x):
    """0 <= x < 2^23 to the nearest integer, a tie to the even one, as torch.round: two additions, no conversion."""
    return (x + NO_FRACTION) - NO_FRACTION


@triton.jit
def _places(program, groups, slice_groups, ROWS: tl.constexpr):
    """(slice, the program's groups int64 [R], which of them are there): no program has groups of two slices."""
    programs = (slice_groups + ROWS - 1) // ROWS
    part, row = program // programs, program % programs * ROWS + tl.arange(0, ROWS)
    group = part.to(tl.int64) * slice_groups + row
    return part, group, (row < slice_groups) & (group < groups)


@triton.jit
def _start(
    w_ptr, group, there, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HIGHEST: tl.constexpr, FLAT: tl.constexpr,
    ROUND_ZERO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(u of the group's first and second half [R, COLUMNS], scale, zero, least and largest value [R]), all float32. COLUMNS:
    half a group, rounded up to a power of 2. Where a group is not finite its scale or, after an update, its zero is not."""
    half: tl.constexpr = GROUP // 2
    column = tl.arange(0, COLUMNS)[None, :]
    mask = there[:, None] & (column < half)
    place = w_ptr + group[:, None] * GROUP + column
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
    least = tl.min(tl.where(column < half, tl.minimum(first, second), float("inf")), axis=1)
    largest = tl.max(tl.where(column < half, tl.maximum(first, second), float("-inf")), axis=1)
    flat = largest - least <= FLAT
    # Two roundings, as torch divides a number by a tensor: with one, of two zeros halfway the other integer would be taken.
    scale = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), tl.where(flat, 1.0, largest - least)) * HIGHEST
    # No tl.minimum: it would make a number of a NaN.
    scale = tl.where(flat, 1.0, tl.where(scale > LARGEST_SCALE, LARGEST_SCALE, scale))
    zero = -least * scale
    if ROUND_ZERO:
        size = tl.abs(zero)
        size = tl.where(size < NO_FRACTION, _nearest(size), size)
        zero = tl.where(zero < 0.0, -size, size)
    return first * scale[:, None], second * scale[:, None], scale, zero, least, largest


@triton.jit
def _code(u, zero, HIGHEST: tl.constexpr):
    """Codes, float32; clamped first, which gives the same and keeps within what `_nearest` takes."""
    return _nearest(tl.minimum(tl.maximum(u + zero[:, None], 0.0), HIGHEST))


@triton.jit
def _deviation(u, zero, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HIGHEST: tl.constexpr):
    """d, 0 in the columns that only fill up."""
    d = u - (_code(u, zero, HIGHEST) - zero[:, None])
    if 2 * COLUMNS != GROUP:
        d = tl.where(tl.arange(0, COLUMNS)[None, :] < GROUP // 2, d, 0.0)
    return d


@triton.jit
def _strength(scale):
    """(c, the |d| up to which |d| <= c |d|^(p - 1))."""
    c = tl.exp2(tl.log2(scale) * (2.0 - LP_NORM)) / BETA
    return c, tl.exp2(tl.log2(c) / (2.0 - LP_NORM))


@triton.jit
def _kept(d, c):
    """sign(d) min(|d|, c |d|^(p - 1))."""
    size = tl.abs(d)
    size = tl.minimum(size, c[:, None] * tl.exp2(tl.log2(size) * (LP_NORM - 1.0)))
    return tl.where(d < 0.0, -size, size)


@triton.jit
def _updated(zero, d, other, c, reach, GROUP: tl.constexpr):
    """The next zero, from the deviations of both halves. The power is three fifths of the work, and of weights in the usual range
    no deviation is beyond `reach`: then it is left out for the program."""
    kept = tl.sum(d + other, axis=1)
    if tl.max(tl.max(tl.maximum(tl.abs(d), tl.abs(other)), axis=1) - reach, axis=0) > 0.0:
        kept = tl.sum(_kept(d, c) + _kept(other, c), axis=1)
    return zero - kept / GROUP


@triton.jit
def hqq_errors_kernel(
    w_ptr, errors_ptr, groups, slice_groups, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HIGHEST: tl.constexpr,
    FLAT: tl.constexpr, ROUND_ZERO: tl.constexpr, UPDATES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """errors[program, i] = the sum of |e| of the program's weights under the zeros that i updates give."""
    program = tl.program_id(0)
    _, group, there = _places(program, groups, slice_groups, ROWS)
    first, second, scale, zero, _, _ = _start(w_ptr, group, there, GROUP, COLUMNS, HIGHEST, FLAT, ROUND_ZERO, ROWS)
    c, reach = _strength(scale)
    errors_ptr += program.to(tl.int64) * UPDATES
    for i in range(UPDATES):
        d, other = _deviation(first, zero, GROUP, COLUMNS, HIGHEST), _deviation(second, zero, GROUP, COLUMNS, HIGHEST)
        error = tl.sum(tl.abs(d) + tl.abs(other), axis=1) / scale
        tl.store(errors_ptr + i, tl.sum(tl.where(there, error, 0.0), axis=0))
        zero = _updated(zero, d, other, c, reach, GROUP)


@triton.jit
def hqq_codes_kernel(
    w_ptr, updates_ptr, stored_ptr, scales_ptr, groups, slice_groups, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    HIGHEST: tl.constexpr, FLAT: tl.constexpr, ROUND_ZERO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bytes and (scale, shift) of each group, with as many updates of its zero as its slice has."""
    part, group, there = _places(tl.program_id(0), groups, slice_groups, ROWS)
    first, second, scale, zero, least, largest = _start(
        w_ptr, group, there, GROUP, COLUMNS, HIGHEST, FLAT, ROUND_ZERO, ROWS
    )  # fmt: skip
    c, reach = _strength(scale)
    for _ in range(tl.load(updates_ptr + part)):
        d, other = _deviation(first, zero, GROUP, COLUMNS, HIGHEST), _deviation(second, zero, GROUP, COLUMNS, HIGHEST)
        zero = _updated(zero, d, other, c, reach, GROUP)
    half: tl.constexpr = GROUP // 2
    column = tl.arange(0, COLUMNS)[None, :]
    mask = there[:, None] & (column < half)
    # By way of int32: a NaN has no byte, and its group is refused.
    low, high = _code(first, zero, HIGHEST).to(tl.int32), _code(second, zero, HIGHEST).to(tl.int32)
    if HIGHEST == 15:
        tl.store(stored_ptr + group[:, None] * half + column, (low | (high << 4)).to(tl.uint8), mask=mask)
    else:
        place = stored_ptr + group[:, None] * GROUP + column
        tl.store(place, low.to(tl.uint8), mask=mask)
        tl.store(place + half, high.to(tl.uint8), mask=mask)
    step = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)
    shift = ((HIGHEST + 1) // 2 - zero) * step
    # A NaN is passed over by least and largest, not by the zero.
    flat = (largest - least <= FLAT) & (zero == zero)
    tl.store(scales_ptr + group * 2, tl.where(flat, 0.0, step).to(tl.float16), mask=there)
    tl.store(scales_ptr + group * 2 + 1, tl.where(flat, (least + largest) / 2, shift).to(tl.float16), mask=there)


def quantise_rows(
    rows: Tensor, *, bits: int, group_size: int, slice_rows: int, flat: float, round_zero: bool
) -> tuple[Tensor, Tensor]:
    """rows [N, K] float, contiguous -> (stored uint8 [N, K * bits / 8], scales [N, K/G, 2] float16), on its device, where the
    host waits for nothing. Beside them it needs 80 bytes for each 4,096 weights, or for each group that is larger.

    bits: 4 or 8. group_size: even, a divisor of K. slice_rows: iterations of so many rows end together. flat: a group whose
    values differ by no more is its centre, with scale 0. round_zero: the first zero is an integer. A group that is not finite, or
    too large for float16, has a scale or shift that is not finite. `ValueError` for a group of more than 2^20."""
    count, features = rows.shape
    slice_rows = min(slice_rows, count)
    if group_size > LARGEST_GROUP:
        raise ValueError(f"quant.group_size={group_size}; supported on a GPU: up to {LARGEST_GROUP}")
    stored = torch.empty(count, features * bits // 8, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(count, features // group_size, 2, dtype=torch.float16, device=rows.device)
    columns = triton.next_power_of_2(group_size // 2)
    per_program = max(1, ELEMENTS // (2 * columns))
    slice_groups, slices = slice_rows * features // group_size, triton.cdiv(count, slice_rows)
    programs = triton.cdiv(slice_groups, per_program)
    common = {
        "GROUP": group_size, "COLUMNS": columns, "HIGHEST": 2 * MIDDLE_CODE[bits] - 1, "FLAT": flat, "ROUND_ZERO": round_zero,
        "ROWS": per_program, "num_warps": min(32, max(4, per_program * columns // 512)),
    }  # fmt: skip
    counts = count * features // group_size, slice_groups
    errors = torch.empty(slices, programs, ITERATIONS, dtype=torch.float32, device=rows.device)
    hqq_errors_kernel[(slices * programs,)](rows, errors, *counts, UPDATES=ITERATIONS, **common)
    starts = torch.arange(0, count, slice_rows, device=rows.device)
    weights = (count - starts).clamp(max=slice_rows) * features
    updates = updates_until_hqq_stops((errors.sum(1, dtype=torch.float64) / weights[:, None]).float())
    hqq_codes_kernel[(slices * programs,)](rows, updates, stored, scales, *counts, **common)
    return stored, scales


def updates_until_hqq_stops(errors: Tensor) -> Tensor:
    """errors [slices, iterations], each before that iteration's update -> updates that hqq makes, int32 [slices]: up to and with
    that of the first iteration whose error is not below the one before, or that of the last."""
    before = torch.cat([torch.full_like(errors[:, :1], float("inf")), errors[:, :-1]], dim=1)
    falling = (errors < before).int().cumprod(1).sum(1)
    return (falling + 1).clamp(max=errors.shape[1]).int()
