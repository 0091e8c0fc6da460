"""What torch itself offers: scaled dot product attention, a bf16 matrix product, argmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.peer import WHOLE, Peer
from moeexp_kernels.ops.linear import dequantise

NAME = "torch"
COMPILES = False


def available() -> None:
    """Always."""


def attention(case: Case) -> Peer:
    arguments = case.copies[0]
    q = arguments["q"].transpose(1, 2).contiguous()  # [B, H, T, D]
    causal = case.phase == "prefill"  # there from position 0, so that a square causal mask is the right one

    def call(copy: dict) -> Tensor:
        return F.scaled_dot_product_attention(q, copy["k"], copy["v"], is_causal=causal, enable_gqa=True)

    def expected() -> tuple[Tensor]:
        k, v = (arguments[name].float() for name in ("k_cache", "v_cache"))
        groups = q.shape[1] // k.shape[1]
        scores = q.float() @ k.repeat_interleave(groups, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(ones.triu(1), float("-inf"))
        return (scores.softmax(-1) @ v.repeat_interleave(groups, 1),)

    copies = [{"k": copy["k_cache"], "v": copy["v_cache"]} for copy in case.copies]
    return Peer(
        name="scaled_dot_product_attention", covers="attention; no output gate", call=call, copies=copies, expected=expected
    )


def matmul(case: Case) -> Peer | None:
    """cuBLAS on bf16 weights: what our GEMM competes with at many rows, and reads four times the bytes at few."""
    if case.phase == "decode" and case.info["bits"] != 16:
        return None
    arguments = case.copies[0]
    x = arguments["x"].flatten(0, -2)
    wide = dequantise(weight=arguments["weight"], scales=arguments["scales"], in_features=x.shape[1])
    weight = wide.bfloat16()
    copies = [{"w": weight}] + [{"w": weight.clone()} for _ in case.copies[1:]]
    return Peer(
        name="bf16 matmul", covers="the product on bf16 weights; no norm", call=lambda copy: F.linear(x, copy["w"]),
        copies=copies, expected=lambda: (x.float() @ weight.float().T,),
    )  # fmt: skip


def argmax(case: Case) -> Peer:
    copies = [{"x": copy["logits"]} for copy in case.copies]
    # Compared as numbers: an index that is off at all is off by thousands of rows of the vocabulary.
    return Peer(
        name="argmax", covers=WHOLE, call=lambda copy: copy["x"].argmax(-1), copies=copies,
        expected=lambda: (case.copies[0]["logits"].float().argmax(-1).float(),),
    )  # fmt: skip


OPS = {"attention": [attention], "linear": [matmul], "sample": [argmax]}
