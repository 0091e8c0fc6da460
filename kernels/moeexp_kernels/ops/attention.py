"""Gated full attention over the KV cache. What comes between it and the input projection is in `qk_norm_rope.py`.

Shape letters: B batch, T tokens of this call, S cache slots (max_seq_len), H / Hkv query / key-value heads (H a multiple
of Hkv), Dh head dim, R rotary dims (the first R of Dh, split-half convention).

    qkv        [B, T, (2*H + 2*Hkv)*Dh]  rows of the input projection: per query head q | gate, then k heads, then v heads
    q_norm, k_norm  [Dh]                 unit-offset RMSNorm over the head dim
    inv_freq   [R/2] float32
    positions  [B] int64                 absolute position of each row's first token: slots [pos, pos+T) are written
    k_cache, v_cache  [B, Hkv, S, Dh]    qkv's dtype; updated in place

Slots at or beyond pos + T never contribute, whatever they hold (NaN included).

The kernels keep one tile of query rows in registers, where a row is one (token, query head) pair of one key-value head:
K and V are read once for all query heads that share them, and T = 1 is not a special case. The softmax runs over blocks
of slots with a running maximum (Milakov, Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691); `splitk` gives each
program a share of the slots in use and merges the partial sums exactly in a second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next

MAX_HEAD_DIM, MAX_GROUP = 256, 64
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# HEADS: the layer's heads as one constexpr, read by these names; a plain tuple, as FORMAT of `matrix.py` is, and why.
KV_HEADS: tl.constexpr = tl.constexpr(0)  # Hkv
QUERIES: tl.constexpr = tl.constexpr(1)  # query heads of a key-value head
HEAD_DIM: tl.constexpr = tl.constexpr(2)  # Dh
PADDED_HEAD: tl.constexpr = tl.constexpr(3)  # Dh, rounded up to a power of 2 that a product takes


@triton.jit
def _split_range(kv_len, split, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Slots [begin, end) of this split: whole blocks, spread evenly; empty for the splits that are not needed."""
    blocks = (kv_len + BLOCK_N - 1) // BLOCK_N
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_N
    return tl.minimum(split * share, kv_len), tl.minimum((split + 1) * share, kv_len)


@triton.jit
def _attend_block(
    q_tile, keys, values, n, last, kv_len, acc, largest, total,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax (base 2) over slots [n, n + BLOCK_N), where `keys` and `values` point at slot n.

    Slots at or beyond `kv_len` are never loaded. Products are of q_tile's dtype."""
    DH: tl.constexpr = HEADS[HEAD_DIM]
    SCALE: tl.constexpr = DH**-0.5 * LOG2_E
    column, d = tl.arange(0, BLOCK_N), tl.arange(0, HEADS[PADDED_HEAD])
    cells = column[:, None] * DH + d[None, :]
    inside = (n + column < kv_len)[:, None] & (d < DH)[None, :]
    key = tl.load(keys + cells, mask=inside, other=0.0).to(q_tile.dtype)
    value = tl.load(values + cells, mask=inside, other=0.0).to(q_tile.dtype)
    score = tl.dot(q_tile, tl.trans(key), input_precision="ieee") * SCALE
    if CAUSAL:
        score = tl.where((n + column)[None, :] <= last[:, None], score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, 1))
    weight = tl.exp2(score - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    total = total * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return acc, new_largest, total


@triton.jit
def _attend_kernel(
    q, qkv, k_cache, v_cache, positions, lengths, out, partial_sums, partial_stats, tokens, slots,
    q_stride_b, q_stride_t, qkv_stride_b, qkv_stride_t, cache_stride_b, cache_stride_h,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, INTERPRETED: tl.constexpr, HAS_VALID_LEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, tiles * SPLITS, B), where row r of a key-value head is token r // GROUP, query head r % GROUP of its group.
    With SPLITS beyond 1 (Hkv, SPLITS, B * T): one token a program, whose splits are then those of a call of its own.

    INTERPRETED: float32 products of bfloat16, of which Triton's interpreter multiplies the bit patterns."""
    HKV: tl.constexpr = HEADS[KV_HEADS]
    GROUP: tl.constexpr = HEADS[QUERIES]
    DH: tl.constexpr = HEADS[HEAD_DIM]
    BLOCK_D: tl.constexpr = HEADS[PADDED_HEAD]
    ready = after_previous(PDL)
    q += ready
    qkv += ready
    positions += ready
    k_cache += ready
    v_cache += ready
    out += ready
    partial_sums += ready
    partial_stats += ready
    kv_head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    own, count = b * 0, tokens  # the first token of this program's rows, and how many they are of
    if SPLITS > 1:
        own, b, count = b % tokens, b // tokens, 1
    split = tl.program_id(1) % SPLITS
    # Late tokens see the most slots: start them first, so that the last programs to run are short ones.
    tile = tl.num_programs(1) // SPLITS - 1 - tl.program_id(1) // SPLITS
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = row // GROUP, kv_head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    used = (t < count)[:, None] & (d < DH)[None, :]
    position = (tl.load(positions + b) + own).to(tl.int32)
    last = tl.where(t < count, position + t, -1)
    first_t = tile * BLOCK_M // GROUP
    last_t = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, count - 1)
    if HAS_VALID_LEN:
        last_t = tl.minimum(last_t, tl.load(lengths + b).to(tl.int32) - 1)
    kv_len = tl.maximum(tl.minimum(position + last_t + 1, slots), 0)
    # Below `plain` every row of the tile sees every slot, so the causal comparison is left out.
    plain = tl.maximum(tl.minimum(position + first_t + 1, kv_len), 0) // BLOCK_N * BLOCK_N
    begin, end = _split_range(kv_len, split, BLOCK_N, SPLITS)

    t_wide = own + t
    q_cells = b * q_stride_b + t_wide[:, None] * q_stride_t + (head * DH)[:, None] + d[None, :]
    q_tile = tl.load(q + q_cells, mask=used, other=0.0)
    if INTERPRETED and q.dtype.element_ty == tl.bfloat16:
        q_tile = q_tile.to(tl.float32)
    cache = b * cache_stride_b + kv_head.to(tl.int64) * cache_stride_h + begin.to(tl.int64) * DH
    keys, values = k_cache + cache, v_cache + cache
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Below every score but finite: for a row that has seen nothing, -inf - -inf would be NaN.
    largest = tl.full([BLOCK_M], -3e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in range(begin, tl.minimum(plain, end), BLOCK_N):
        acc, largest, total = _attend_block(
            q_tile, keys, values, n, last, kv_len, acc, largest, total, False, HEADS, BLOCK_N
        )  # fmt: skip
        keys += BLOCK_N * DH
        values += BLOCK_N * DH
    for n in range(tl.maximum(plain, begin), end, BLOCK_N):
        acc, largest, total = _attend_block(
            q_tile, keys, values, n, last, kv_len, acc, largest, total, True, HEADS, BLOCK_N
        )  # fmt: skip
        keys += BLOCK_N * DH
        values += BLOCK_N * DH

    if SPLITS == 1:
        result = tl.where(total[:, None] > 0.0, acc / tl.where(total > 0.0, total, 1.0)[:, None], 0.0)
        gate_cells = b * qkv_stride_b + t_wide[:, None] * qkv_stride_t + (head * (2 * DH) + DH)[:, None] + d[None, :]
        gate = tl.load(qkv + gate_cells, mask=used, other=0.0).to(tl.float32)
        out_cells = ((b * tokens + t_wide) * (HKV * GROUP) + head)[:, None] * DH + d[None, :]
        tl.store(out + out_cells, (result * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=used)
    else:
        # One token: row r is query head r. Splits beyond the slots in use write nothing, and the merge reads nothing there.
        cell = (((b * tokens + own) * SPLITS + split) * HKV + kv_head) * GROUP + row
        written = row < tl.where(begin < end, GROUP, 0)
        tl.store(partial_sums + cell[:, None] * DH + d[None, :], acc, mask=written[:, None] & (d < DH)[None, :])
        tl.store(partial_stats + cell * 2, largest, mask=written)
        tl.store(partial_stats + cell * 2 + 1, total, mask=written)


@triton.jit
def _merge_kernel(
    partial_sums, partial_stats, qkv, positions, out, tokens, slots, qkv_stride_b, qkv_stride_t,
    H: tl.constexpr, DH: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (H, blocks of Dh, B * T): exact sum of the splits' partial softmaxes, in split order, times sigmoid(gate).

    Gate and positions were complete before the previous kernel, which reads the same row and positions; past L1."""
    head, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, t = row // tokens, row % tokens
    positions += start_next(PDL)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < DH
    split = tl.arange(0, SPLITS)
    position = (tl.load(positions + b, cache_modifier=".cg") + t).to(tl.int32)
    kv_len = tl.maximum(tl.minimum(position + 1, slots), 0)
    begin, end = _split_range(kv_len, split, BLOCK_N, SPLITS)
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
    tl.store(out + (row * H + head) * DH + d, (result * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=inside)


def check_cache(k_cache: Tensor, v_cache: Tensor, qkv: Tensor, heads: int) -> None:
    """`ValueError` for what the kernels cannot do. Only static sizes are looked at, so that T may be symbolic."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dim {head_dim} is not supported: at most {MAX_HEAD_DIM}; choose the `reference` op")
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise ValueError(
            f"{heads} query heads over {kv_heads} key-value heads are not supported: the first must be 1 to {MAX_GROUP} "
            "times the second; choose the `reference` op"
        )
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"qkv is {qkv.dtype}; supported are float32, bfloat16 and float16")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != qkv.dtype:
            raise ValueError(f"{name} is {cache.dtype} but qkv is {qkv.dtype}; they must agree")
        if cache.stride(3) != 1 or cache.stride(2) != head_dim or cache.stride() != k_cache.stride():
            raise ValueError(
                f"{name} has strides {tuple(cache.stride())}; supported is [B, Hkv, S, Dh] with contiguous [S, Dh] and the "
                "same strides for both caches"
            )
    if qkv.stride(2) != 1 or qkv.shape[2] != 2 * (heads + kv_heads) * head_dim:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)} and strides {tuple(qkv.stride())}; supported are "
            f"{2 * (heads + kv_heads) * head_dim} values per token, the last dim contiguous"
        )


def _check_queries(q: Tensor, qkv: Tensor, head_dim: int, positions: Tensor) -> None:
    check_argument(positions, name="positions", shape=(q.shape[0],), dtypes=(torch.int64,))
    if q.dtype != qkv.dtype or q.shape[3] != head_dim or q.stride(3) != 1 or q.stride(2) != head_dim:
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)} with strides {tuple(q.stride())}; supported is [B, T, H, {head_dim}] of "
            f"{qkv.dtype} with contiguous [H, Dh]"
        )


def block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def tuned(op: str, q: Tensor) -> dict[str, int]:
    """The table's row for queries [B, T, H, Dh] of this dtype and head dim."""
    key = f"{tuning.activation_class(q.dtype)}/{block_d(q.shape[3])}"
    return tuning.lookup(op, key, tuning.architecture(q.device))


def _attend(q, qkv, k_cache, v_cache, positions, out, sums, stats, *, splits, tiles, config, valid_len=None) -> None:
    """`out` is written if splits is 1, else `sums` and `stats`; callers pass `q` for what is neither read nor written."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    wrap_triton(_attend_kernel)[(kv_heads, tiles * splits, batch if splits == 1 else batch * tokens)](
        q, qkv, k_cache, v_cache, positions, positions if valid_len is None else valid_len, out, sums, stats, tokens, slots,
        q.stride(0), q.stride(1), qkv.stride(0), qkv.stride(1), k_cache.stride(0), k_cache.stride(1),
        HEADS=(kv_heads, heads // kv_heads, head_dim, block_d(head_dim)), SPLITS=splits, INTERPRETED=not q.is_cuda,
        HAS_VALID_LEN=valid_len is not None, PDL=has_pdl(q), **config,
    )  # fmt: skip


def _unsplit(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, config: dict[str, int],
    valid_len: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, tokens, heads, head_dim = q.shape
    check_cache(k_cache, v_cache, qkv, heads)
    _check_queries(q, qkv, k_cache.shape[3], positions)
    out = torch.empty((batch, tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    tiles = (tokens * (heads // k_cache.shape[1]) + config["BLOCK_M"] - 1) // config["BLOCK_M"]
    _attend(q, qkv, k_cache, v_cache, positions, out, q, q, splits=1, tiles=tiles, config=config, valid_len=valid_len)
    return out


@triton_op("moeexp::sdpa_prefill", mutates_args=())
def sdpa_prefill(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, valid_len: Tensor | None = None
) -> Tensor:
    """`reference_sdpa` for any T (symbolic too) and any position, on tensor cores for 2-byte dtypes. [B, T, H*Dh]."""
    return _unsplit(q, qkv, k_cache, v_cache, positions, tuned("attention_prefill", q), valid_len)


@triton_op("moeexp::sdpa_decode_tiled", mutates_args=())
def sdpa_decode_tiled(q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """`reference_sdpa` at T = 1, one program per key-value head over all slots in use: one kernel, best for short contexts."""
    return _unsplit(q, qkv, k_cache, v_cache, positions, _decode_config(q, k_cache))


@triton_op("moeexp::sdpa_decode_splitk", mutates_args=())
def sdpa_decode_splitk(q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """`reference_sdpa` of a few tokens, each with its slots of each key-value head split over programs, as many as for one
    token: to the bit what a call for each computes. [B, T, H*Dh].

    The grid is fixed by S, the work by `positions`: a short context in a large cache reads only those in use."""
    batch, tokens, heads, head_dim = q.shape
    if not isinstance(tokens, int):
        raise ValueError(
            f"sdpa_decode splitk takes a fixed number of tokens a call, not {tokens}; choose `tiled`, or prefill them"
        )
    check_cache(k_cache, v_cache, qkv, heads)
    _check_queries(q, qkv, k_cache.shape[3], positions)
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    config = _decode_config(q, k_cache)
    programs = tuned("attention_splits", q)["programs"]
    splits = splitk_splits(
        batch=batch, kv_heads=kv_heads, slots=slots, block_n=config["BLOCK_N"], programs=programs
    )  # fmt: skip
    if splits == 1:
        return _unsplit(q, qkv, k_cache, v_cache, positions, config)
    out = torch.empty((batch, tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    sums = torch.empty((batch * tokens, splits, heads, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((batch * tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    _attend(q, qkv, k_cache, v_cache, positions, q, sums, stats, splits=splits, tiles=1, config=config)
    merge = tuned("attention_merge", q)
    wrap_triton(_merge_kernel)[(heads, triton.cdiv(head_dim, merge["BLOCK_D"]), batch * tokens)](
        sums, stats, qkv, positions, out, tokens, slots, qkv.stride(0), qkv.stride(1),
        H=heads, DH=head_dim, SPLITS=splits, BLOCK_N=config["BLOCK_N"], BLOCK_D=merge["BLOCK_D"],
        PDL=has_pdl(q), num_warps=merge["num_warps"],
    )  # fmt: skip
    return out


def _decode_config(q: Tensor, k_cache: Tensor) -> dict[str, int]:
    """Tile rows for one token: all query heads of a key-value head, at least the 16 that tensor cores take."""
    group = q.shape[2] // k_cache.shape[1]
    return {"BLOCK_M": max(16, triton.next_power_of_2(group)), **tuned("attention_decode", q)}


def splitk_splits(*, batch: int, kv_heads: int, slots: int, block_n: int, programs: int) -> int:
    """Number of splits (a power of two) of a key-value head: enough to fill the GPU with about `programs` programs over
    batch, key-value heads and splits, never more than blocks of slots."""
    wanted = max(1, min(programs // (batch * kv_heads), triton.cdiv(slots, block_n)))
    return 1 << (wanted.bit_length() - 1)
