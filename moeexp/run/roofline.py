"""The least bytes that one decode step must move: what a speed is held against."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from moeexp_kernels import traffic
from moeexp_kernels.registry import OPS
from torch import Tensor
from torch.func import functional_call

from moeexp.config.architecture import Architecture
from moeexp.model.qwen3_5_moe import Qwen35MoE, state_shapes

LAYER = re.compile(r"layers\.(\d+)\.")


def distinct_experts(ids: Tensor) -> list[float]:
    """ids [L, B, N, k]: the experts of N steps. Per layer, how many distinct ones a step reads, on average."""
    layers, batch, steps, k = ids.shape
    ordered = ids.transpose(1, 2).reshape(layers, steps, batch * k).sort(-1).values
    new = (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1
    return new.double().mean(-1).tolist()


def expected_experts(arch: Architecture, batch: int) -> float:
    """The same of sequences that each choose uniformly."""
    missed = (1 - arch.num_experts_per_tok / arch.num_experts) ** batch
    return arch.num_experts * (1 - missed)


@dataclass(frozen=True)
class OpCall:
    """An op of a decode step. `role`: of a linear, which projection it is; `layer`: None outside of them. `parts`: the bytes of
    each kind that each part of it moves, as `moeexp_kernels.traffic` has them."""

    op: str
    role: str
    layer: int | None
    parts: dict[str, Counter[str]]


def step_calls(model: Qwen35MoE, *, batch: int, length: int, ids: Tensor | None = None) -> list[OpCall]:
    """The ops of a decode step of `batch` sequences at context `length`, in order, from the embedding to the sampling. ids as in
    `experts_per_layer`. What several ops read counts with the first. Of the model only shapes are read: it may be on meta."""
    experts, dtype = experts_per_layer(model.arch, batch=batch, ids=ids), model.embed_tokens.weight.dtype
    buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    shapes = state_shapes(model.arch, batch=batch, max_seq_len=length + 1, dtype=dtype)
    state = {name: torch.empty(shape, dtype=kind, device="meta") for name, (shape, kind) in shapes.items()}
    names = {id(tensor): name for name, tensor in (buffers | state).items()}
    row = batch * model.embed_tokens.weight[0].nbytes
    calls = [OpCall("embedding", "", None, {traffic.WHOLE: Counter(weights=row, activations=row)})]
    read: set[str] = set()

    def name_of(value: Any) -> str | None:
        """Of a buffer, or of a row of one, which is a view of it."""
        base = getattr(value, "_base", None)
        return names.get(id(value if base is None else base))

    def run(op: str, **arguments: Any) -> Any:
        named = {key: name for key, value in arguments.items() if key not in traffic.NOT_READ and (name := name_of(value))}
        layer = next((int(found[1]) for name in named.values() if (found := LAYER.match(name))), None)
        role = "" if op != "linear" else "head" if layer is None else named["weight"].split(".")[-2]
        parts = traffic.traffic(
            traffic.base(op), arguments, slots=length, experts=0 if layer is None else experts[layer],
            without=[key for key, name in named.items() if name in buffers and name in read],
        )  # fmt: skip
        read.update(named.values())
        calls.append(OpCall(op, role, layer, parts))
        outputs = traffic.OUTPUTS[traffic.base(op)](arguments)
        return outputs if len(outputs) > 1 else outputs[0]

    ops = {op: partial(run, op) for op in OPS}
    tokens, positions = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((batch, 1), (batch,)))
    logits = functional_call(model, buffers, (tokens, positions, None), {"ops": ops, "phase": "decode", "state": state})
    run("sample", logits=logits)
    return calls


def experts_per_layer(arch: Architecture, *, batch: int, ids: Tensor | None) -> list[float]:
    """Distinct experts that a step reads in each layer, of the choices `ids` [L, B, N, k] of N steps on average; without a step
    as many as uniform choice is expected to."""
    if ids is not None and ids.shape[2]:
        return distinct_experts(ids)
    return [expected_experts(arch, batch)] * arch.num_hidden_layers


def bytes_per_step(model: Qwen35MoE, *, batch: int, length: int, ids: Tensor | None = None) -> dict[str, Any]:
    """Bytes of a decode step, the sum over its ops: weights read (of experts those that are chosen, each once), embedding rows,
    recurrent and conv state read and written, KV cache read up to `length` and appended. `total` is what memory must deliver:
    without `activations`, which ops hand to one another through a cache. `ids` as in `experts_per_layer`: where they are of no
    step, `counted` is false."""
    steps = 0 if ids is None else ids.shape[2]
    experts = experts_per_layer(model.arch, batch=batch, ids=ids)
    calls = step_calls(model, batch=batch, length=length, ids=ids)
    of_kind = {kind: sum(part[kind] for call in calls for part in call.parts.values()) for kind in traffic.KINDS}
    return of_kind | {
        "total": sum(of_kind[kind] for kind in traffic.STORED),
        "distinct_experts": round(statistics.fmean(experts), 4),
        "counted": bool(steps),
        "counted_steps": steps,
    }


def bandwidth_share(floor: dict[str, Any], *, step_s: float) -> float | None:
    """floor: the record's `bytes_per_token`. None where a step's bytes fit in a cache of the device, so that memory need
    not deliver them, or where it is not known what fits."""
    cache = floor["cache_bytes"]
    if cache is None or floor["total"] <= cache:
        return None
    return floor["total"] / step_s / (floor["read_bandwidth_gb_s"] * 1e9)
