"""Gated full attention between its projections: QK-norm + partial RoPE + KV append, then attention over the cache.

Shape letters: B batch, T tokens of this call, S cache slots (max_seq_len), H / Hkv query / key-value heads (H a multiple
of Hkv), Dh head dim, R rotary dims (the first R of Dh, split-half convention).

    qkv        [B, T, (2*H + 2*Hkv)*Dh]  rows of the input projection: per query head q | gate, then k heads, then v heads
    q_norm, k_norm  [Dh]                 unit-offset RMSNorm over the head dim
    inv_freq   [R/2] float32
    positions  [B] int64                 absolute position of each row's first token: slots [pos, pos+T) are written
    k_cache, v_cache  [B, Hkv, S, Dh]    qkv's dtype; updated in place

Slots at or beyond pos + T never contribute, whatever they hold (NaN included).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import rms_norm


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
) -> Tensor:
    """Writes this call's keys and values into the caches; returns the rotated queries [B, T, H, Dh], qkv's dtype."""
    batch, kv_heads, _, head_dim = k_cache.shape
    tokens = qkv.shape[1]
    q, k, v = qkv.split([2 * num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    q = q.unflatten(-1, (num_heads, 2, head_dim))[..., 0, :]
    k, v = (t.unflatten(-1, (kv_heads, head_dim)) for t in (k, v))
    slots = positions[:, None] + torch.arange(tokens, device=qkv.device)  # [B, T]
    angle = slots[..., None].float() * inv_freq
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]  # [B, T, 1, R/2]
    half = inv_freq.shape[0]

    def rotate(x: Tensor) -> Tensor:
        first, second, rest = x.split([half, half, head_dim - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    q = rotate(rms_norm(x=q, weight=q_norm, eps=eps)).to(qkv.dtype)
    k = rotate(rms_norm(x=k, weight=k_norm, eps=eps)).to(qkv.dtype)
    rows = torch.arange(batch, device=qkv.device)[:, None]
    # Advanced indices on dims 0 and 2 put [B, T] first, which is the layout that k and v have.
    k_cache[rows, :, slots] = k
    v_cache[rows, :, slots] = v
    return q


def reference_sdpa(*, q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of q [B, T, H, Dh] over cache slots [0, pos + t], times sigmoid(gate) read from `qkv`.

    float32 softmax, scale Dh^-0.5. Returns [B, T, H*Dh], q's dtype."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    last = positions[:, None] + torch.arange(tokens, device=q.device)  # [B, T]
    # [B, 1, 1, T, S]. Cached values are masked as well as scores: 0 * NaN is NaN.
    visible = (torch.arange(slots, device=q.device) <= last[..., None])[:, None, None]
    used = visible.any(-2)[..., None]  # [B, 1, 1, S, 1]
    keys = k_cache.float()[:, :, None].masked_fill(~used, 0.0)
    values = v_cache.float()[:, :, None].masked_fill(~used, 0.0)
    queries = q.float().transpose(1, 2).unflatten(1, (kv_heads, heads // kv_heads))  # [B, Hkv, G, T, Dh]
    scores = (queries @ keys.transpose(-1, -2) * head_dim**-0.5).masked_fill(~visible, float("-inf"))
    out = (scores.softmax(-1) @ values).flatten(1, 2).transpose(1, 2)  # [B, T, H, Dh]
    gate = qkv[..., : 2 * heads * head_dim].unflatten(-1, (heads, 2, head_dim))[..., 1, :]
    return (out * gate.float().sigmoid()).flatten(-2).to(q.dtype)
