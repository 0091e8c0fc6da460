"""The PyTorch definition of gated full attention over the KV cache. Shape letters and layouts: `attention.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_sdpa(
    *, q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, valid_len: Tensor | None = None
) -> Tensor:
    """Causal attention of q [B, T, H, Dh] over cache slots [0, pos + t], times sigmoid(gate) read from `qkv`.

    float32 softmax, scale Dh^-0.5. Returns [B, T, H*Dh], q's dtype. valid_len [B] int64 in 1..T: slots from pos + valid_len on
    hold nothing, and the rows of tokens from `valid_len` on mean nothing. None: all T."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    index = torch.arange(tokens, device=q.device)
    last = positions[:, None] + (index if valid_len is None else torch.minimum(index, valid_len[:, None] - 1))  # [B, T]
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


@torch.library.custom_op("moeexp::reference_sdpa_prefill", mutates_args=())
def reference_sdpa_prefill(
    q: Tensor, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, valid_len: Tensor | None = None
) -> Tensor:
    """`reference_sdpa` for any T >= 1. Opaque to export, whose shape guards on the products would forbid T = 1."""
    return reference_sdpa(q=q, qkv=qkv, k_cache=k_cache, v_cache=v_cache, positions=positions, valid_len=valid_len)


@reference_sdpa_prefill.register_fake
def _(q, qkv, k_cache, v_cache, positions, valid_len=None):
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
