"""Implementations of every op, by name. `auto` is resolved per device by `resolve`; nothing is chosen silently."""

from __future__ import annotations

import os
from collections.abc import Callable

from moeexp_kernels import user_ops
from moeexp_kernels.ops import (
    attention,
    attention_reference,
    attention_splits,
    embedding,
    gated_delta,
    gated_delta_prefill,
    gated_delta_reference,
    linear,
    mixed,
    moe,
    moe_prefill,
    moe_reference,
    qk_norm_rope,
    router,
    sample,
)
from moeexp_kernels.removed import refuse_removed

OPS: dict[str, dict[str, Callable]] = {
    "linear": {
        "reference": linear.reference_linear,
        "triton": linear.linear,
        "tile": linear.linear_tile,  # as triton, and a row's result does not depend on how many rows there are, up to 32
    },
    "gdn_prefill": {"reference": gated_delta_reference.reference_gdn_prefill, "triton": gated_delta_prefill.gdn_prefill},
    "gdn_decode": {
        "reference": gated_delta_reference.reference_gdn_decode,
        "triton": gated_delta.gdn_decode,
        # The published ladder's names: one fused recurrent kernel, the traced definition, the prefill kernels at T = 1.
        "recurrent": gated_delta.gdn_decode,
        "einsum": gated_delta_reference.reference_gdn_decode,
        "chunked": gated_delta_prefill.gdn_prefill,
    },
    "qk_norm_rope": {"reference": qk_norm_rope.reference_qk_norm_rope, "triton": qk_norm_rope.qk_norm_rope},
    "sdpa_prefill": {"reference": attention_reference.reference_sdpa_prefill, "triton": attention.sdpa_prefill},
    "sdpa_decode": {
        "reference": attention_reference.reference_sdpa,
        "triton": attention_splits.sdpa_decode_splitk,
        "splitk": attention_splits.sdpa_decode_splitk,
        "tiled": attention.sdpa_decode_tiled,
    },
    "router": {"reference": router.reference_router, "triton": router.router},
    "moe_prefill": {"reference": moe_reference.reference_moe_prefill, "triton": moe_prefill.moe_prefill},
    "moe_decode": {
        "reference": moe_reference.reference_moe_decode,
        "triton": moe.moe_decode,
        "tile": moe.moe_decode_tile,  # as triton, and a row's result does not depend on how many rows there are, up to 32
    },
    "sample": {"reference": sample.reference_greedy, "triton": sample.greedy},
}

# A draw from the softmax by the implementation of `sample` that is chosen; `OPS["sample"]` is the greedy choice.
DRAWS: dict[str, Callable] = {"reference": sample.reference_sample, "triton": sample.sample}

# An op that chooses the next token, and the one that also makes it the next step's input; of others torch's ops do that.
FEEDS: tuple[tuple[Callable, Callable], ...] = ((sample.greedy, sample.feed_greedy), (sample.sample, sample.feed_sample))

# What `auto` means.
AUTO = {"cpu": "reference", "cuda": "triton"}

# Implementations that run without Triton: traced torch ops, or a callback into Python.
PORTABLE = ("reference", "einsum")

# Implementations that call back into Python at run time, also from a compiled method; the record lists them.
OPAQUE = {("gdn_prefill", "reference"), ("sdpa_prefill", "reference"), ("moe_prefill", "reference")}


# Ops that `dispatch=single` replaces by one that chooses when it runs, which is such a callback in both phases.
DISPATCHED = ("linear", "gdn_prefill", "gdn_decode", "sdpa_prefill", "sdpa_decode", "moe_prefill", "moe_decode")


def resolve(*, default: str, chosen: dict[str, str | None], device: str) -> dict[str, str]:
    """The implementation's name for each op: `chosen[op]` where given, else `default` (`auto` picks by device).

    A name `module:function` is a user's own, see `user_ops`. `ValueError` for an unknown op, a name that the op does not
    have, or one of our Triton kernels on a CPU (there only Triton's interpreter can run it)."""
    unknown = sorted(set(chosen) - set(OPS))
    if unknown:
        raise ValueError(f"ops.{unknown[0]} is not an op; the ops are {', '.join(OPS)}")
    names = {}
    for op, implementations in OPS.items():
        wanted = chosen.get(op) or default
        name = AUTO[device] if wanted == "auto" else wanted
        refuse_removed(op, name)
        if user_ops.is_user_op(name):
            user_ops.load(op, name, implementations.values())
        elif name not in implementations:
            allowed = ", ".join(("auto", *implementations))
            raise ValueError(f"ops.{op}={wanted!r} does not exist; implementations of {op}: {allowed}, or module:function")
        elif device == "cpu" and name not in PORTABLE and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"ops.{op}={name} is a Triton kernel and device is cpu: use ops=auto or ops=reference, or set "
                "TRITON_INTERPRET=1 to run it (very slowly) in Triton's interpreter"
            )
        names[op] = name
    return names


def implementation(op: str, name: str) -> Callable:
    """The callable that a name out of `resolve` stands for."""
    return user_ops.load(op, name, OPS[op].values()) if user_ops.is_user_op(name) else OPS[op][name]


def feed_of(op: Callable) -> Callable | None:
    """The op of `FEEDS` for one that chooses the next token, or None. By the op and not by its name: what stands in for one of
    ours, under whatever name, is called and not passed over."""
    return next((feed for choice, feed in FEEDS if choice is op), None)


def joined(names: dict[str, str]) -> dict[str, Callable]:
    """What the implementations that `names` chooses can do together in a decode step, by what the model calls it:
    `embedding`, beside which the first linear layer starts, `routed_experts`, router and experts, and `gdn_out` and `sdpa_out`,
    a mixer and its output projection."""
    found: dict[str, Callable] = {}
    if names["linear"] in ("triton", "tile"):
        found["embedding"] = embedding.embedding
    if names["router"] == names["moe_decode"] == "triton":
        found["routed_experts"] = moe.routed_experts
    if names["linear"] == "triton" and names["gdn_decode"] in ("triton", "recurrent"):
        found["gdn_out"] = mixed.gdn_out
    if names["linear"] == "triton" and names["sdpa_decode"] in ("triton", "splitk"):
        found["sdpa_out"] = mixed.sdpa_out
    return found


def identities(names: dict[str, str]) -> dict[str, str]:
    """`names` with the digest of its sources behind each user's op: what a cache of anything made with them is keyed on."""
    return {op: f"{name}@{user_ops.digest(name)}" if user_ops.is_user_op(name) else name for op, name in names.items()}
