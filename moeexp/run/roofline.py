"""The least bytes that one decode step must move: what a speed is held against."""

from __future__ import annotations

import re
import statistics
from typing import Any

from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.model.qwen3_5_moe import Linear, Qwen35MoE, state_shapes

EXPERTS = re.compile(r"layers\.(\d+)\.")


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


def bytes_per_step(model: Qwen35MoE, *, batch: int, length: int, ids: Tensor | None = None) -> dict[str, Any]:
    """Bytes of a decode step of `batch` sequences at context `length`: weights read (of experts those that are chosen, each
    once), embedding rows, recurrent and conv state read and written, KV cache read up to `length` and appended.

    `ids` [L, B, N, k]: the experts that N steps chose, which are counted; without a step, uniform choice is expected, and
    `counted` is false. Of the model only shapes are read: it may be on meta."""
    arch = model.arch
    steps = 0 if ids is None else ids.shape[2]
    if ids is None or not steps:
        experts = [expected_experts(arch, batch)] * arch.num_hidden_layers
    else:
        experts = distinct_experts(ids)
    weights = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "embed_tokens":
            size = module.weight.nbytes + (0 if module.scales is None else module.scales.nbytes)
            weights += round(size * experts[_layer(name)] / arch.num_experts) if len(module.shape) == 3 else size
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[0] not in linears:
            weights += buffer.nbytes
    row = model.embed_tokens.weight[0].nbytes
    dtype = model.embed_tokens.weight.dtype
    state = kv = 0
    for name, (shape, kind) in state_shapes(arch, batch=batch, max_seq_len=1, dtype=dtype).items():
        size = kind.itemsize
        for extent in shape:
            size *= extent
        if name.endswith("_cache"):
            kv += size * (length + 1)
        elif not name.endswith("expert_ids"):
            state += 2 * size
    return {
        "weights": weights + batch * row,
        "state": state,
        "kv_cache": kv,
        "total": weights + batch * row + state + kv,
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


def _layer(name: str) -> int:
    found = EXPERTS.match(name)
    assert found, f"{name} is no layer's"
    return int(found[1])
