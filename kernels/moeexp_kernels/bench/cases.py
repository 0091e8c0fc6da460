"""The cases of the bench, by op. A spec names one; `build` makes its tensors.

`cold` is how many bytes must pass between two calls on the same memory, so that nothing is found in L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeexp_kernels.bench.case import DECODE_TOLERANCE, PREFILL_TOLERANCE, Case, Result, SeededTensors, count_for, ratios, size_of
from moeexp_kernels.bench.shapes import Shapes
from moeexp_kernels.ops import (
    attention,
    attention_reference,
    attention_splits,
    gated_delta,
    gated_delta_prefill,
    gated_delta_reference,
    linear,
    moe,
    moe_prefill,
    moe_reference,
    moe_tile,
    qk_norm_rope,
    router,
    sample,
)
from moeexp_kernels.ops.gemm import gemm_key
from moeexp_kernels.ops.linear_tile import tile_key
from moeexp_kernels.parts import tuning
from moeexp_kernels.traffic import moved

EPS = 1e-6


@dataclass(frozen=True)
class Spec:
    op: str
    phase: str
    tokens: int
    variant: str = ""  # a linear's name, slots in use, another implementation
    bits: int = 4


def specs(shapes: Shapes, ops: list[str], tokens: list[int], quick: bool) -> list[Spec]:
    """All cases of `ops`. quick: decode at the first token count, prefill at the first length, weights of 4 bits."""
    tokens, prefill = (tokens[:1], shapes.prefill[:1]) if quick else (tokens, shapes.prefill)
    found = []
    for op in ops:
        variants = {"linear": list(shapes.linears()), "attention": [str(n) for n in shapes.kv_lens]}.get(op, [""])
        for variant in variants:
            # The longest context at one sequence only: eight would be a gigabyte a copy.
            few = tokens[:1] if op == "attention" and variant == str(shapes.kv_lens[-1]) else tokens
            found += [Spec(op, "decode", count, variant) for count in few]
        if op == "linear" and not quick:
            found += [Spec(op, "decode", tokens[0], "gdn in", bits=bits) for bits in (8, 16)]
        if op == "linear":
            found += [Spec(op, "prefill", length, "gdn in") for length in prefill]
        elif op != "sample":
            found += [Spec(op, "prefill", length) for length in prefill]
    return found


def build(spec: Spec, shapes: Shapes, device: str, cold: int) -> Case:
    return BUILDERS[spec.op](spec, shapes, SeededTensors(device), cold)


def tolerance_of(spec: Spec) -> float:
    return DECODE_TOLERANCE if spec.phase == "decode" else PREFILL_TOLERANCE


def build_linear(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    out, features, first = shapes.linears()[spec.variant]
    x = source.randn(1, spec.tokens, features)
    norm = source.randn(features, dtype=torch.float32, scale=0.2) if first else None
    residual = None if first else source.randn(1, spec.tokens, out)
    if spec.bits == 16:
        weight, scales = source.randn(out, features, scale=features**-0.5), None
    else:
        weight, scales = source.weight(out, features, bits=spec.bits, group=shapes.group)
    shared = {"x": x, "norm_weight": norm, "eps": EPS, "residual": residual}
    size = size_of(weight, scales)
    copies = [{**shared, "weight": weight, "scales": scales}]
    for _ in range(count_for(cold, size) - 1):
        copies.append(
            {**shared, "weight": weight.clone(), "scales": None if scales is None else scales.clone()}
        )  # fmt: skip
    bits, group = linear.weight_format(weight=weight, scales=scales, in_features=features, name="weight")
    table = {
        "gemv": ("gemv", linear.gemv_key(bits=spec.bits, rows=out, in_features=features, tokens=spec.tokens)),
        "gemm": ("gemm", gemm_key(bits=bits, dtype=x.dtype, out_features=out, features=features, rows=spec.tokens)),
        "matmul": ("dequantise", tuning.weight_class(spec.bits)),
        "tile": ("linear_tile", tile_key(bits=bits, out_features=out, features=features, rows=spec.tokens)),
    }[linear.kernel_for(rows=spec.tokens, bits=bits, group=group, out_features=out, features=features)]  # fmt: skip
    return Case(
        op="linear", shape=f"{spec.variant} {out}x{features} {'bf16' if spec.bits == 16 else f'int{spec.bits}'}",
        phase=spec.phase, tokens=spec.tokens, call=linear.linear, reference=linear.reference_linear, copies=copies,
        moved=moved("linear", copies[0]), tolerance=tolerance_of(spec),
        flops=2 * spec.tokens * out * features, tuned=(table,), info={"group": shapes.group, "bits": spec.bits},
    )  # fmt: skip


def same_choice(actual: tuple, expected: tuple) -> list[Result]:
    """The router: shares by ratio; ids may differ only where two logits are equal to rounding, which is rare."""
    ids, shares, _ = actual
    expected_ids, expected_shares, _ = expected
    other = (ids != expected_ids).float().mean().item()
    return [ratios("shares", shares, expected_shares, DECODE_TOLERANCE), ("ids that differ", other, 1e-3, other)]


def build_router(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    decode = spec.phase == "decode"
    batch, tokens = (spec.tokens, 1) if decode else (1, spec.tokens)
    x = source.randn(batch, tokens, shapes.hidden)
    weight = source.randn(shapes.experts, shapes.hidden, scale=shapes.hidden**-0.5)
    key = f"plain16/{shapes.experts}x{shapes.hidden}"
    row = "router_gemv" if router.gemv_serves(rows=spec.tokens, key=key) else "router_limbs"
    trace = torch.zeros(batch, tokens, shapes.top_k, dtype=torch.int32, device=source.device)
    shared = {
        "x": x, "norm_weight": source.randn(shapes.hidden, dtype=torch.float32, scale=0.2), "eps": EPS,
        "top_k": shapes.top_k, "positions": torch.zeros(batch, dtype=torch.int64, device=source.device),
        "expert_ids": trace,
    }  # fmt: skip
    copies = [{**shared, "weight": weight.clone()} for _ in range(count_for(cold, size_of(weight)))]
    return Case(
        op="router", phase=spec.phase, tokens=spec.tokens,
        shape=f"{shapes.experts}x{shapes.hidden} bf16, top {shapes.top_k}", call=router.router,
        reference=router.reference_router, copies=copies,
        mutated=("expert_ids",),
        moved=moved("router", copies[0]), tolerance=tolerance_of(spec), compare=same_choice,
        flops=2 * spec.tokens * shapes.experts * shapes.hidden,
        tuned=((row, key),),
    )  # fmt: skip


def packed_rows(x: Tensor, norm_weight: Tensor, shared_gate: Tensor, top_k: int, form: dict[str, int]) -> Tensor:
    """x [B, 1, D] packed by a router for experts of this form."""
    trace = torch.zeros(x.shape[0], 1, top_k, dtype=torch.int32, device=x.device)
    return router.router_packed(
        x=x, norm_weight=norm_weight, weight=x.new_zeros(top_k, x.shape[-1]), eps=EPS, top_k=top_k,
        positions=trace.new_zeros(x.shape[0], dtype=torch.int64), expert_ids=trace, shared_gate=shared_gate, **form,
    )[2]  # fmt: skip


def build_moe(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    """Decode: the tokens of one call choose disjoint experts (the most that they can read), and successive calls walk
    through all of them. Prefill: uniform routing, where a call reads every expert, more than L2 holds."""
    decode = spec.phase == "decode"
    batch, tokens = (spec.tokens, 1) if decode else (1, spec.tokens)
    count, top_k, bits = shapes.experts, shapes.top_k, spec.bits
    weights = {}
    for name, shape in {
        "gate_up": (count, 2 * shapes.expert_width, shapes.hidden), "down": (count, shapes.hidden, shapes.expert_width),
    }.items():  # fmt: skip
        weights[name], weights[f"{name}_scales"] = source.weight(*shape, bits=bits, group=shapes.group)
    expert = size_of(*weights.values()) // count
    x = source.randn(batch, tokens, shapes.hidden)
    shared: dict[str, Any] = {
        "x": x, "norm_weight": source.randn(shapes.hidden, dtype=torch.float32, scale=0.2), "eps": EPS, **weights,
        "shared_gate": source.randn(1, shapes.hidden, scale=shapes.hidden**-0.5),
    }  # fmt: skip
    read = min(spec.tokens * top_k, count) if decode else count
    copies = []
    walk = torch.randperm(count, generator=source.generator, device=source.device).to(torch.int32)
    for call in range(count_for(cold, expert * read, at_most=64)):
        ids, shares = source.choices(spec.tokens, count, top_k)
        if decode:
            first = call * spec.tokens * top_k
            places = torch.arange(first, first + spec.tokens * top_k, device=source.device) % count
            ids = walk[places].view(spec.tokens, top_k)
        copy = {"ids": ids.view(batch, tokens, top_k), "weights": shares.view(batch, tokens, top_k)}
        for name, stored in {
            "shared_gate_up": (2 * shapes.shared_width, shapes.hidden), "shared_down": (shapes.hidden, shapes.shared_width),
        }.items():  # fmt: skip
            copy[name], copy[f"{name}_scales"] = source.weight(*stored, bits=bits, group=shapes.group)
        copies.append({**shared, **copy})
    op: Callable = moe.moe_decode if decode else moe_prefill.moe_prefill
    form = moe.packed_form(x, copies[0]) if decode else {}
    if form:  # as in a step, where the router's kernels pack the rows
        op = partial(op, packed=packed_rows(x, shared["norm_weight"], shared["shared_gate"], top_k, form))
    size, flops_width = f"{shapes.hidden}x{shapes.expert_width}", top_k * shapes.expert_width + shapes.shared_width
    key = f"int{bits}/{size}"
    tile: dict[str, Any] = {"bits": bits, "features": shapes.hidden, "width": shapes.expert_width, "rows": spec.tokens}
    kind, served = ("_packed", f"{key}/{spec.tokens}") if form else ("", key)
    tuned: tuple[tuple[str, str], ...] = tuple((f"moe_{kernel}{kind}", served) for kernel in ("gate_up", "down"))
    if decode and moe.tile_row(x, moe.decode_formats(copies[0], features=shapes.hidden)) is not None:
        tuned = (("moe_tile", moe_tile.moe_tile_key(**tile)),)
    return Case(
        op="moe", shape=f"{top_k} of {count} + shared, {size} int{bits}", phase=spec.phase, tokens=spec.tokens,
        call=op,
        reference=moe_reference.reference_moe_decode if decode else moe_reference.reference_moe_prefill, copies=copies,
        moved=moved("moe", copies[0], experts=read), tolerance=tolerance_of(spec),
        flops=6 * spec.tokens * shapes.hidden * flops_width,
        tuned=tuned if decode else (("moe_prefill", f"half/int{bits}/{size}"),), info={"group": shapes.group},
    )  # fmt: skip


def build_gdn(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    decode = spec.phase == "decode"
    batch, tokens = (spec.tokens, 1) if decode else (1, spec.tokens)
    heads, dims = (shapes.gdn_k_heads, shapes.gdn_v_heads), (shapes.gdn_k_dim, shapes.gdn_v_dim)

    def fresh() -> dict[str, Tensor]:
        return {
            "proj": source.randn(batch, tokens, shapes.gdn_row),
            "conv_weight": source.randn(shapes.channels, shapes.conv_width, scale=0.5),
            "a_log": source.randn(heads[1], dtype=torch.float32) - 1.0,
            "dt_bias": source.randn(heads[1], dtype=torch.float32) - 1.0,
            "norm_weight": 1 + source.randn(dims[1], scale=0.1),
            "conv_state": source.randn(batch, shapes.channels, shapes.conv_width - 1),
            "recurrent_state": source.randn(batch, heads[1], *dims, dtype=torch.float32, scale=0.3),
        }  # fmt: skip

    first = fresh()
    size = size_of(*first.values())
    sizes = dict(zip(("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"), (*heads, *dims), strict=True))
    copies = [{**first, **sizes, "eps": EPS}]
    copies += [{**fresh(), **sizes, "eps": EPS} for _ in range(count_for(cold, size) - 1)]
    reference = gated_delta_reference.reference_gdn_decode if decode else gated_delta_reference.reference_gdn_prefill
    key = gated_delta.decode_key(batch=batch, k_heads=heads[0], v_heads=heads[1], dims=dims)
    tuned = ("gdn_decode", key) if decode else ("gdn_prefill", f"half/{dims[0]}x{dims[1]}")
    return Case(
        op="gdn", shape=f"{heads[0]}/{heads[1]} heads of {dims[0]}, conv, norm", phase=spec.phase, tokens=spec.tokens,
        call=gated_delta.gdn_decode if decode else gated_delta_prefill.gdn_prefill,
        reference=reference, copies=copies,
        moved=moved("gdn", copies[0]), tolerance=tolerance_of(spec),
        mutated=("conv_state", "recurrent_state"), tuned=(tuned,),
    )  # fmt: skip


def build_rope(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    decode = spec.phase == "decode"
    batch, tokens = (spec.tokens, 1) if decode else (1, spec.tokens)
    slots, dim = tokens + 128, shapes.head_dim
    steps = torch.arange(0, shapes.rotary, 2, device=source.device, dtype=torch.float32)
    shared = {
        "q_norm": source.randn(dim, dtype=torch.float32, scale=0.2),
        "k_norm": source.randn(dim, dtype=torch.float32, scale=0.2),
        "inv_freq": 1.0 / 10_000_000 ** (steps / shapes.rotary),
        "positions": torch.full((batch,), 100, dtype=torch.int64, device=source.device),
        "num_heads": shapes.heads, "eps": EPS,
    }  # fmt: skip
    cache = (batch, shapes.kv_heads, slots, dim)
    size = 2 * spec.tokens * shapes.attention_row
    copies = [
        {
            **shared, "qkv": source.randn(batch, tokens, shapes.attention_row), "k_cache": source.randn(*cache),
            "v_cache": source.randn(*cache),
        }
        for _ in range(count_for(cold, size + 4 * batch * shapes.kv_heads * slots * dim))
    ]  # fmt: skip
    return Case(
        op="rope", shape=f"{shapes.heads}+{shapes.kv_heads} heads of {dim}, {shapes.rotary} rotary", phase=spec.phase,
        tokens=spec.tokens, call=qk_norm_rope.qk_norm_rope, reference=qk_norm_rope.reference_qk_norm_rope, copies=copies,
        moved=moved("qk_norm_rope", copies[0]), tolerance=DECODE_TOLERANCE, mutated=("k_cache", "v_cache"),
        tuned=(("qk_norm_rope", f"half/{dim}"),),
    )  # fmt: skip


def build_attention(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    decode = spec.phase == "decode"
    batch, tokens = (spec.tokens, 1) if decode else (1, spec.tokens)
    kv_len, dim = int(spec.variant) if decode else spec.tokens, shapes.head_dim
    shared = {
        "q": source.randn(batch, tokens, shapes.heads, dim),
        "qkv": source.randn(batch, tokens, shapes.attention_row),
        "positions": torch.full((batch,), kv_len - tokens, dtype=torch.int64, device=source.device),
    }
    cache = (batch, shapes.kv_heads, kv_len, dim)
    size = 4 * batch * shapes.kv_heads * kv_len * dim
    copies = [
        {**shared, "k_cache": source.randn(*cache), "v_cache": source.randn(*cache)}
        for _ in range(count_for(cold, size))
    ]  # fmt: skip
    table = f"half/{max(16, dim)}"
    tuned = ("attention_prefill",) if not decode else ("attention_decode", "attention_splits", "attention_merge")
    return Case(
        op="attention", shape=f"{shapes.heads}/{shapes.kv_heads} heads of {dim}, {kv_len} slots", phase=spec.phase,
        tokens=spec.tokens, call=attention_splits.sdpa_decode_splitk if decode else attention.sdpa_prefill,
        reference=attention_reference.reference_sdpa, copies=copies, moved=moved("sdpa", copies[0], slots=kv_len),
        tolerance=tolerance_of(spec),
        flops=4 * shapes.heads * dim * (batch * kv_len if decode else tokens * (tokens + 1) // 2),
        tuned=tuple((op, table) for op in tuned),
    )  # fmt: skip


def same_token(actual: tuple, expected: tuple) -> list[Result]:
    other = (actual[0] != expected[0]).float().mean().item()
    return [("tokens that differ", other, 0.0, other)]


def build_sample(spec: Spec, shapes: Shapes, source: SeededTensors, cold: int) -> Case:
    logits = source.randn(spec.tokens, 1, shapes.vocab, scale=3.0)
    copies = [{"logits": logits.clone()} for _ in range(count_for(cold, size_of(logits)))]
    return Case(
        op="sample", shape=f"greedy of {shapes.vocab} bf16", phase="decode", tokens=spec.tokens, call=sample.greedy,
        reference=sample.reference_greedy, copies=copies, moved=moved("sample", copies[0]), tolerance=0.0, compare=same_token,
        tuned=(("sample", f"half/{shapes.vocab}"),),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Spec, Shapes, SeededTensors, int], Case]] = {
    "linear": build_linear,
    "router": build_router,
    "moe": build_moe,
    "gdn": build_gdn,
    "rope": build_rope,
    "attention": build_attention,
    "sample": build_sample,
}
