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
of slots with a running maximum (Milakov, Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). Where a program has a share of
the slots alone: `attention_splits.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.pdl import after_previous, has_pdl
from moeexp_kernels.parts.precision import FLOAT32

MAX_HEAD_DIM, MAX_GROUP = 256, 64
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# HEADS: the layer's heads as one constexpr, read by these names; a plain tuple, as FORMAT of `matrix.py` is, and why.
KV_HEADS: tl.constexpr = tl.constexpr(0)  # Hkv
QUERIES: tl.constexpr = tl.constexpr(1)  # query heads of a key-value head
HEAD_DIM: tl.constexpr = tl.constexpr(2)  # Dh
PADDED_HEAD: tl.constexpr = tl.constexpr(3)  # Dh, rounded up to a power of 2 that a product takes


@triton.jit
def load_block(keys, values, n, kv_len, WHOLE: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(keys, values) [BLOCK_N, Dh] of slots [n, n + BLOCK_N), at the first of which the pointers are; those from `kv_len` on are
    zeros and never loaded. WHOLE: there are none."""
    DH: tl.constexpr = HEADS[HEAD_DIM]
    BLOCK_D: tl.constexpr = HEADS[PADDED_HEAD]
    column, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    cells = column[:, None] * DH + d[None, :]
    if WHOLE and DH == BLOCK_D:
        return tl.load(keys + cells), tl.load(values + cells)
    inside = (n + column < (n + BLOCK_N if WHOLE else kv_len))[:, None] & (d < DH)[None, :]
    return tl.load(keys + cells, mask=inside, other=0.0), tl.load(values + cells, mask=inside, other=0.0)


@triton.jit
def attend_block(
    q_tile, key, value, n, last, acc, largest, total, CAUSAL: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One step of the running softmax (base 2) over `key` and `value` [BLOCK_N, Dh] of slots from n on. Products are of q_tile's
    dtype. CAUSAL: row r sees slots up to last[r] alone."""
    DH: tl.constexpr = HEADS[HEAD_DIM]
    SCALE: tl.constexpr = DH**-0.5 * LOG2_E
    key, value = key.to(q_tile.dtype), value.to(q_tile.dtype)
    score = tl.dot(q_tile, tl.trans(key), input_precision=FLOAT32)
    if CAUSAL:
        score = tl.where((n + tl.arange(0, BLOCK_N))[None, :] <= last[:, None], score, float("-inf"))
    # The scale goes to each row's largest score, and to the others in the subtraction: a multiplication less for each.
    new_largest = tl.maximum(largest, tl.max(score, 1) * SCALE)
    weight = tl.exp2(score * SCALE - new_largest[:, None])
    decay = tl.exp2(largest - new_largest)
    total = total * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=FLOAT32)
    return acc, new_largest, total


@triton.jit
def _attend_kernel(
    q, qkv, k_cache, v_cache, positions, lengths, out, tokens, slots,
    q_stride_b, q_stride_t, qkv_stride_b, qkv_stride_t, cache_stride_b, cache_stride_h,
    HEADS: tl.constexpr, INTERPRETED: tl.constexpr, HAS_VALID_LEN: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (Hkv, tiles, B). Row r of a key-value head is token r // GROUP, query head r % GROUP of its group.

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
    kv_head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    # Late tokens see the most slots: start them first, so that the last programs to run are short ones.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = row // GROUP, kv_head * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    used = (t < tokens)[:, None] & (d < DH)[None, :]
    position = tl.load(positions + b).to(tl.int32)
    last = tl.where(t < tokens, position + t, -1)
    first_t = tile * BLOCK_M // GROUP
    last_t = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    if HAS_VALID_LEN:
        last_t = tl.minimum(last_t, tl.load(lengths + b).to(tl.int32) - 1)
    kv_len = tl.maximum(tl.minimum(position + last_t + 1, slots), 0)
    # Below `plain` every row of the tile sees every slot, so the causal comparison is left out.
    plain = tl.maximum(tl.minimum(position + first_t + 1, kv_len), 0) // BLOCK_N * BLOCK_N

    t_wide = t.to(tl.int64)
    q_cells = b * q_stride_b + t_wide[:, None] * q_stride_t + (head * DH)[:, None] + d[None, :]
    q_tile = tl.load(q + q_cells, mask=used, other=0.0)
    if INTERPRETED and q.dtype.element_ty == tl.bfloat16:
        q_tile = q_tile.to(tl.float32)
    cache = b * cache_stride_b + kv_head.to(tl.int64) * cache_stride_h
    keys, values = k_cache + cache, v_cache + cache
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Below every score but finite: for a row that has seen nothing, -inf - -inf would be NaN.
    largest = tl.full([BLOCK_M], -3e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, plain, BLOCK_N):
        key, value = load_block(keys, values, n, kv_len, True, HEADS, BLOCK_N)
        acc, largest, total = attend_block(q_tile, key, value, n, last, acc, largest, total, False, HEADS, BLOCK_N)
        keys += BLOCK_N * DH
        values += BLOCK_N * DH
    for n in range(plain, kv_len, BLOCK_N):
        key, value = load_block(keys, values, n, kv_len, False, HEADS, BLOCK_N)
        acc, largest, total = attend_block(q_tile, key, value, n, last, acc, largest, total, True, HEADS, BLOCK_N)
        keys += BLOCK_N * DH
        values += BLOCK_N * DH

    result = tl.where(total[:, None] > 0.0, acc / tl.where(total > 0.0, total, 1.0)[:, None], 0.0)
    gate_cells = b * qkv_stride_b + t_wide[:, None] * qkv_stride_t + (head * (2 * DH) + DH)[:, None] + d[None, :]
    gate = tl.load(qkv + gate_cells, mask=used, other=0.0).to(tl.float32)
    out_cells = ((b * tokens + t_wide) * (HKV * GROUP) + head)[:, None] * DH + d[None, :]
    tl.store(out + out_cells, (result * tl.sigmoid(gate)).to(out.dtype.element_ty), mask=used)


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


def check_queries(q: Tensor, qkv: Tensor, *, head_dim: int, positions: Tensor) -> None:
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


def unsplit(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, config: dict[str, int],
    valid_len: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, T, H*Dh], by a program for each tile of query rows and key-value head. config: BLOCK_M, BLOCK_N, launch options."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    check_cache(k_cache, v_cache, qkv, heads)
    check_queries(q, qkv, head_dim=k_cache.shape[3], positions=positions)
    out = torch.empty((batch, tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    tiles = (tokens * (heads // kv_heads) + config["BLOCK_M"] - 1) // config["BLOCK_M"]
    wrap_triton(_attend_kernel)[(kv_heads, tiles, batch)](
        q, qkv, k_cache, v_cache, positions, positions if valid_len is None else valid_len, out, tokens, slots,
        q.stride(0), q.stride(1), qkv.stride(0), qkv.stride(1), k_cache.stride(0), k_cache.stride(1),
        HEADS=heads_of(q, k_cache), INTERPRETED=not q.is_cuda, HAS_VALID_LEN=valid_len is not None, PDL=has_pdl(q), **config,
    )  # fmt: skip
    return out


def heads_of(q: Tensor, k_cache: Tensor) -> tuple[int, ...]:
    """HEADS of the kernels."""
    kv_heads, head_dim = k_cache.shape[1], q.shape[3]
    return kv_heads, q.shape[2] // kv_heads, head_dim, block_d(head_dim)


def decode_config(q: Tensor, k_cache: Tensor) -> dict[str, int]:
    """Tile rows of one token: all query heads of a key-value head, at least the 16 that tensor cores take."""
    group = q.shape[2] // k_cache.shape[1]
    return {"BLOCK_M": max(16, triton.next_power_of_2(group)), **tuned("attention_decode", q)}


@triton_op("moeexp::sdpa_prefill", mutates_args=())
def sdpa_prefill(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, valid_len: Tensor | None = None
) -> Tensor:
    """`reference_sdpa` for any T (symbolic too) and any position, on tensor cores for 2-byte dtypes. [B, T, H*Dh]."""
    return unsplit(q, qkv, k_cache, v_cache, positions, tuned("attention_prefill", q), valid_len)


@triton_op("moeexp::sdpa_decode_tiled", mutates_args=())
def sdpa_decode_tiled(q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """`reference_sdpa` of a few tokens, a program for each key-value head over all slots in use: best for short contexts."""
    return unsplit(q, qkv, k_cache, v_cache, positions, decode_config(q, k_cache))
