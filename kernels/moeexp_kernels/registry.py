"""Implementations of every op, by name. `auto` is resolved per device by `resolve`; nothing is chosen silently."""

from __future__ import annotations

from collections.abc import Callable

from . import attention, gated_delta, linear, moe, sample

OPS: dict[str, dict[str, Callable]] = {
    "linear": {"reference": linear.reference_linear},
    "gdn_prefill": {"reference": gated_delta.reference_gdn_prefill},
    "gdn_decode": {"reference": gated_delta.reference_gdn_decode},
    "qk_norm_rope": {"reference": attention.reference_qk_norm_rope},
    "sdpa_prefill": {"reference": attention.reference_sdpa},
    "sdpa_decode": {"reference": attention.reference_sdpa},
    "router": {"reference": moe.reference_router},
    "moe_prefill": {"reference": moe.reference_moe_prefill},
    "moe_decode": {"reference": moe.reference_moe_decode},
    "sample": {"reference": sample.reference_greedy},
}

# What `auto` and `triton` mean where an op has no entry of that name yet is said here, op by op, and in the record.
AUTO = {"cpu": ("reference",), "cuda": ("triton", "reference")}

# Implementations that call back into Python at run time, also from a compiled method; the record lists them.
OPAQUE = {("gdn_prefill", "reference"), ("moe_prefill", "reference")}


def resolve(*, default: str, chosen: dict[str, str | None], device: str) -> dict[str, str]:
    """The implementation's name for each op: `chosen[op]` where given, else `default` (`auto` picks by device).

    `ValueError` for an unknown op, or a name that the op does not have."""
    unknown = sorted(set(chosen) - set(OPS))
    if unknown:
        raise ValueError(f"ops.{unknown[0]} is not an op; the ops are {', '.join(OPS)}")
    names = {}
    for op, implementations in OPS.items():
        wanted = chosen.get(op) or default
        candidates = AUTO[device] if wanted == "auto" else (wanted,)
        found = next((name for name in candidates if name in implementations), None)
        if found is None:
            raise ValueError(f"ops.{op}={wanted!r} does not exist; implementations of {op}: auto, {', '.join(implementations)}")
        names[op] = found
    return names
