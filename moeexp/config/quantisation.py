"""Which weights are quantised, and in what groups."""

from __future__ import annotations

import math
import re

from moeexp.config.architecture import Architecture
from moeexp.config.schema import QuantConfig

# What `quant.skip` may name -> the buffers that it means. The last three have no quantised op and are always left out.
KINDS = {
    "head": re.compile(r"^head\.weight$"),
    "linear_attention": re.compile(r"mixer\.in_proj\.weight$"),
    "attention": re.compile(r"mixer\.qkv_proj\.weight$"),
    "out_proj": re.compile(r"mixer\.out_proj\.weight$"),
    "experts": re.compile(r"moe\.(gate_up|down)\.weight$"),
    "shared_expert": re.compile(r"moe\.shared_(gate_up|down)\.weight$"),
    "embedding": re.compile(r"^embed_tokens\.weight$"),
    "router": re.compile(r"moe\.router$"),
    "shared_expert_gate": re.compile(r"moe\.shared_gate$"),
}
NEVER_QUANTISED = ("embedding", "router", "shared_expert_gate")


def kind_of(name: str) -> str | None:
    """The kind in `KINDS` of a buffer that is a matrix of weights, None for vectors, the conv filter and state."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)


def check_skip(skip: tuple[str, ...]) -> None:
    """`ValueError` unless `quant.skip` names known kinds, those without a quantised op among them."""
    unknown, required = sorted(set(skip) - set(KINDS)), sorted(set(NEVER_QUANTISED) - set(skip))
    if unknown:
        raise ValueError(f"quant.skip names {unknown[0]!r}; the kinds are {', '.join(KINDS)}")
    if required:
        raise ValueError(f"quant.skip must name {required[0]!r}: it has no quantised op")


def in_features(arch: Architecture, skip: list[str]) -> dict[str, int]:
    """The row length that a quantisation group has to divide, for each matrix that is not left out."""
    attention = arch.num_attention_heads * arch.head_dim
    kinds = {
        "head": {"head": arch.hidden_size},
        "linear_attention": {"linear_attention": arch.hidden_size},
        "attention": {"attention": arch.hidden_size},
        "out_proj": {"linear_attention out_proj": arch.value_dim, "attention out_proj": attention},
        "experts": {"experts gate_up": arch.hidden_size, "experts down": arch.moe_intermediate_size},
        "shared_expert": {
            "shared_expert gate_up": arch.hidden_size,
            "shared_expert down": arch.shared_expert_intermediate_size,
        },
    }
    return {name: size for kind, sizes in kinds.items() if kind not in skip for name, size in sizes.items()}


def default_group_size(arch: Architecture, quant: QuantConfig) -> int:
    """64 below a hidden size of 1024, else 128; halved until it divides every row (32 for nano)."""
    size = 64 if arch.hidden_size < 1024 else 128
    common = math.gcd(*in_features(arch, quant.skip).values())
    while common % size:
        size //= 2
    return size
