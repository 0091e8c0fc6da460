"""Ops that choose between the decode and the prefill implementation when they run, from the number of tokens they get.

They serve a single method for any T: in a traced graph T is a symbol, and a choice made while tracing would hold for every
T. So they are opaque to export and call back into Python, which costs host time on every call (the record lists them);
inside a CUDA graph, which has one T, they cost nothing. The implementations are given by name, `decode` for T = 1.

Shapes, mutation and errors are those of the implementations: `gated_delta.py`, `attention.py`, `moe.py`, `linear.py`.
`live` goes to prefill implementations alone: one token always counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moeexp_kernels.registry import implementation


def ops(names: dict[str, str]) -> dict[str, Callable]:
    """The ops of a single method, for the implementations that `names` (op -> name) chooses. A linear layer needs no second
    name: it chooses between its own kernels from the rows that it sees, which here is their number and no symbol."""
    return {
        "linear": partial(dispatch_linear, name=names["linear"]),
        "gdn_single": partial(gdn, decode=names["gdn_decode"], prefill=names["gdn_prefill"]),
        "sdpa_single": partial(sdpa, decode=names["sdpa_decode"], prefill=names["sdpa_prefill"]),
        "moe_single": partial(moe, decode=names["moe_decode"], prefill=names["moe_prefill"]),
    }


def _pick(kind: str, tokens: int, decode: str, prefill: str) -> tuple[Callable, bool]:
    """The implementation for so many tokens, and whether it is the prefill one."""
    many = tokens > 1
    return implementation(f"{kind}_{'prefill' if many else 'decode'}", prefill if many else decode), many


@torch.library.custom_op("moeexp::dispatch_gdn", mutates_args=("conv_state", "recurrent_state"))
def gdn(
    proj: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    eps: float,
    decode: str,
    prefill: str,
    live: Tensor | None = None,
) -> Tensor:
    """The gated delta net for any T >= 1: [B, T, Hv*Dv]; conv_state and recurrent_state are mutated."""
    run, many = _pick("gdn", proj.shape[1], decode, prefill)
    return run(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim, eps=eps, **_live(live, many),
    )  # fmt: skip


@gdn.register_fake
def _(
    proj, conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state,
    num_k_heads, num_v_heads, head_k_dim, head_v_dim, eps, decode, prefill, live=None,
):  # fmt: skip
    return proj.new_empty(proj.shape[0], proj.shape[1], num_v_heads * head_v_dim)


@torch.library.custom_op("moeexp::dispatch_sdpa", mutates_args=())
def sdpa(
    q: Tensor,
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    decode: str,
    prefill: str,
    live: Tensor | None = None,
) -> Tensor:
    """Gated attention over the cache for any T >= 1: [B, T, H*Dh]."""
    run, many = _pick("sdpa", q.shape[1], decode, prefill)
    return run(q=q, qkv=qkv, k_cache=k_cache, v_cache=v_cache, positions=positions, **_live(live, many))


@sdpa.register_fake
def _(q, qkv, k_cache, v_cache, positions, decode, prefill, live=None):
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])


@torch.library.custom_op("moeexp::dispatch_moe", mutates_args=())
def moe(
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
    decode: str,
    prefill: str,
) -> Tensor:
    """Experts, shared expert and residual for any T >= 1: [B, T, D]."""
    run, _ = _pick("moe", x.shape[1], decode, prefill)
    return run(
        x=x, norm_weight=norm_weight, eps=eps, ids=ids, weights=weights, gate_up=gate_up, gate_up_scales=gate_up_scales,
        down=down, down_scales=down_scales, shared_gate_up=shared_gate_up, shared_gate_up_scales=shared_gate_up_scales,
        shared_down=shared_down, shared_down_scales=shared_down_scales, shared_gate=shared_gate,
    )  # fmt: skip


@moe.register_fake
def _(
    x, norm_weight, eps, ids, weights, gate_up, gate_up_scales, down, down_scales,
    shared_gate_up, shared_gate_up_scales, shared_down, shared_down_scales, shared_gate, decode, prefill,
):  # fmt: skip
    return torch.empty_like(x)


@torch.library.custom_op("moeexp::dispatch_linear", mutates_args=())
def dispatch_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    name: str,
) -> Tensor:
    """A linear layer that sees how many rows it has: residual + norm(x) @ weight.T, [..., N]."""
    return implementation("linear", name)(
        x=x, weight=weight, scales=scales, norm_weight=norm_weight, eps=eps, residual=residual
    )


@dispatch_linear.register_fake
def _(x, weight, scales, norm_weight, eps, residual, name):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _live(live: Tensor | None, many: bool) -> dict[str, Tensor]:
    return {"live": live} if many and live is not None else {}
