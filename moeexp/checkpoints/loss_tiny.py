"""What training `model=tiny` minimises and how it is measured: balance of experts, bits per byte, dropout, gradients of fla.

B sequences, T bytes each, N = B*T, L layers, E experts, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

WINDOW = 1024  # bytes, of the bits-per-byte protocol


def check_fla_gradients(device: str) -> None:
    """fla's chunked delta rule and its gradients against its own step-by-step reference; `RuntimeError` if wrong.

    fla 0.6 itself refuses the backward on Hopper with Triton 3.4 to 3.7.0; that is why `--delta torch` is the default.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as naive

    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 130, 4, 64)
    q, k, v, do = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], generator=generator, device=device)
    g = -torch.rand(shape[:3], generator=generator, device=device)
    results = []
    for op, dtype in ((naive, torch.float32), (chunk_gated_delta_rule, torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, beta)] + [g.clone().requires_grad_()]
        out, _ = op(*leaves[:3], beta=leaves[3], g=leaves[4])
        results.append([out, *torch.autograd.grad(out, leaves, do.to(out.dtype))])
    errors = {
        name: float((a.float() - b.float()).norm() / a.float().norm())
        for name, a, b in zip(("out", "dq", "dk", "dv", "dbeta", "dg"), *results, strict=True)
    }
    print("fla against its naive reference, relative error:", {k: round(e, 5) for k, e in errors.items()})
    if not max(errors.values()) < 0.03:
        raise RuntimeError("fla's chunked delta rule is wrong on this GPU and Triton; use --delta torch")


def residual_dropout(model: Any, p: float) -> None:
    """Dropout on what each block adds to the residual stream: the architecture has none, and 4 MB is little text."""

    def drop(module: torch.nn.Module, _inputs: tuple, output):
        if not module.training:
            return None
        if isinstance(output, tuple):
            return (F.dropout(output[0], p), *output[1:])
        return F.dropout(output, p)

    for layer in model.model.layers:
        for name in ("linear_attn", "self_attn", "mlp"):
            if hasattr(layer, name):
                getattr(layer, name).register_forward_hook(drop)


def balance_loss(router_logits: tuple[torch.Tensor, ...], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L tensors [N, E] -> Switch-Transformer balance loss (1.0 when even) and the experts' load [L, E] (rows sum to 1).

    Per layer, unlike transformers' own, which pools the layers: there one layer's idle expert hides behind another's.
    """
    probs = torch.stack(router_logits).float().softmax(-1)
    n_layers, n_tokens, n_experts = probs.shape
    chosen = probs.topk(k, dim=-1).indices.flatten(1)
    ones = torch.ones_like(chosen, dtype=torch.float32)
    load = torch.zeros(n_layers, n_experts, device=probs.device).scatter_add_(1, chosen, ones) / (n_tokens * k)
    return n_experts * (load * probs.mean(1)).sum(-1).mean(), load


@torch.no_grad()
def bits_per_byte(model: Any, data: torch.Tensor, batch: int = 16) -> tuple[float, torch.Tensor]:
    """data [n] uint8 -> bits per byte and experts' load [L, E].

    Protocol: consecutive windows of 1024 bytes, none overlapping, each read from an empty state. A window's first byte
    is context only; every other byte is scored. The last, shorter window is scored like the others.
    """
    n_whole = len(data) // WINDOW
    pieces = list(data[: n_whole * WINDOW].view(n_whole, WINDOW).split(batch))
    if len(data) - n_whole * WINDOW > 1:
        pieces.append(data[n_whole * WINDOW :][None])
    nats, scored = torch.zeros((), dtype=torch.float64), 0
    load: Any = 0
    model.eval()
    for piece in pieces:
        tokens = piece.long()
        out = model(tokens, use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        nats += loss.double().cpu()
        scored += tokens[:, 1:].numel()
        load = load + balance_loss(out.router_logits, model.config.num_experts_per_tok)[1] * tokens.numel()
    return float(nats) / scored / math.log(2), load / load.sum(-1, keepdim=True)
