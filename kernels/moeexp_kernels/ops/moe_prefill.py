"""Sparse mixture of experts for many tokens: the (token, expert) pairs sorted by expert, then grouped matrix products.

Shape letters and weight layouts: `moe.py`. Also M = B * T tokens, A = M * k assignments (assignment a is choice
a % k of token a // k), and blocks of BLOCK_M assignments that share an expert.

    offsets   how many assignments each expert has, counted by one program per expert
    sort      a counting sort: expert e's assignments in token order, padded with A to whole blocks; `block_expert`
              names each block's expert, -1 beyond the last. The number of blocks depends on the data, its bound does
              not: each expert wastes less than one block, so (A + E * (BLOCK_M - 1)) // BLOCK_M blocks always suffice.
    gate_up   per block: gathers its tokens' normed rows, SwiGLU, times the routing weight -> act [A, I]
    down      per block: act @ down.T -> pair_out [A, D]; each assignment has its own row, so that nothing is added in
              memory and no order of programs shows
    combine   y[m] = x[m] + its k rows of pair_out in order of choice + the shared expert's row

The shared expert goes through the same two kernels as one expert that every token chose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gemm import dot_precision, features_of, launch_rms_norm, weight_tile
from moeexp_kernels.ops.linear import flat_rows
from moeexp_kernels.ops.moe import check_vectors, expert_formats
from moeexp_kernels.parts import tuning


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
def sort_kernel(
    ids_ptr, counts_ptr, sorted_ptr, block_expert_ptr, A, blocks,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program e writes expert e's blocks; the last program also marks the unused blocks. Every element is written once,
    by one program (`sorted` of unused blocks stays unwritten and is never read)."""
    e = tl.program_id(0)
    others = tl.arange(0, E_PADDED)
    counts = tl.load(counts_ptr + others, mask=others < E, other=0)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(others < e, needed, 0), axis=0)
    mine = tl.sum(tl.where(others == e, needed, 0), axis=0)
    count = tl.sum(tl.where(others == e, counts, 0), axis=0)
    done = 0
    for start in range(0, A, BLOCK):
        a = start + tl.arange(0, BLOCK)
        match = (tl.load(ids_ptr + a, mask=a < A, other=-1) == e).to(tl.int32)
        place = first * BLOCK_M + done + tl.cumsum(match, axis=0) - 1
        tl.store(sorted_ptr + place, a, mask=match != 0)
        done += tl.sum(match, axis=0)
    pad = count + tl.arange(0, BLOCK_M)
    tl.store(sorted_ptr + first * BLOCK_M + pad, pad * 0 + A, mask=pad < mine * BLOCK_M)
    for start in range(0, mine, BLOCK):
        b = start + tl.arange(0, BLOCK)
        tl.store(block_expert_ptr + first + b, b * 0 + e, mask=b < mine)
    if e == E - 1:
        for start in range(first + mine, blocks, BLOCK):
            b = start + tl.arange(0, BLOCK)
            tl.store(block_expert_ptr + b, b * 0 - 1, mask=b < blocks)


@triton.jit
def block_rows(sorted_ptr, block, total, ROUTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The block's assignments int64 [BLOCK_M]; those from total on are padding. The shared expert takes in order."""
    slot = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if ROUTED:
        return tl.load(sorted_ptr + slot).to(tl.int64)  # a used block is written in full
    else:
        return slot


@triton.jit
def grouped_gate_up_kernel(
    h_ptr, w_ptr, s_ptr, sorted_ptr, block_expert_ptr, share_ptr, act_ptr, total,
    WIDTH: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    ROUTED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act [total, I] = share * silu(gate) * up, for one block of assignments and BLOCK_N of the expert's I rows.

    Grid (rows of the expert, blocks), the former fast: a block's programs read the same tokens. As in `gemm_kernel` the
    weights are the first operand, and BLOCK_K counts stored columns."""
    block = tl.program_id(1)
    expert = 0
    if ROUTED:
        expert = tl.load(block_expert_ptr + block)
        if expert < 0:
            return
    a = block_rows(sorted_ptr, block, total, ROUTED, BLOCK_M)
    used = a < total
    width: tl.constexpr = K // 2 if BITS == 4 else K
    dtype = h_ptr.dtype.element_ty if FAST else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_row = expert * tl.full([], 2 * WIDTH, tl.int64) + n
    up_row = gate_row + WIDTH
    h_row = h_ptr + (a // TOP_K) * K
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        gate_low, gate_high = weight_tile(w_ptr, s_ptr, gate_row, n < WIDTH, start, dtype, K, GROUP, BITS, BLOCK_K, FAST)
        up_low, up_high = weight_tile(w_ptr, s_ptr, up_row, n < WIDTH, start, dtype, K, GROUP, BITS, BLOCK_K, FAST)
        column = start + tl.arange(0, BLOCK_K)
        k = features_of(column, GROUP, BITS)
        mask = (column < width)[:, None] & used[None, :]
        h = tl.load(h_row[None, :] + k[:, None], mask=mask, other=0.0).to(dtype)
        gate = tl.dot(gate_low, h, gate, input_precision=PRECISION)
        up = tl.dot(up_low, h, up, input_precision=PRECISION)
        if BITS == 4:
            h = tl.load(h_row[None, :] + k[:, None] + GROUP // 2, mask=mask, other=0.0).to(dtype)
            gate = tl.dot(gate_high, h, gate, input_precision=PRECISION)
            up = tl.dot(up_high, h, up, input_precision=PRECISION)
    share = tl.load(share_ptr + a, mask=used, other=0.0)
    act = gate * tl.sigmoid(gate) * up * share[None, :]
    tl.store(
        act_ptr + (a * WIDTH)[None, :] + n[:, None],
        act.to(act_ptr.dtype.element_ty),
        mask=(n < WIDTH)[:, None] & used[None, :],
    )


@triton.jit
def grouped_down_kernel(
    act_ptr, w_ptr, s_ptr, sorted_ptr, block_expert_ptr, out_ptr, total,
    D: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    ROUTED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [total, D] = act @ down.T for one block of assignments and BLOCK_N features; K is the expert's width."""
    block = tl.program_id(1)
    expert = 0
    if ROUTED:
        expert = tl.load(block_expert_ptr + block)
        if expert < 0:
            return
    a = block_rows(sorted_ptr, block, total, ROUTED, BLOCK_M)
    used = a < total
    width: tl.constexpr = K // 2 if BITS == 4 else K
    dtype = act_ptr.dtype.element_ty if FAST else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = expert * tl.full([], D, tl.int64) + n
    act_row = act_ptr + a * K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        low, high = weight_tile(w_ptr, s_ptr, row, n < D, start, dtype, K, GROUP, BITS, BLOCK_K, FAST)
        column = start + tl.arange(0, BLOCK_K)
        k = features_of(column, GROUP, BITS)
        mask = (column < width)[:, None] & used[None, :]
        act = tl.load(act_row[None, :] + k[:, None], mask=mask, other=0.0).to(dtype)
        acc = tl.dot(low, act, acc, input_precision=PRECISION)
        if BITS == 4:
            act = tl.load(act_row[None, :] + k[:, None] + GROUP // 2, mask=mask, other=0.0).to(dtype)
            acc = tl.dot(high, act, acc, input_precision=PRECISION)
    tl.store(out_ptr + (a * D)[None, :] + n[:, None], acc.to(out_ptr.dtype.element_ty), mask=(n < D)[:, None] & used[None, :])


@triton.jit
def shared_gate_kernel(h_ptr, gate_ptr, out_ptr, K: tl.constexpr, K_PADDED: tl.constexpr):
    """out[m] = sigmoid(h[m] @ gate), float32."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PADDED)
    h = tl.load(h_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + m, tl.sigmoid(tl.sum(h * gate, axis=0)))


@triton.jit
def combine_kernel(
    x_ptr, pair_ptr, shared_ptr, y_ptr, x_stride, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    y = tl.load(shared_ptr + m * D + d, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        y += tl.load(pair_ptr + (m * TOP_K + choice) * D + d, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(x_ptr + m * x_stride + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)


def block_bound(*, assignments, experts: int, block_m: int):
    """Blocks that any routing fits into; `assignments` may be symbolic."""
    return (assignments + experts * (block_m - 1)) // block_m


def sort_by_expert(*, ids: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """ids int32 [..., k] contiguous, in 0..E-1 -> (sorted int32 [blocks * block_m], block_expert int32 [blocks])."""
    assignments = ids.numel()
    blocks = block_bound(assignments=assignments, experts=experts, block_m=block_m)
    counts = torch.empty((experts,), dtype=torch.int32, device=ids.device)
    order = torch.empty((blocks * block_m,), dtype=torch.int32, device=ids.device)
    block_expert = torch.empty((blocks,), dtype=torch.int32, device=ids.device)
    wrap_triton(count_kernel)[(experts,)](ids, counts, assignments, BLOCK=1024)
    wrap_triton(sort_kernel)[(experts,)](
        ids, counts, order, block_expert, assignments, blocks,
        E=experts, E_PADDED=triton.next_power_of_2(experts), BLOCK_M=block_m, BLOCK=1024,
    )  # fmt: skip
    return order, block_expert


def launch_experts(
    *, h: Tensor, share: Tensor, order: Tensor | None, block_expert: Tensor | None, total, blocks, top_k: int,
    gate_up: Tensor, gate_up_scales: Tensor | None, down: Tensor, down_scales: Tensor | None, width: int,
    up: tuple[int, int], back: tuple[int, int], block_m: int, config: dict,
) -> Tensor:  # fmt: skip
    """[total, D] in h's dtype: every assignment's expert output times its share. order None: one expert for all."""
    features = h.shape[1]
    act = torch.empty((total, width), dtype=h.dtype, device=h.device)
    out = torch.empty((total, features), dtype=h.dtype, device=h.device)
    common = {"ROUTED": order is not None, "FAST": h.is_cuda, "PRECISION": dot_precision(h.dtype), "BLOCK_M": block_m}
    order, block_expert = (share, share) if order is None else (order, block_expert)
    first, second = config["gate_up"], config["down"]
    wrap_triton(grouped_gate_up_kernel)[(triton.cdiv(width, first["BLOCK_N"]), blocks)](
        h, gate_up, gate_up if gate_up_scales is None else gate_up_scales, order, block_expert, share, act, total,
        WIDTH=width, K=features, TOP_K=top_k, GROUP=up[1], BITS=up[0], **common, **first,
    )  # fmt: skip
    wrap_triton(grouped_down_kernel)[(triton.cdiv(features, second["BLOCK_N"]), blocks)](
        act, down, down if down_scales is None else down_scales, order, block_expert, out, total,
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
    width, up, back = expert_formats(
        gate_up=gate_up, gate_up_scales=gate_up_scales, down=down, down_scales=down_scales, features=features, name=""
    )
    shared_width, shared_up, shared_back = expert_formats(
        gate_up=shared_gate_up, gate_up_scales=shared_gate_up_scales, down=shared_down,
        down_scales=shared_down_scales, features=features, name="shared_",
    )  # fmt: skip
    flat = flat_rows(x, name="x", features=features)
    check_vectors(x=x, norm_weight=norm_weight, ids=ids, weights=weights, shared_gate=shared_gate)
    rows = flat.shape[0]
    h = launch_rms_norm(x=flat, norm_weight=norm_weight, eps=eps, dtype=x.dtype)
    gate = torch.empty((rows,), dtype=torch.float32, device=x.device)
    wrap_triton(shared_gate_kernel)[(rows,)](h, shared_gate, gate, K=features, K_PADDED=triton.next_power_of_2(features))
    key = f"{tuning.activation_class(x.dtype)}/{tuning.weight_class(up[0])}/{features}x{width}"
    config = tuning.lookup("moe_prefill", key, tuning.architecture(x.device))
    experts, block_m = gate_up.shape[0], config["block_m"]
    order, block_expert = sort_by_expert(ids=ids, experts=experts, block_m=block_m)
    pairs = launch_experts(
        h=h, share=weights, order=order, block_expert=block_expert, total=rows * top_k, blocks=block_expert.shape[0],
        top_k=top_k, gate_up=gate_up, gate_up_scales=gate_up_scales, down=down, down_scales=down_scales, width=width,
        up=up, back=back, block_m=block_m, config=config,
    )  # fmt: skip
    shared = launch_experts(
        h=h, share=gate, order=None, block_expert=None, total=rows, blocks=triton.cdiv(rows, config["shared_m"]),
        top_k=1, gate_up=shared_gate_up, gate_up_scales=shared_gate_up_scales, down=shared_down,
        down_scales=shared_down_scales, width=shared_width, up=shared_up, back=shared_back,
        block_m=config["shared_m"], config=config,
    )  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = min(1024, triton.next_power_of_2(features))
    wrap_triton(combine_kernel)[(rows, triton.cdiv(features, block_d))](
        flat, pairs, shared, y, flat.stride(0), D=features, TOP_K=top_k, BLOCK_D=block_d
    )
    return y
