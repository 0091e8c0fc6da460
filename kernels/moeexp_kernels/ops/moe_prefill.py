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

from moeexp_kernels.ops.gemm import operand_place
from moeexp_kernels.ops.linear import flat_rows
from moeexp_kernels.ops.moe import check_vectors, expert_formats
from moeexp_kernels.ops.moe_grouped import grouped_down_kernel, grouped_gate_up_kernel
from moeexp_kernels.ops.moe_sort import sort_by_expert
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.matrix import matrix_format

# Weight and scales of gate_up, then of down; a weight without scales stands for them too.
ExpertTensors = tuple[Tensor, Tensor, Tensor, Tensor]
Kind = tuple[int, tuple[int, int], tuple[int, int]]  # what `expert_formats` returns
HEIGHTS = ("tall", "middle", "low")  # of blocks: the parts of a table's row
FEW_HEIGHTS = ("low", "least")  # where experts have few pairs each
FEW_PAIRS = 16  # of an expert on average, that is


@triton.jit
def norm_kernel(
    x_ptr, norm_ptr, gate_ptr, h_ptr, extra_ptr, x_stride,
    K: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one token: h = norm(x), with IN_ORDER as `operand_place` has it; and a row of `extra` [M, 1 + K / GROUP] float32, the
    shared expert's share sigmoid(h @ gate), then h's sum over each group."""
    m = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = K // GROUP
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    h = (x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)) * (1.0 + norm)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + m * K + (operand_place(k) if IN_ORDER else k), h, mask=k < K)
    wide = h.to(tl.float32)
    extra_ptr += m * (1 + groups)
    tl.store(extra_ptr, tl.sigmoid(tl.sum(wide * gate, axis=0)))
    if BLOCK_K % GROUP == 0:
        group = tl.arange(0, BLOCK_K // GROUP)
        sums = tl.sum(tl.reshape(wide, (BLOCK_K // GROUP, GROUP)), axis=1)
        tl.store(extra_ptr + 1 + group, sums, mask=group < groups)


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
    """(LEAST, BEYOND) of each height, tallest first: how many tokens' shared expert it serves. A height needs 16 blocks of them,
    which with the parts of an expert are a program for each SM; the lowest takes what is less."""
    found, beyond = [], 2**31 - 1
    for height in heights:
        least = 0 if height == heights[-1] else 16 * height
        found.append((least, beyond))
        beyond = least
    return found


def served_heights(*, pairs: int | torch.SymInt, experts: int, config: dict) -> list[dict]:
    """Of the table's row the heights in which so many pairs run: each costs two launches. A number that only the call knows
    counts as many."""
    few = isinstance(pairs, int) and pairs <= FEW_PAIRS * experts
    return [config[name] for name in (FEW_HEIGHTS if few else HEIGHTS)]


def has_order(*, bits: int, group: int, dtype: torch.dtype) -> bool:
    """Whether activations of such weights stand in `in_operand_order`'s order: in whole words of a product of 2-byte operands."""
    return bits <= 8 and group % 32 == 0 and dtype != torch.float32


def scales_after(part: dict, *, bits: int, group: int, dtype: torch.dtype) -> bool:
    """Whether `add_scaled` serves gate_up of a height, as its row asks."""
    return part["AFTER"] and bits == 4 and dtype == torch.bfloat16 and group == 2 * part["BLOCK_K"]


def launch_experts(
    *, h: Tensor, extra: Tensor, order: Tensor, lists: Sequence[Tensor | None], pairs, tokens, choices: Tensor,
    routed: ExpertTensors, shared: ExpertTensors, kind: Kind, heights: Sequence[dict],
) -> Tensor:  # fmt: skip
    """[pairs + tokens, D] in h's dtype: each pair's expert output times its weight, then the shared expert's for so many tokens.

    heights: rows of the table; lists: the blocks of each, None where there are none."""
    features, (width, up, back) = h.shape[1], kind
    up_format = matrix_format(routed[0], bits=up[0], group=up[1])
    down_format = matrix_format(routed[2], bits=back[0], group=back[1])
    act = torch.empty((pairs + tokens, width), dtype=h.dtype, device=h.device)
    out = torch.empty((pairs + tokens, features), dtype=h.dtype, device=h.device)
    orders = tuple(has_order(bits=bits, group=group, dtype=h.dtype) for bits, group in (up, back))
    ranges = shared_ranges([row["height"] for row in heights])
    for row, blocks, shared_range in zip(heights, lists, ranges, strict=True):
        shared_blocks = triton.cdiv(tokens, row["height"])
        count = shared_blocks + (0 if blocks is None else blocks.shape[0])
        blocks = order if blocks is None else blocks
        first, second = dict(row["gate_up"]), row["down"]
        after = scales_after(first, bits=up[0], group=up[1], dtype=h.dtype)
        del first["AFTER"]
        common = {"ROUTING": (*shared_range, choices.shape[-1]), "INTERPRETED": not h.is_cuda, "BLOCK_M": row["height"]}
        wrap_triton(grouped_gate_up_kernel)[(triton.cdiv(width, first["BLOCK_N"]), count)](
            h, extra, *routed[:2], *shared[:2], order, blocks, choices, act, shared_blocks, pairs, tokens,
            FORMAT=up_format, MODE=(after, *orders), **common, **first,
        )  # fmt: skip
        wrap_triton(grouped_down_kernel)[(triton.cdiv(features, second["BLOCK_N"]), count)](
            act, *routed[2:], *shared[2:], order, blocks, out, shared_blocks, pairs, tokens,
            FORMAT=down_format, IN_ORDER=orders[1], **common, **second,
        )  # fmt: skip
    return out


def launch_norm(
    *, x: Tensor, norm_weight: Tensor, shared_gate: Tensor, eps: float, kind: Kind
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`h` and `extra` of x [M, D] as `norm_kernel` makes them for experts of such weights."""
    (rows, features), (bits, group) = x.shape, kind[1]
    h = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    extra = torch.empty((rows, 1 + features // group), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    wrap_triton(norm_kernel)[(rows,)](
        x, norm_weight, shared_gate, h, extra, x.stride(0), K=features, GROUP=group, EPS=eps,
        IN_ORDER=has_order(bits=bits, group=group, dtype=x.dtype), BLOCK_K=block,
        num_warps=4 if block > 64 else 1,  # of a row that all four would hold, each would write the same sums
    )  # fmt: skip
    return h, extra


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
    rows = flat.shape[0]
    together = formats == shared_formats and (gate_up.dtype, down.dtype) == (shared_gate_up.dtype, shared_down.dtype)
    norm: dict[str, Any] = {"x": flat, "norm_weight": norm_weight, "shared_gate": shared_gate, "eps": eps}
    h, extra = launch_norm(**norm, kind=formats)
    routed = (gate_up, gate_up if gate_up_scales is None else gate_up_scales, down, down if down_scales is None else down_scales)
    shared = (
        shared_gate_up, shared_gate_up if shared_gate_up_scales is None else shared_gate_up_scales,
        shared_down, shared_down if shared_down_scales is None else shared_down_scales,
    )  # fmt: skip

    pairs = rows * top_k
    heights = served_heights(pairs=pairs, experts=gate_up.shape[0], config=config)
    order, lists = sort_by_expert(ids=ids, experts=gate_up.shape[0], heights=tuple(row["height"] for row in heights))
    common: dict[str, Any] = {"order": order, "choices": weights, "heights": heights}
    own = out = launch_experts(
        h=h, extra=extra, lists=lists, pairs=pairs, tokens=rows if together else 0, routed=routed,
        shared=shared if together else routed, kind=formats, **common,
    )  # fmt: skip
    if not together:  # both weights of a launch must be of one type, and activations in the order that suits it
        h, extra = launch_norm(**norm, kind=shared_formats)
        own = launch_experts(
            h=h, extra=extra, lists=[None] * len(lists), pairs=0, tokens=rows, routed=shared, shared=shared, kind=shared_formats,
            **common,
        )  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_d = min(1024, triton.next_power_of_2(features))
    wrap_triton(combine_kernel)[(rows, triton.cdiv(features, block_d))](
        flat, out, own, y, flat.stride(0), pairs if together else 0, D=features, TOP_K=top_k, BLOCK_D=block_d
    )
    return y
