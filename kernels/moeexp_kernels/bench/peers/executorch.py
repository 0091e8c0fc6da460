"""ExecuTorch's Triton ops for CUDA, from the files of its wheel.

The files are loaded by path: the package around them imports ExecuTorch's exporter, which none of the ops needs.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.peer import Peer, Unavailable, delta_expected, delta_inputs, hold
from moeexp_kernels.bench.peers.torch_int4 import natural_codes
from moeexp_kernels.bench.peers.torch_ops import attention as torch_attention
from moeexp_kernels.ops.linear import dequantise, rms_norm

NAME = "ExecuTorch"
COMPILES = True


def folder() -> Path:
    """Of its kernels' files. `executorch` and `backends` hold no code, so finding them runs none."""
    try:
        spec = importlib.util.find_spec("executorch.backends.cuda")
    except ImportError:
        spec = None
    for root in (spec.submodule_search_locations or ()) if spec else ():
        kernels = Path(root) / "triton" / "kernels"
        if (kernels / "fused_moe.py").exists():
            return kernels
    raise Unavailable("executorch/backends/cuda/triton/kernels is not installed; pip install executorch==1.5.1")


@cache
def load(name: str) -> ModuleType:
    path = folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"executorch_triton_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks its kernels' globals up there
    spec.loader.exec_module(module)
    return module


def available() -> None:
    path = folder()
    for name in ("fused_moe", "sdpa", "fused_deltanet_decode", "int4_matmul"):
        try:
            load(name)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise Unavailable(f"{path / name}.py does not import ({type(error).__name__}: {error})") from error


def symmetric(packed: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Our weight without its shifts in ExecuTorch's layout: (bytes int8 [..., N, K/2] of neighbouring codes, the even one
    low; scales bf16 [..., N, K/G])."""
    codes = natural_codes(packed, group)
    pairs = (codes[..., 1::2] << 4 | codes[..., ::2]).view(torch.int8)
    return pairs.contiguous(), scales[..., 0].bfloat16().contiguous()


def without_shift(scales: Tensor) -> Tensor:
    return torch.stack([scales[..., 0], torch.zeros_like(scales[..., 0])], dim=-1)


def matvec(case: Case) -> Peer | None:
    if case.info["bits"] != 4 or case.tokens != 1:
        return None
    op, group, arguments = load("int4_matmul").int4_matvec, case.info["group"], case.copies[0]
    x = arguments["x"].flatten(0, -2)
    weight, scales = symmetric(arguments["weight"], arguments["scales"], group)
    copies = [{"w": weight, "s": scales}] + [{"w": weight.clone(), "s": scales.clone()} for _ in case.copies[1:]]

    def expected() -> tuple[Tensor]:
        wide = dequantise(weight=arguments["weight"], scales=without_shift(arguments["scales"]), in_features=x.shape[1])
        return (x.float() @ wide.T,)

    return Peer(
        name="int4_matvec", covers="the product, symmetric weights; no norm, no residual",
        call=lambda copy: op(x, copy["w"], copy["s"], group), copies=copies, expected=expected,
    )  # fmt: skip


def experts(case: Case) -> Peer:
    module, group, arguments = load("fused_moe"), case.info["group"], case.copies[0]
    count, top_k = arguments["gate_up"].shape[0], arguments["ids"].shape[-1]
    decode = case.phase == "decode"
    op = module.fused_moe if decode else module.fused_moe_batched_gemm
    w1, s1 = symmetric(arguments["gate_up"], arguments["gate_up_scales"], group)
    w2, s2 = symmetric(arguments["down"], arguments["down_scales"], group)
    h = rms_norm(x=arguments["x"], weight=arguments["norm_weight"], eps=arguments["eps"]).bfloat16().flatten(0, -2)
    copies = [{"ids": c["ids"].flatten(0, -2).long(), "weights": c["weights"].flatten(0, -2)} for c in case.copies]

    def expected() -> tuple[Tensor]:
        ids, share = copies[0]["ids"], torch.zeros(h.shape[0], count, device=h.device)
        share.scatter_(1, ids, copies[0]["weights"])
        y = torch.zeros(h.shape, device=h.device)
        for e in ids.unique().tolist():
            up, down = (
                dequantise(weight=arguments[name][e], scales=without_shift(arguments[f"{name}_scales"][e]), in_features=width)
                for name, width in (("gate_up", h.shape[1]), ("down", arguments["gate_up"].shape[1] // 2))
            )
            gate, up = F.linear(h.float(), up).chunk(2, dim=-1)
            y += share[:, e, None] * F.linear(F.silu(gate) * up, down)
        return (y,)

    return Peer(
        name="fused_moe" if decode else "fused_moe_batched_gemm",
        covers="the routed experts, symmetric weights; no norm, no shared expert, no residual",
        call=lambda copy: op(h, w1, s1, w2, s2, copy["weights"], copy["ids"], top_k, count, group),
        copies=copies, expected=expected,
    )  # fmt: skip


def delta_rule(case: Case) -> Peer | None:
    """A part only: none of its Triton ops is a conv or a gated norm, with which it would be our op's work."""
    if case.phase != "decode":
        return None
    op, arguments = load("fused_deltanet_decode").fused_deltanet_decode, case.copies[0]

    def prepare(copy: dict) -> dict:
        inputs = delta_inputs(copy)
        qkv = torch.cat([inputs[name].flatten(1) for name in "qkv"], dim=1)
        return {
            "inputs": {
                "qkv": qkv, "alpha": inputs["a"][:, 0].contiguous(), "beta_raw": inputs["b"][:, 0].contiguous(),
                "A_log": copy["a_log"], "dt_bias": copy["dt_bias"], "state": copy["recurrent_state"],
            }
        }  # fmt: skip

    def call(copy: dict) -> tuple[Tensor, Tensor]:
        o, state = op(**copy["inputs"])
        hold(copy, state)
        return o, state

    def expected() -> tuple[Tensor, Tensor]:
        o, state = delta_expected(arguments, delta_inputs(arguments))
        return o[:, 0], state

    return Peer(
        name="fused_deltanet_decode", covers="the delta rule, l2 norms and gates; no conv, no gated norm",
        call=call, copies=[prepare(copy) for copy in case.copies], expected=expected,
    )  # fmt: skip


def attention(case: Case) -> Peer:
    module = load("sdpa")
    peer = torch_attention(case)
    q = case.copies[0]["q"].transpose(1, 2).contiguous()
    if case.phase == "decode":
        # Every slot of these caches is in use: without kv_len it is spared the kernels that would clamp that.
        peer.name = "sdpa_decode_splitk"
        peer.call = lambda copy: module.sdpa_decode_splitk(q, copy["k"], copy["v"], enable_gqa=True)
    else:
        peer.name = "sdpa"
        peer.call = lambda copy: module.sdpa(q, copy["k"], copy["v"], is_causal=True, enable_gqa=True)
    return peer


OPS = {"linear": [matvec], "moe": [experts], "gdn": [delta_rule], "attention": [attention]}
