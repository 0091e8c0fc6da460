"""QK-norm, partial RoPE and KV append of gated full attention, between its input projection and the attention itself.

Shape letters and layouts: `attention.py`. One kernel, in which no element is gathered from its rotary partner's place.
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
    block_d,
    check_cache,
    tuned,
)
from moeexp_kernels.ops.linear import rms_norm
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next


def reference_qk_norm_rope(
    *,
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float,
    valid_len: Tensor | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """Writes this call's keys and values into the caches; returns the rotated queries [B, T, H, Dh], qkv's dtype.

    valid_len [B] int64 in 1..T: keys and values of only so many tokens of each row are written. None: all T.
    attention_factor: times cosine and sine, so of the rotary dims alone (YaRN, arXiv 2309.00071, section 3.4)."""
    batch, kv_heads, _, head_dim = k_cache.shape
    tokens = qkv.shape[1]
    q, k, v = qkv.split([2 * num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    q = q.unflatten(-1, (num_heads, 2, head_dim))[..., 0, :]
    k, v = (t.unflatten(-1, (kv_heads, head_dim)) for t in (k, v))
    slots = positions[:, None] + torch.arange(tokens, device=qkv.device)  # [B, T]
    angle = slots[..., None].float() * inv_freq
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]  # [B, T, 1, R/2]
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    half = inv_freq.shape[0]

    def rotate(x: Tensor) -> Tensor:
        first, second, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    q = rotate(rms_norm(x=q, weight=q_norm, eps=eps)).to(qkv.dtype)
    k = rotate(rms_norm(x=k, weight=k_norm, eps=eps)).to(qkv.dtype)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    if valid_len is not None:
        # Tokens that do not count write what the last one that does writes: there is no write to leave out.
        index = torch.minimum(torch.arange(tokens, device=qkv.device), valid_len[:, None] - 1)
        slots, k, v = positions[:, None] + index, k[rows, index], v[rows, index]
    # index_put_, not `cache[...] = k`: the latter strips leading ones from the value, which forbids exporting T = 1.
    k_cache.transpose(1, 2).index_put_((rows, slots), k)
    v_cache.transpose(1, 2).index_put_((rows, slots), v)
    return q


# ROTATION: how a head is rotated, as one constexpr, read by these names; a plain tuple, as FORMAT of `matrix.py` is, and why.
ROTATED_HALF: tl.constexpr = tl.constexpr(0)  # half the dims that are rotated
ATTENTION_FACTOR: tl.constexpr = tl.constexpr(1)  # of cosine and sine
PADDED_HALF: tl.constexpr = tl.constexpr(2)  # that half, and the dims that are not rotated, rounded up to powers of 2
PADDED_REST: tl.constexpr = tl.constexpr(3)


@triton.jit
def _load_rotation(
    norm, inv_freq, slot, DH: tl.constexpr, ROTATION: tl.constexpr
):  # fmt: skip
    """1 + the norm's weights of the two rotary halves and of the rest, cosine and sine: what no kernel of a step makes."""
    HALF: tl.constexpr = ROTATION[ROTATED_HALF]
    FACTOR: tl.constexpr = ROTATION[ATTENTION_FACTOR]
    half = tl.arange(0, ROTATION[PADDED_HALF])
    rest = 2 * HALF + tl.arange(0, ROTATION[PADDED_REST])
    first = 1.0 + tl.load(norm + half, mask=half < HALF, other=0.0).to(tl.float32)
    second = 1.0 + tl.load(norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    tail = 1.0 + tl.load(norm + rest, mask=rest < DH, other=0.0).to(tl.float32)
    angle = slot.to(tl.float32) * tl.load(inv_freq + half, mask=half < HALF, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    if FACTOR != 1.0:
        cos *= FACTOR
        sin *= FACTOR
    return first, second, tail, cos, sin


@triton.jit
def _norm_rotate_store(
    source, target, loaded, stored, DH: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """RMSNorm of one head, then rotation of its first 2 * HALF dims; only dims below `stored` (DH or 0) are stored.
    loaded: what `_load_rotation` found.

    The two rotary halves and the rest are separate loads: no element is gathered from its partner's place."""
    HALF: tl.constexpr = ROTATION[ROTATED_HALF]
    first_norm, second_norm, tail_norm, cos, sin = loaded
    half = tl.arange(0, ROTATION[PADDED_HALF])
    rest = 2 * HALF + tl.arange(0, ROTATION[PADDED_REST])
    in_half, in_rest = half < HALF, rest < DH
    first = tl.load(source + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    tail = tl.load(source + rest, mask=in_rest, other=0.0).to(tl.float32)
    square = tl.sum(first * first) + tl.sum(second * second) + tl.sum(tail * tail)
    scale = tl.rsqrt(square / DH + EPS)
    first *= scale * first_norm
    second *= scale * second_norm
    tail *= scale * tail_norm
    tl.store(target + half, (first * cos - second * sin).to(target.dtype.element_ty), mask=in_half & (half < stored))
    rotated = second * cos + first * sin
    tl.store(target + HALF + half, rotated.to(target.dtype.element_ty), mask=in_half & (half < stored))
    tl.store(target + rest, tail.to(target.dtype.element_ty), mask=rest < stored)


@triton.jit
def _qk_norm_rope_kernel(
    qkv, q_norm, k_norm, inv_freq, positions, lengths, k_cache, v_cache, out, tokens, slots,
    qkv_stride_b, qkv_stride_t, cache_stride_b, cache_stride_h,
    HEADS: tl.constexpr, ROTATION: tl.constexpr, EPS: tl.constexpr, HAS_VALID_LEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T, H + Hkv, B): one query head, or one key head with its value head.

    Positions are older than a step; past L1, which may hold the last token's."""
    HKV: tl.constexpr = HEADS[KV_HEADS]
    H: tl.constexpr = HKV * HEADS[QUERIES]
    DH: tl.constexpr = HEADS[HEAD_DIM]
    t, head, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = qkv + b * qkv_stride_b + t * qkv_stride_t
    positions += start_next(PDL)
    slot = tl.load(positions + b, cache_modifier=".cg") + t
    if head < H:
        loaded = _load_rotation(q_norm, inv_freq, slot, DH, ROTATION)
        ready = after_previous(PDL)
        source = row + ready + head * 2 * DH
        target = out + ready + ((b * tokens + t) * H + head) * DH
        _norm_rotate_store(source, target, loaded, DH, DH, ROTATION, EPS)
    else:
        kv_head = head - H
        # A slot outside the cache is refused before launch; should one get here, no other memory is harmed.
        counts = (slot >= 0) & (slot < slots)
        if HAS_VALID_LEN:
            counts = counts & (t < tl.load(lengths + b, cache_modifier=".cg"))
        stored = tl.where(counts, DH, 0)
        cell = b * cache_stride_b + kv_head.to(tl.int64) * cache_stride_h + slot * DH
        loaded = _load_rotation(k_norm, inv_freq, slot, DH, ROTATION)
        ready = after_previous(PDL)
        source = row + ready + 2 * H * DH + kv_head * DH
        cell += ready
        d = tl.arange(0, HEADS[PADDED_HEAD])
        value = tl.load(source + HKV * DH + d, mask=d < DH, other=0.0)
        _norm_rotate_store(source, k_cache + cell, loaded, stored, DH, ROTATION, EPS)
        tl.store(v_cache + cell + d, value, mask=d < stored)


@triton_op("moeexp::qk_norm_rope", mutates_args=("k_cache", "v_cache"))
def qk_norm_rope(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    eps: float,
    valid_len: Tensor | None = None,
    attention_factor: float = 1.0,
) -> Tensor:
    """`reference_qk_norm_rope` as one kernel, any T. [B, T, H, Dh] in qkv's dtype; writes slots [pos, pos+T) of both caches.

    `ValueError` for layouts other than the file's; T may be symbolic."""
    check_cache(k_cache, v_cache, qkv, num_heads)
    kv_heads, slots, head_dim = k_cache.shape[1:]
    half = inv_freq.shape[0]
    if 2 * half > head_dim:
        raise ValueError(f"inv_freq rotates {2 * half} dims of a head of {head_dim}; at most {head_dim // 2} frequencies")
    for name, vector, size in (
        ("q_norm", q_norm, head_dim),
        ("k_norm", k_norm, head_dim),
        ("inv_freq", inv_freq, half),
    ):
        if vector.shape != (size,) or vector.stride(0) != 1:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, strides {vector.stride()}; supported: [{size}] contiguous")
    batch, tokens = qkv.shape[0], qkv.shape[1]
    check_argument(inv_freq, name="inv_freq", shape=(half,), dtypes=(torch.float32,))
    check_argument(positions, name="positions", shape=(batch,), dtypes=(torch.int64,))
    out = torch.empty((batch, tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    padded = triton.next_power_of_2(half), triton.next_power_of_2(max(head_dim - 2 * half, 1))
    wrap_triton(_qk_norm_rope_kernel)[(tokens, num_heads + kv_heads, batch)](
        qkv, q_norm, k_norm, inv_freq, positions, positions if valid_len is None else valid_len, k_cache, v_cache, out, tokens,
        slots, qkv.stride(0), qkv.stride(1), k_cache.stride(0), k_cache.stride(1),
        HEADS=(kv_heads, num_heads // kv_heads, head_dim, block_d(head_dim)), ROTATION=(half, attention_factor, *padded), EPS=eps,
        HAS_VALID_LEN=valid_len is not None, PDL=has_pdl(qkv), num_warps=tuned("qk_norm_rope", out)["num_warps"],
    )  # fmt: skip
    return out
