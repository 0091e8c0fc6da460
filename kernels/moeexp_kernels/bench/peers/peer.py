"""What the bench needs to know of another implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeexp_kernels.bench.case import Result, ratios

# Peers store results and some partial results in bfloat16, and round where we do not; a wrong one is off by far more.
PEER_TOLERANCE = 2e-2
WHOLE = "all"  # what a peer covers that does all of our op's work


class Unavailable(Exception):
    """The peer is not here, and why: one line."""


@dataclass
class Peer:
    name: str
    covers: str  # which part of our op it does, or WHOLE
    call: Callable[[dict], Any]  # with one of `copies`
    copies: list[dict]
    expected: Callable[[], tuple[Tensor, ...]]  # what call(copies[0]) must return, float32
    seed: Callable[[dict], dict] = lambda copy: dict(copy)  # fresh arguments for the check, where a call updates them

    def check(self) -> list[Result]:
        out = self.call(self.seed(self.copies[0]))
        out = out if isinstance(out, tuple) else (out,)
        expected = self.expected()
        pairs = zip(out[: len(expected)], expected, strict=True)
        return [ratios(f"output {i}", a.float().reshape(e.shape), e.float(), PEER_TOLERANCE) for i, (a, e) in enumerate(pairs)]


def hold(copy: dict, *states: Tensor) -> None:
    """What a call wrote to new memory, where our op updates the old: held by the copy, as a cache holds it. Let go, the next
    call would be given the same memory, whose lines are still in L2."""
    copy["held"] = states


def delta_inputs(arguments: dict) -> dict[str, Tensor]:
    """q, k [B,T,Hk,Dk], v [B,T,Hv,Dv] after conv and SiLU (q and k not normalised), raw gates a, b [B,T,Hv]: what peers
    of the delta rule start from. In proj's dtype."""
    proj, filters = arguments["proj"], arguments["conv_weight"].float()
    hk, hv = arguments["num_k_heads"], arguments["num_v_heads"]
    dk, dv = arguments["head_k_dim"], arguments["head_v_dim"]
    channels, width = filters.shape
    window = torch.cat([arguments["conv_state"], proj[..., :channels].transpose(1, 2)], dim=-1)
    mixed = sum(window[..., w : w + proj.shape[1]].float() * filters[:, w, None] for w in range(width))
    mixed = torch.nn.functional.silu(mixed).transpose(1, 2).to(proj.dtype)
    q, k, v = mixed.split([hk * dk, hk * dk, hv * dv], dim=-1)
    b, a = proj[..., channels + hv * dv :].split([hv, hv], dim=-1)
    return {
        "q": q.unflatten(-1, (hk, dk)).contiguous(), "k": k.unflatten(-1, (hk, dk)).contiguous(),
        "v": v.unflatten(-1, (hv, dv)).contiguous(), "a": a.contiguous(), "b": b.contiguous(),
    }  # fmt: skip


def delta_expected(arguments: dict, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(o [B,T,Hv,Dv], state [B,Hv,Dk,Dv]) of the delta rule alone on `delta_inputs`, float32."""
    from moeexp_kernels.ops.gated_delta_reference import L2_EPS, chunked_delta_rule, recurrent_delta_rule

    ratio = arguments["num_v_heads"] // arguments["num_k_heads"]
    q, k = (inputs[name].float() for name in ("q", "k"))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    q = q * arguments["head_k_dim"] ** -0.5
    q, k, v = (t.transpose(1, 2) for t in (q, k, inputs["v"].float()))
    q, k = (t.repeat_interleave(ratio, dim=1) for t in (q, k))
    g = -arguments["a_log"].exp() * torch.nn.functional.softplus(inputs["a"].float() + arguments["dt_bias"])
    rule = recurrent_delta_rule if q.shape[2] == 1 else chunked_delta_rule
    o, state = rule(
        q=q, k=k, v=v, g=g.transpose(1, 2), beta=inputs["b"].float().sigmoid().transpose(1, 2),
        state=arguments["recurrent_state"],
    )  # fmt: skip
    return o.transpose(1, 2), state
