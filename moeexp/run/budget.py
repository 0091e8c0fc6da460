"""Where a decode step's time goes beside the bytes that it must move: by kernel, and by kind of layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from moeexp_kernels import traffic

from moeexp.run.op_kernels import OpKernel
from moeexp.run.roofline import OpCall

# What is of no layer, in `layers` after the kinds of layers.
HEAD, REST = "head", "embedding, sampling, others"


def step_budget(calls: Sequence[OpCall], kernels: Sequence[OpKernel], layer_types: Sequence[str]) -> dict[str, Any]:
    """The record's `step_budget`, of the ops of a step and the kernels that were placed among them.

    `rows`: the kernels of each op, then those of none under their own names. What an op moves stands at the kernel that moves
    it, and in a row without a kernel where none was seen. `bytes`, which memory must deliver, add up to the `total` of
    `bytes_per_token`; `us` to the time of all kernels, `adds_us` to that in which any ran. `layers`: what the layers of a kind
    add; none where the kernels could not be placed."""
    rows = []
    for label in dict.fromkeys(map(_label, calls)):
        ours = [call for call in calls if _label(call) == label]
        own = [kernel for kernel in kernels if kernel.own and kernel.at is not None and _label(calls[kernel.at]) == label]
        parts = {part: sum((call.parts[part] for call in ours), Counter()) for part in ours[0].parts}
        table = traffic.KERNELS.get(traffic.base(ours[0].op), {})
        seen = dict.fromkeys([*(name for name in table if any(kernel.name == name for kernel in own)), *(k.name for k in own)])
        for name in seen:
            moves = next((part for part in parts if table.get(name, traffic.WHOLE) == part), None)
            rows.append(_row(label, [kernel for kernel in own if kernel.name == name], parts.pop(moves) if moves else Counter()))
        if parts:
            rows.append(_row(label, [], sum(parts.values(), Counter())))
    others = dict.fromkeys(kernel.name for kernel in kernels if not kernel.own)
    of_none = [_row(None, [kernel for kernel in kernels if not kernel.own and kernel.name == name], Counter()) for name in others]
    rows += sorted(of_none, key=lambda row: -row["us"])
    placed = any(kernel.at is not None for kernel in kernels)
    return {"rows": rows, "layers": _layers(calls, kernels, layer_types) if placed else None}


def _label(call: OpCall) -> str:
    return f"{call.op} {call.role}".strip()


def _row(op: str | None, kernels: Sequence[OpKernel], moved: Counter[str]) -> dict[str, Any]:
    return {
        "op": op,
        "kernel": kernels[0].name[:120] if kernels else None,
        "calls": round(sum(kernel.calls for kernel in kernels), 3),
        "bytes": _stored(moved),
        "activations": moved[traffic.ACTIVATIONS],
        "us": round(sum(kernel.us for kernel in kernels), 3),
        "adds_us": round(sum(kernel.adds_us for kernel in kernels), 3),
    }


def _stored(moved: Counter[str]) -> int:
    return sum(moved[kind] for kind in traffic.STORED)


def _layers(calls: Sequence[OpCall], kernels: Sequence[OpKernel], layer_types: Sequence[str]) -> list[dict[str, Any]]:
    count = Counter(layer_types) | Counter({HEAD: 1, REST: 1})
    parts = [HEAD if call.role == HEAD else REST if call.layer is None else layer_types[call.layer] for call in calls]
    moved: Counter[str] = Counter()
    for call, part in zip(calls, parts, strict=True):
        moved[part] += sum(map(_stored, call.parts.values()))
    us = dict.fromkeys(count, 0.0)
    for kernel in kernels:
        us[REST if kernel.at is None else parts[kernel.at]] += kernel.adds_us
    return [{"name": name, "count": count[name], "bytes": moved[name], "adds_us": round(us[name], 3)} for name in count]
