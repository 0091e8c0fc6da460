"""References of the experts' ops: plain torch, float32. Shape letters and weight formats: `moe.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeexp_kernels.ops.linear import dequantise, rms_norm


def _shared(h: Tensor, gate_up, gate_up_scales, down, down_scales, gate) -> Tensor:
    """Shared expert on normed float32 h [..., D]."""
    wide = dequantise(weight=gate_up, scales=gate_up_scales, in_features=h.shape[-1])
    g, u = F.linear(h, wide).chunk(2, dim=-1)
    act = F.silu(g) * u
    out = F.linear(act, dequantise(weight=down, scales=down_scales, in_features=act.shape[-1]))
    return F.linear(h, gate.float()).sigmoid() * out


def reference_moe_decode(
    *,
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
    """x + experts + shared expert for a few tokens: gathers each token's k experts. Returns [B, T, D], x's dtype."""
    h = rms_norm(x=x, weight=norm_weight, eps=eps)
    picked = dequantise(
        weight=gate_up[ids], scales=None if gate_up_scales is None else gate_up_scales[ids], in_features=x.shape[-1]
    )
    g, u = torch.einsum("btd,btknd->btkn", h, picked).chunk(2, dim=-1)
    act = F.silu(g) * u
    picked = dequantise(weight=down[ids], scales=None if down_scales is None else down_scales[ids], in_features=act.shape[-1])
    y = torch.einsum("btki,btkdi,btk->btd", act, picked, weights)
    y = y + _shared(h, shared_gate_up, shared_gate_up_scales, shared_down, shared_down_scales, shared_gate)
    return (x.float() + y).to(x.dtype)


@torch.library.custom_op("moeexp::reference_moe_prefill", mutates_args=())
def reference_moe_prefill(
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
    """The same for many tokens: every expert in turn runs on all of them, weighted by 0 where it was not chosen.

    E/k times the needed work, but no data-dependent shape and one expert's weights in float32 at a time. Opaque to
    export, which would unroll E experts into the graph."""
    h = rms_norm(x=x, weight=norm_weight, eps=eps)
    share = torch.zeros(*x.shape[:2], gate_up.shape[0], device=x.device)
    share.scatter_(-1, ids.long(), weights)
    y = _shared(h, shared_gate_up, shared_gate_up_scales, shared_down, shared_down_scales, shared_gate)
    for e in range(gate_up.shape[0]):
        scales = None if gate_up_scales is None else gate_up_scales[e]
        g, u = F.linear(h, dequantise(weight=gate_up[e], scales=scales, in_features=x.shape[-1])).chunk(2, dim=-1)
        act = F.silu(g) * u
        scales = None if down_scales is None else down_scales[e]
        out = F.linear(act, dequantise(weight=down[e], scales=scales, in_features=act.shape[-1]))
        # An expert that overflows on tokens it was not chosen for must not spread NaN through 0 * inf.
        chosen = share[..., e, None]
        y = y + torch.where(chosen > 0, chosen * out, 0.0)
    return (x.float() + y).to(x.dtype)


@reference_moe_prefill.register_fake
def _(
    x, norm_weight, eps, ids, weights, gate_up, gate_up_scales, down, down_scales,
    shared_gate_up, shared_gate_up_scales, shared_down, shared_down_scales, shared_gate,
):  # fmt: skip
    return torch.empty_like(x)
