"""Sparse mixture of experts for many tokens: the (token, expert) pairs sorted by expert, then grouped matrix products.

Shape letters and weight layouts: `moe.py`; pairs, places and blocks: `moe_sort.py`. Also M = B * T tokens and A = M * k pairs.

    gate_up   per block: gathers its tokens' normed rows, SwiGLU, times the routing weight -> act [A + M, I], in sorted places
    down      per block: act @ down.T -> out [A + M, D], in the pairs' own order: each pair has its own row, so that nothing is
              added in memory and no order of programs shows
    combine   y[m] = x[m] + its k rows of out in order of choice + the shared expert's row

Both run once for each height of blocks. The shared expert is one more expert, which every token chose: its rows are the last M,
and the height that suits M takes its blocks as well, if its weights are stored as the others are; else it has launches and
tensors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gemm import activation_tile, add_product, add_scaled, dot_precision, scale_tile, stored_tile
from moeexp_kernels.ops.linear import flat_rows
from moeexp_kernels.ops.moe import check_vectors, expert_formats
from moeexp_kernels.ops.moe_sort import sort_by_expert
from moeexp_kernels.parts import tuning

# Weight and scales of gate_up, then of down; a weight without scales stands for them too.
ExpertTensors = tuple[Tensor, Tensor, Tensor, Tensor]
Kind = tuple[int, tuple[int, int], tuple[int, int]]  # what `expert_formats` returns
HEIGHTS = ("tall", "middle", "low")  # of blocks: the parts of a table's row


@triton.jit
def norm_kernel(
    x_ptr, norm_ptr, gate_ptr, h_ptr, sums_ptr, share_ptr, x_stride,
    K: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr, SUMS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one token: h = norm(x), with SUMS also h's sum over each group, and the shared expert's share sigmoid(h @ gate), both
    float32."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    h = (x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)) * (1.0 + norm)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + m * K + k, h, mask=k < K)
    wide = h.to(tl.float32)
    tl.store(share_ptr + m, tl.sigmoid(tl.sum(wide * gate, axis=0)))
    if SUMS:
        group = tl.arange(0, BLOCK_K // GROUP)
        sums = tl.sum(tl.reshape(wide, (BLOCK_K // GROUP, GROUP)), axis=1)
        tl.store(sums_ptr + m * (K // GROUP) + group, sums, mask=group < K // GROUP)


@triton.jit
def block_of(
    list_ptr, block, shared_blocks, A, M, LEAST: tl.constexpr, BEYOND: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(is it the shared expert's, expert, first place, pairs): of `block`, the shared expert's blocks first. No pairs: nothing to
    do. The shared expert's places begin at A; this height serves it for LEAST to BEYOND - 1 tokens."""
    shared = block < shared_blocks
    if shared:
        expert = 0
        first = A + block * BLOCK_M
        pairs = tl.minimum(A + M - first, BLOCK_M)
        pairs = tl.where((M >= LEAST) & (M < BEYOND), pairs, 0)
    else:
        row = list_ptr + (block - shared_blocks) * 3
        expert = tl.load(row)
        first = tl.load(row + 1)
        pairs = tl.load(row + 2)
    return shared, expert, first, pairs


@triton.jit
def grouped_gate_up_kernel(
    h_ptr, sums_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, order_ptr, list_ptr, weights_ptr, share_ptr, act_ptr,
    shared_blocks, A, M,
    WIDTH: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    LEAST: tl.constexpr, BEYOND: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """act [A + M, I] = share * silu(gate) * up, for one block of pairs and BLOCK_N of the expert's I rows.

    Grid (rows of the expert, blocks), the former fast: a block's programs read the same tokens. As in `gemm_kernel` the
    weights are the first operand, and BLOCK_K counts stored columns. AFTER: as in `add_scaled`, a group at a time, whose scales
    are loaded one group ahead."""
    shared, expert, first, pairs = block_of(list_ptr, tl.program_id(1), shared_blocks, A, M, LEAST, BEYOND, BLOCK_M)
    if pairs == 0:
        return
    width: tl.constexpr = K // 2 if BITS == 4 else K
    fits: tl.constexpr = WIDTH % BLOCK_N == 0
    if shared:
        w_ptr = shared_w_ptr
        s_ptr = shared_s_ptr
    else:
        w_ptr += expert.to(tl.int64) * (2 * WIDTH * width)
        if BITS < 16:
            s_ptr += expert.to(tl.int64) * (4 * WIDTH * (K // GROUP))
    i = tl.arange(0, BLOCK_M)
    used = i < pairs
    place = (first + i).to(tl.int64)
    pair = tl.load(order_ptr + place, mask=used & (place < A), other=0)
    token = tl.where(shared, place - A, pair // TOP_K).to(tl.int64)
    dtype = h_ptr.dtype.element_ty if FAST else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h_row = h_ptr + token * K
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if AFTER:
        sums_row = sums_ptr + token * (K // GROUP)
        gate_scale, gate_shift = scale_tile(s_ptr, n, n < WIDTH, 0, K, GROUP, BITS, fits, BLOCK_K)
        up_scale, up_shift = scale_tile(s_ptr, WIDTH + n, n < WIDTH, 0, K, GROUP, BITS, fits, BLOCK_K)
        sums = tl.load(sums_row, mask=used, other=0.0)
    for start in range(0, width, BLOCK_K):
        gate_q = stored_tile(w_ptr, n, n < WIDTH, start, K, BITS, fits, BLOCK_K)
        up_q = stored_tile(w_ptr, WIDTH + n, n < WIDTH, start, K, BITS, fits, BLOCK_K)
        h, high = activation_tile(h_row, used, start, dtype, K, GROUP, BITS, BLOCK_K)
        if AFTER:
            ahead = tl.minimum(start + BLOCK_K, width - BLOCK_K)
            gate_scale_ahead, gate_shift_ahead = scale_tile(s_ptr, n, n < WIDTH, ahead, K, GROUP, BITS, fits, BLOCK_K)
            up_scale_ahead, up_shift_ahead = scale_tile(s_ptr, WIDTH + n, n < WIDTH, ahead, K, GROUP, BITS, fits, BLOCK_K)
            sums_ahead = tl.load(sums_row + ahead // BLOCK_K, mask=used, other=0.0)
            gate = add_scaled(gate, gate_q, gate_scale, gate_shift, h, high, sums[None, :], FAST)
            up = add_scaled(up, up_q, up_scale, up_shift, h, high, sums[None, :], FAST)
            gate_scale, gate_shift, up_scale, up_shift = gate_scale_ahead, gate_shift_ahead, up_scale_ahead, up_shift_ahead
            sums = sums_ahead
        else:
            gate_scale, gate_shift = scale_tile(s_ptr, n, n < WIDTH, start, K, GROUP, BITS, fits, BLOCK_K)
            up_scale, up_shift = scale_tile(s_ptr, WIDTH + n, n < WIDTH, start, K, GROUP, BITS, fits, BLOCK_K)
            gate = add_product(gate, gate_q, gate_scale, gate_shift, h, high, BITS, FAST, PRECISION)
            up = add_product(up, up_q, up_scale, up_shift, h, high, BITS, FAST, PRECISION)
    share = tl.load(weights_ptr + pair, mask=used & (place < A), other=0.0)
    share += tl.load(share_ptr + token, mask=used & (place >= A), other=0.0)
    act = gate * tl.sigmoid(gate) * up * share[None, :]
    tl.store(
        act_ptr + (place * WIDTH)[None, :] + n[:, None],
        act.to(act_ptr.dtype.element_ty),
        mask=(n < WIDTH)[:, None] & used[None, :],
    )


@triton.jit
def grouped_down_kernel(
    act_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, order_ptr, list_ptr, out_ptr, shared_blocks, A, M,
    D: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    LEAST: tl.constexpr, BEYOND: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [A + M, D] = act @ down.T for one block of pairs and BLOCK_N features; K is the expert's width."""
    shared, expert, first, pairs = block_of(list_ptr, tl.program_id(1), shared_blocks, A, M, LEAST, BEYOND, BLOCK_M)
    if pairs == 0:
        return
    width: tl.constexpr = K // 2 if BITS == 4 else K
    fits: tl.constexpr = D % BLOCK_N == 0
    if shared:
        w_ptr = shared_w_ptr
        s_ptr = shared_s_ptr
    else:
        w_ptr += expert.to(tl.int64) * (D * width)
        if BITS < 16:
            s_ptr += expert.to(tl.int64) * (2 * D * (K // GROUP))
    i = tl.arange(0, BLOCK_M)
    used = i < pairs
    place = (first + i).to(tl.int64)
    dtype = act_ptr.dtype.element_ty if FAST else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    act_row = act_ptr + place * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        q = stored_tile(w_ptr, n, n < D, start, K, BITS, fits, BLOCK_K)
        scale, shift = scale_tile(s_ptr, n, n < D, start, K, GROUP, BITS, fits, BLOCK_K)
        act, high = activation_tile(act_row, used, start, dtype, K, GROUP, BITS, BLOCK_K)
        acc = add_product(acc, q, scale, shift, act, high, BITS, FAST, PRECISION)
    pair = tl.load(order_ptr + place, mask=used & (place < A), other=0)
    row = tl.where(shared, place, pair.to(tl.int64))
    tl.store(out_ptr + (row * D)[None, :] + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=(n < D)[:, None] & used[None, :])


@triton.jit
def combine_kernel(
    x_ptr, pair_ptr, shared_ptr, y_ptr, x_stride, first, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """first: where the shared expert's rows begin."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    y = tl.load(shared_ptr + (first + m) * D + d, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        y += tl.load(pair_ptr + (m * TOP_K + choice) * D + d, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(x_ptr + m * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)


def shared_ranges(heights: Sequence[int]) -> list[tuple[int, int]]:
    """[LEAST, BEYOND) of each height, tallest first: how many tokens' shared expert it serves. A height needs 16 blocks of them,
    which with the parts of an expert are a program for each SM; the lowest takes what is less."""
    found, beyond = [], 2**31 - 1
    for height in heights:
        least = 0 if height == heights[-1] else 16 * height
        found.append((least, beyond))
        beyond = least
    return found


def can_scale_after(*, dtype: torch.dtype, kind: Kind, config: dict) -> bool:
    """Whether `add_scaled` can serve gate_up of such experts, and a height of the table's row asks for it."""
    bits, group = kind[1]
    asked = [rows["gate_up"] for rows in config.values() if rows["gate_up"]["AFTER"]]
    return bits == 4 and dtype == torch.bfloat16 and bool(asked) and all(group == 2 * row["BLOCK_K"] for row in asked)


def launch_experts(
    *, h: Tensor, sums: Tensor | None, order: Tensor, lists: Sequence[Tensor | None], pairs, tokens, choices: Tensor,
    share: Tensor, routed: ExpertTensors, shared: ExpertTensors, top_k: int, kind: Kind, config: dict,
) -> Tensor:  # fmt: skip
    """[pairs + tokens, D] in h's dtype: each pair's expert output times its weight, then the shared expert's for so many tokens.

    sums: of h over groups, None where `can_scale_after` says no; lists: blocks by height, None where there are none."""
    features, (width, up, back) = h.shape[1], kind
    act = torch.empty((pairs + tokens, width), dtype=h.dtype, device=h.device)
    out = torch.empty((pairs + tokens, features), dtype=h.dtype, device=h.device)
    heights = [config[name] for name in HEIGHTS]
    ranges = shared_ranges([rows["height"] for rows in heights])
    for rows, blocks, (least, beyond) in zip(heights, lists, ranges, strict=True):
        shared_blocks = triton.cdiv(tokens, rows["height"])
        count = shared_blocks + (0 if blocks is None else blocks.shape[0])
        blocks = order if blocks is None else blocks
        first, second = rows["gate_up"] | {"AFTER": rows["gate_up"]["AFTER"] and sums is not None}, rows["down"]
        common: dict[str, Any] = {
            "LEAST": least, "BEYOND": beyond, "FAST": h.is_cuda, "PRECISION": dot_precision(h.dtype), "BLOCK_M": rows["height"],
        }  # fmt: skip
        wrap_triton(grouped_gate_up_kernel)[(triton.cdiv(width, first["BLOCK_N"]), count)](
            h, h if sums is None else sums, *routed[:2], *shared[:2], order, blocks, choices, share, act,
            shared_blocks, pairs, tokens, WIDTH=width, K=features, TOP_K=top_k, GROUP=up[1], BITS=up[0], **common, **first,
        )  # fmt: skip
        wrap_triton(grouped_down_kernel)[(triton.cdiv(features, second["BLOCK_N"]), count)](
            act, *routed[2:], *shared[2:], order, blocks, out, shared_blocks, pairs, tokens,
            D=features, K=width, GROUP=back[1], BITS=back[0], **common, **second,
        )  # fmt: skip
    return out


@triton_op("moeexp::moe_prefill", mutates_args=())
def moe_prefill(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None,
    shared_down: Tensor,
    shared_down_scales: Tensor | None,
    shared_gate: Tensor,
) -> Tensor:
    """`reference_moe_prefill` on the GPU; the same arguments, by keyword. Any number of tokens, symbolic too.

    `ValueError` for strides or dtypes that the kernels do not take."""
    features, top_k = x.shape[-1], ids.shape[-1]
    formats = expert_formats(
        gate_up=gate_up, gate_up_scales=gate_up_scales, down=down, down_scales=down_scales, features=features, name=""
    )
    shared_formats = expert_formats(
        gate_up=shared_gate_up, gate_up_scales=shared_gate_up_scales, down=shared_down,
        down_scales=shared_down_scales, features=features, name="shared_",
    )  # fmt: skip
    flat = flat_rows(x, name="x", features=features)
    check_vectors(x=x, norm_weight=norm_weight, ids=ids, weights=weights, shared_gate=shared_gate)
    key = f"{tuning.activation_class(x.dtype)}/{tuning.weight_class(formats[1][0])}/{features}x{formats[0]}"
    config = tuning.lookup("moe_prefill", key, tuning.architecture(x.device))
    group, rows = formats[1][1], flat.shape[0]
    after = can_scale_after(dtype=x.dtype, kind=formats, config=config)
    together = formats == shared_formats and gate_up.dtype == shared_gate_up.dtype
    h = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    sums = torch.empty((rows, features // group), dtype=torch.float32, device=x.device) if after else None
    share = torch.empty((rows,), dtype=torch.float32, device=x.device)
    wrap_triton(norm_kernel)[(rows,)](
        flat, norm_weight, shared_gate, h, h if sums is None else sums, share, flat.stride(0),
        K=features, GROUP=group, EPS=eps, SUMS=after, BLOCK_K=triton.next_power_of_2(features),
    )  # fmt: skip
    routed = (gate_up, gate_up if gate_up_scales is None else gate_up_scales, down, down if down_scales is None else down_scales)
    shared = (
        shared_gate_up, shared_gate_up if shared_gate_up_scales is None else shared_gate_up_scales,
        shared_down, shared_down if shared_down_scales is None else shared_down_scales,
    )  # fmt: skip

    order, lists = sort_by_expert(ids=ids, experts=gate_up.shape[0], heights=tuple(config[name]["height"] for name in HEIGHTS))
    pairs = rows * top_k
    common: dict[str, Any] = {
        "h": h, "order": order, "choices": weights, "share": share, "routed": routed, "shared": shared, "top_k": top_k,
        "config": config,
    }  # fmt: skip
    out = launch_experts(sums=sums, lists=lists, pairs=pairs, tokens=rows if together else 0, kind=formats, **common)
    own = out
    if not together:
        own = launch_experts(sums=None, lists=[None] * len(lists), pairs=0, tokens=rows, kind=shared_formats, **common)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = min(1024, triton.next_power_of_2(features))
    wrap_triton(combine_kernel)[(rows, triton.cdiv(features, block_d))](
        flat, out, own, y, flat.stride(0), pairs if together else 0, D=features, TOP_K=top_k, BLOCK_D=block_d
    )
    return y
