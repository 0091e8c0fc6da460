"""Attention of a few tokens over the KV cache, the slots in use split over programs ("split-K", flash decoding).

Shape letters and layouts: `attention.py`. The grid is fixed by S, the work by `positions`; partial softmaxes are merged exactly
in a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.attention import (
    HEAD_DIM,
    KV_HEADS,
    PADDED_HEAD,
    QUERIES,
    attend_block,
    check_cache,
    check_queries,
    decode_config,
    heads_of,
    load_block,
    tuned,
    unsplit,
)
from moeexp_kernels.ops.linear_tile import launch_limbs
from moeexp_kernels.parts.limbs import empty_limbs, store_part_limbs
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next


@triton.jit
def split_range(kv_len, split, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Slots [begin, end) of this split: whole blocks, spread evenly; empty for the splits that are not needed."""
    blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_N
    return tl.minimum(split * share, kv_len), tl.minimum((split + 1) * share, kv_len)


@triton.jit
def _attend_splits_kernel(
    q, k_cache, v_cache, positions, partial_sums, partial_stats, tokens, slots, q_stride_b, q_stride_t, cache_stride_b,
    cache_stride_h,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, SPLITS, B * T): the query heads of one key-value head and token over a share of its slots.

    Slots before this call's hold what earlier steps wrote. So of the first block, for a short context the only one, they are
    read before the wait, past L1, and behind it only those that the kernel before writes. INTERPRETED: as in `attention.py`."""
    GROUP: tl.constexpr = HEADS[QUERIES]
    DH: tl.constexpr = HEADS[HEAD_DIM]
    BLOCK_D: tl.constexpr = HEADS[PADDED_HEAD]
    kv_head, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, t = token // tokens, token % tokens
    first = tl.load(positions + b, cache_modifier=".cg")  # slot of the call's first token
    position = (first + t).to(tl.int32)
    kv_len = tl.maximum(tl.minimum(position + 1, slots), 0)
    begin, end = split_range(kv_len, split, BLOCK_N, SPLITS)
    if begin < end:  # the others write nothing, and the merge reads nothing of theirs
        row, column, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        used = (row < GROUP)[:, None] & (d < DH)[None, :]
        cache = b * cache_stride_b + kv_head.to(tl.int64) * cache_stride_h + begin.to(tl.int64) * DH
        keys, values = k_cache + cache, v_cache + cache
        cells, slot = column[:, None] * DH + d[None, :], begin + column
        old = ((slot < end) & (slot < first))[:, None] & (d < DH)[None, :]
        key = tl.load(keys + cells, mask=old, other=0.0, cache_modifier=".cg")
        value = tl.load(values + cells, mask=old, other=0.0, cache_modifier=".cg")

        ready = after_previous(PDL)
        q += ready
        keys += ready
        values += ready
        partial_sums += ready
        partial_stats += ready
        head = kv_head * GROUP + row
        q_tile = tl.load(q + b * q_stride_b + t * q_stride_t + (head * DH)[:, None] + d[None, :], mask=used, other=0.0)
        if INTERPRETED and q.dtype.element_ty == tl.bfloat16:
            q_tile = q_tile.to(tl.float32)
        new = ((slot < end) & (slot >= first))[:, None] & (d < DH)[None, :]
        key = tl.where(new, tl.load(keys + cells, mask=new, other=0.0, cache_modifier=".cg"), key)
        value = tl.where(new, tl.load(values + cells, mask=new, other=0.0, cache_modifier=".cg"), value)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Below every score but finite: for a row that has seen nothing, -inf - -inf would be NaN.
        largest = tl.full([BLOCK_M], -3e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        last = row * 0 + position
        acc, largest, total = attend_block(q_tile, key, value, begin, last, acc, largest, total, True, HEADS, BLOCK_N)
        plain = tl.minimum(kv_len // BLOCK_N * BLOCK_N, end)  # every slot below is one to see
        for n in range(begin + BLOCK_N, plain, BLOCK_N):
            keys += BLOCK_N * DH
            values += BLOCK_N * DH
            key, value = load_block(keys, values, n, kv_len, True, HEADS, BLOCK_N)
            acc, largest, total = attend_block(q_tile, key, value, n, last, acc, largest, total, False, HEADS, BLOCK_N)
        for n in range(tl.maximum(plain, begin + BLOCK_N), end, BLOCK_N):
            keys += BLOCK_N * DH
            values += BLOCK_N * DH
            key, value = load_block(keys, values, n, kv_len, False, HEADS, BLOCK_N)
            acc, largest, total = attend_block(q_tile, key, value, n, last, acc, largest, total, True, HEADS, BLOCK_N)
        cell = ((token * SPLITS + split) * HEADS[KV_HEADS] + kv_head) * GROUP + row
        tl.store(partial_sums + cell[:, None] * DH + d[None, :], acc, mask=used)
        tl.store(partial_stats + cell * 2, largest, mask=row < GROUP)
        tl.store(partial_stats + cell * 2 + 1, total, mask=row < GROUP)


@triton.jit
def _merge_kernel(
    partial_sums, partial_stats, qkv, positions, out, limbs_ptr, units_ptr, tokens, slots, qkv_stride_b, qkv_stride_t,
    H: tl.constexpr, DH: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (H, blocks of Dh, B * T): exact sum of the splits' partial softmaxes, in split order, times sigmoid(gate), with GROUP,
    a divisor of BLOCK_D, also as limbs.

    Gate and positions were complete before the previous kernel, which reads the same row and positions; past L1."""
    head, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, t = row // tokens, row % tokens
    positions += start_next(PDL)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DH
    split = tl.arange(0, SPLITS)
    position = (tl.load(positions + b, cache_modifier=".cg") + t).to(tl.int32)
    kv_len = tl.maximum(tl.minimum(position + 1, slots), 0)
    begin, end = split_range(kv_len, split, BLOCK_N, SPLITS)
    written = begin < end
    gate_cells = b * qkv_stride_b + t * qkv_stride_t + head * 2 * DH + DH + d
    gate = tl.load(qkv + gate_cells, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    ready = after_previous(PDL)
    partial_sums += ready
    partial_stats += ready
    out += ready
    cell = (row * SPLITS + split) * H + head
    largest = tl.load(partial_stats + cell * 2, mask=written, other=float("-inf"))
    total = tl.load(partial_stats + cell * 2 + 1, mask=written, other=0.0)
    sums = tl.load(partial_sums + cell[:, None] * DH + d[None, :], mask=written[:, None] & inside[None, :], other=0.0)
    pivot = tl.max(largest, 0)
    share = tl.exp2(largest - tl.where(pivot == float("-inf"), 0.0, pivot))
    whole = tl.sum(total * share, 0)
    result = tl.sum(sums * share[:, None], 0) / tl.where(whole > 0.0, whole, 1.0)
    result = (result * tl.sigmoid(gate)).to(out.dtype.element_ty)
    tl.store(out + (row * H + head) * DH + d, result, mask=inside)
    if GROUP:
        first = head * DH + tl.program_id(1) * BLOCK_D
        store_part_limbs(
            limbs_ptr + ready, units_ptr + ready, result.to(tl.float32), row, first, H * DH, GROUP, out.dtype.element_ty
        )


def launch_splitk(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, group: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, limbs, units), the last two of out in groups of `group`, or anything without: checks the arguments of both ops and
    runs their kernels."""
    batch, tokens, heads, head_dim = q.shape
    if not isinstance(tokens, int):
        raise ValueError(
            f"sdpa_decode splitk takes a fixed number of tokens a call, not {tokens}; choose `tiled`, or prefill them"
        )
    check_cache(k_cache, v_cache, qkv, heads)
    check_queries(q, qkv, head_dim=k_cache.shape[3], positions=positions)
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    config = decode_config(q, k_cache)
    programs = tuned("attention_splits", q)["programs"]
    splits = splitk_splits(
        batch=batch, kv_heads=kv_heads, slots=slots, block_n=config["BLOCK_N"], programs=programs
    )  # fmt: skip
    if splits == 1:
        out = unsplit(q, qkv, k_cache, v_cache, positions, config)
        return out, *limbs_after(out, group)
    out = torch.empty((batch, tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    sums = torch.empty((batch * tokens, splits, heads, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((batch * tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    wrap_triton(_attend_splits_kernel)[(kv_heads, splits, batch * tokens)](
        q, k_cache, v_cache, positions, sums, stats, tokens, slots, q.stride(0), q.stride(1), k_cache.stride(0),
        k_cache.stride(1),
        HEADS=heads_of(q, k_cache), SPLITS=splits, INTERPRETED=not q.is_cuda, PDL=has_pdl(q), **config,
    )  # fmt: skip
    merge = tuned("attention_merge", q)
    block, limbs, units = max(merge["BLOCK_D"], group), out, out
    whole = group if head_dim % block == 0 else 0  # a program has so many groups
    if whole:
        limbs, units = empty_limbs(rows=batch * tokens, features=heads * head_dim, group=group, dtype=q.dtype, device=q.device)
    wrap_triton(_merge_kernel)[(heads, triton.cdiv(head_dim, block), batch * tokens)](
        sums, stats, qkv, positions, out, limbs, units, tokens, slots, qkv.stride(0), qkv.stride(1),
        H=heads, DH=head_dim, SPLITS=splits, GROUP=whole, BLOCK_N=config["BLOCK_N"], BLOCK_D=block, PDL=has_pdl(q),
        num_warps=merge["num_warps"],
    )  # fmt: skip
    return (out, limbs, units) if whole else (out, *limbs_after(out, group))


def limbs_after(out: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(limbs, units) of out [B, T, K] in groups of `group` by a kernel of their own, or anything without."""
    return launch_limbs(x=out.view(-1, out.shape[-1]), norm_weight=None, eps=0.0, group=group) if group else (out, out)


@triton_op("moeexp::sdpa_decode_splitk", mutates_args=())
def sdpa_decode_splitk(q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """`reference_sdpa` of a few tokens, each with its slots of each key-value head split over programs, as many as for one
    token: to the bit what a call for each computes. [B, T, H*Dh].

    The grid is fixed by S, the work by `positions`: a short context in a large cache reads only those in use."""
    return launch_splitk(q, qkv, k_cache, v_cache, positions)[0]


@triton_op("moeexp::sdpa_decode_limbs", mutates_args=())
def sdpa_decode_limbs(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`sdpa_decode_splitk`, and its result as limbs and units in groups of `group`, which `linear` takes (`parts/limbs.py`)."""
    return launch_splitk(q, qkv, k_cache, v_cache, positions, group)


def splitk_splits(*, batch: int, kv_heads: int, slots: int, block_n: int, programs: int) -> int:
    """Number of splits (a power of two) of a key-value head: enough to fill the GPU with about `programs` programs over
    batch, key-value heads and splits, never more than blocks of slots."""
    wanted = max(1, min(programs // (batch * kv_heads), triton.cdiv(slots, block_n)))
    return 1 << (wanted.bit_length() - 1)
