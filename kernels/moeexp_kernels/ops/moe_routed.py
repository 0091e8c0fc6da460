"""Router and experts of a few tokens in three kernels: the experts' kernels choose for themselves.

Shape letters and arguments as in `router.py` and `moe.py`. The first kernel computes the router's logits. Every program of
the two that follow finds the k largest of a token's logits by itself, a thousand times the same small work side by side,
instead of waiting for a kernel that does it once; and the second of them does so while the first still runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from moeexp_kernels.ops.moe import ToChoose, decode_with, reference_moe_decode
from moeexp_kernels.ops.router import check_router, launch_logits, reference_router, trace_positions


def reference_moe_routed(
    *, x: Tensor, norm_weight: Tensor, eps: float, router: Tensor, top_k: int, positions: Tensor, expert_ids: Tensor,
    **experts: Tensor | None,
) -> Tensor:  # fmt: skip
    """`reference_router` with weight `router` [E, D], then `reference_moe_decode` with the `experts` that it chose."""
    ids, weights = reference_router(
        x=x, norm_weight=norm_weight, weight=router, eps=eps, top_k=top_k, positions=positions, expert_ids=expert_ids
    )
    return reference_moe_decode(x=x, norm_weight=norm_weight, eps=eps, ids=ids, weights=weights, **experts)


@triton_op("moeexp::moe_routed", mutates_args={"expert_ids"})
def moe_routed(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    router: Tensor,
    top_k: int,
    positions: Tensor,
    expert_ids: Tensor,
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
    """`reference_moe_routed` on the GPU; the same arguments, by keyword. Any number of tokens, made for up to 8.

    `ValueError` for strides, shapes or dtypes that the kernels do not take, or top_k beyond E."""
    flat, bits = check_router(
        x=x, norm_weight=norm_weight, weight=router, top_k=top_k, positions=positions, expert_ids=expert_ids
    )
    if gate_up.shape[0] != router.shape[0]:
        raise ValueError(f"the router has {router.shape[0]} rows for {gate_up.shape[0]} experts; supported: one each")
    logits = torch.empty((flat.shape[0], router.shape[0]), dtype=torch.float32, device=x.device)
    launch_logits(flat=flat, norm_weight=norm_weight, weight=router, bits=bits, eps=eps, out=logits)
    return decode_with(
        x=x, norm_weight=norm_weight, eps=eps, gate_up=gate_up, gate_up_scales=gate_up_scales, down=down,
        down_scales=down_scales, shared_gate_up=shared_gate_up, shared_gate_up_scales=shared_gate_up_scales,
        shared_down=shared_down, shared_down_scales=shared_down_scales, shared_gate=shared_gate, configs=None,
        choose=ToChoose(logits, top_k, positions, expert_ids, trace_positions(expert_ids)),
    )  # fmt: skip
