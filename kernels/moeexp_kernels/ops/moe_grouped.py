"""Grouped matrix products of the experts of many tokens: gate and up with SwiGLU, and down, of one block of pairs a program.

Shape letters and what is launched when: `moe_prefill.py`; pairs, places and blocks: `moe_sort.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeexp_kernels.ops.gemm import (
    activation_tile,
    add_product,
    add_scaled,
    in_operand_order,
    operand_place,
    scale_tile,
    stored_tile,
)
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, ROWS, at_row

# ROUTING: what the grouped kernels know of the choice when they are compiled, by these names.
LEAST: tl.constexpr = tl.constexpr(0)  # this height serves the shared expert of LEAST to BEYOND - 1 tokens
BEYOND: tl.constexpr = tl.constexpr(1)
CHOICES: tl.constexpr = tl.constexpr(2)  # k


# MODE: of `grouped_gate_up_kernel`, by these names.
AFTER: tl.constexpr = tl.constexpr(0)  # weights are scaled after the product, as in `add_scaled`, a group at a time
ORDERED: tl.constexpr = tl.constexpr(1)  # h stands as `operand_place` has it
ORDERED_ACT: tl.constexpr = tl.constexpr(2)  # so shall act


@triton.jit
def block_of(
    list_ptr, block, shared_blocks, A, M, ROUTING: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(is it the shared expert's, expert, first place, pairs): of `block`, the shared expert's blocks first. No pairs: nothing to
    do. The shared expert's places begin at A."""
    shared = block < shared_blocks
    if shared:
        expert = 0
        first = A + block * BLOCK_M
        pairs = tl.minimum(A + M - first, BLOCK_M)
        pairs = tl.where((M >= ROUTING[LEAST]) & (M < ROUTING[BEYOND]), pairs, 0)
    else:
        row = list_ptr + (block - shared_blocks) * 3
        expert = tl.load(row)
        first = tl.load(row + 1)
        pairs = tl.load(row + 2)
    return shared, expert, first, pairs


@triton.jit
def grouped_gate_up_kernel(
    h_ptr, extra_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, order_ptr, list_ptr, weights_ptr, act_ptr,
    shared_blocks, A, M,
    ROUTING: tl.constexpr, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """act [A + M, I] = share * silu(gate) * up, for one block of pairs and BLOCK_N of the expert's I rows.

    Grid (rows of the expert, blocks), the former fast: a block's programs read the same tokens. As in `gemm_kernel` the
    weights are the first operand, and BLOCK_K counts stored columns. extra: `norm_kernel`'s. Scales of a group are loaded one
    group ahead where they are applied after the product."""
    shared, expert, first, pairs = block_of(list_ptr, tl.program_id(1), shared_blocks, A, M, ROUTING, BLOCK_M)
    if pairs == 0:
        return
    K: tl.constexpr = FORMAT[FEATURES]
    WIDTH: tl.constexpr = FORMAT[ROWS] // 2
    width: tl.constexpr = K // 2 if FORMAT[BITS] == 4 else K
    fits: tl.constexpr = WIDTH % BLOCK_N == 0
    if shared:
        w_ptr = shared_w_ptr
        s_ptr = shared_s_ptr
    else:
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert.to(tl.int64) * FORMAT[ROWS], FORMAT)
    i = tl.arange(0, BLOCK_M)
    used = i < pairs
    place = (first + i).to(tl.int64)
    pair = tl.load(order_ptr + place, mask=used & (place < A), other=0)
    token = tl.where(shared, place - A, pair // ROUTING[CHOICES]).to(tl.int64)
    dtype = tl.float32 if INTERPRETED else h_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h_row = h_ptr + token * K
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    extra_row = extra_ptr + token * (1 + K // FORMAT[GROUP])
    if MODE[AFTER]:
        gate_scale, gate_shift = scale_tile(s_ptr, n, n < WIDTH, 0, FORMAT, fits, BLOCK_K)
        up_scale, up_shift = scale_tile(s_ptr, WIDTH + n, n < WIDTH, 0, FORMAT, fits, BLOCK_K)
        sums = tl.load(extra_row + 1, mask=used, other=0.0)
    for start in range(0, width, BLOCK_K):
        gate_q = stored_tile(w_ptr, n, n < WIDTH, start, FORMAT, fits, BLOCK_K)
        up_q = stored_tile(w_ptr, WIDTH + n, n < WIDTH, start, FORMAT, fits, BLOCK_K)
        if MODE[ORDERED]:
            gate_q = in_operand_order(gate_q)
            up_q = in_operand_order(up_q)
        h, high = activation_tile(h_row, used, start, dtype, FORMAT, BLOCK_K)
        if MODE[AFTER]:
            ahead = tl.minimum(start + BLOCK_K, width - BLOCK_K)
            gate_scale_ahead, gate_shift_ahead = scale_tile(s_ptr, n, n < WIDTH, ahead, FORMAT, fits, BLOCK_K)
            up_scale_ahead, up_shift_ahead = scale_tile(s_ptr, WIDTH + n, n < WIDTH, ahead, FORMAT, fits, BLOCK_K)
            sums_ahead = tl.load(extra_row + 1 + ahead // BLOCK_K, mask=used, other=0.0)
            gate = add_scaled(gate, gate_q, gate_scale, gate_shift, h, high, sums[None, :], INTERPRETED)
            up = add_scaled(up, up_q, up_scale, up_shift, h, high, sums[None, :], INTERPRETED)
            gate_scale, gate_shift, up_scale, up_shift = gate_scale_ahead, gate_shift_ahead, up_scale_ahead, up_shift_ahead
            sums = sums_ahead
        else:
            gate_scale, gate_shift = scale_tile(s_ptr, n, n < WIDTH, start, FORMAT, fits, BLOCK_K)
            up_scale, up_shift = scale_tile(s_ptr, WIDTH + n, n < WIDTH, start, FORMAT, fits, BLOCK_K)
            gate = add_product(gate, gate_q, gate_scale, gate_shift, h, high, FORMAT, INTERPRETED)
            up = add_product(up, up_q, up_scale, up_shift, h, high, FORMAT, INTERPRETED)
    share = tl.load(weights_ptr + pair, mask=used & (place < A), other=0.0)
    share += tl.load(extra_row, mask=used & (place >= A), other=0.0)
    act = (gate * tl.sigmoid(gate) * up * share[None, :]).to(act_ptr.dtype.element_ty)
    column = operand_place(n) if MODE[ORDERED_ACT] else n
    tl.store(act_ptr + (place * WIDTH)[None, :] + column[:, None], act, mask=(n < WIDTH)[:, None] & used[None, :])


@triton.jit
def grouped_down_kernel(
    act_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, order_ptr, list_ptr, out_ptr, shared_blocks, A, M,
    ROUTING: tl.constexpr, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """out [A + M, D] = act @ down.T for one block of pairs and BLOCK_N features; FORMAT: one expert's, [D, I]. IN_ORDER: act
    stands as `operand_place` has it."""
    shared, expert, first, pairs = block_of(list_ptr, tl.program_id(1), shared_blocks, A, M, ROUTING, BLOCK_M)
    if pairs == 0:
        return
    D: tl.constexpr = FORMAT[ROWS]
    K: tl.constexpr = FORMAT[FEATURES]
    width: tl.constexpr = K // 2 if FORMAT[BITS] == 4 else K
    fits: tl.constexpr = D % BLOCK_N == 0
    if shared:
        w_ptr = shared_w_ptr
        s_ptr = shared_s_ptr
    else:
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert.to(tl.int64) * D, FORMAT)
    i = tl.arange(0, BLOCK_M)
    used = i < pairs
    place = (first + i).to(tl.int64)
    dtype = tl.float32 if INTERPRETED else act_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    act_row = act_ptr + place * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        q = stored_tile(w_ptr, n, n < D, start, FORMAT, fits, BLOCK_K)
        if IN_ORDER:
            q = in_operand_order(q)
        act, high = activation_tile(act_row, used, start, dtype, FORMAT, BLOCK_K)
        scale, shift = scale_tile(s_ptr, n, n < D, start, FORMAT, fits, BLOCK_K)
        acc = add_product(acc, q, scale, shift, act, high, FORMAT, INTERPRETED)
    pair = tl.load(order_ptr + place, mask=used & (place < A), other=0)
    row = tl.where(shared, place, pair.to(tl.int64))
    tl.store(out_ptr + (row * D)[None, :] + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=(n < D)[:, None] & used[None, :])
