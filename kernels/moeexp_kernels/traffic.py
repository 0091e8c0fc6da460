"""What one call of an op must move, told by its arguments, and the kernels that an op launches, with what of it each moves.

The one table of both: the bench's `moved`, the bytes of a decode step and the budget of its kernels are sums over it. What an
op's kernels hand to one another is not counted: another implementation need not write it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# Kinds of bytes. Weights: with scales, norms and other constants. State is read and written; of the KV cache the slots in use
# are read and the new ones written. Activations are what goes in and comes out.
WEIGHTS, STATE, KV_CACHE, ACTIVATIONS = KINDS = ("weights", "state", "kv_cache", "activations")
STORED = (WEIGHTS, STATE, KV_CACHE)  # what memory must deliver in a step: activations come from a cache of the device
# Of an argument that is not named here: weights.
ARGUMENTS = {
    **dict.fromkeys(("x", "residual", "proj", "q", "ids", "weights", "logits", "positions", "valid_len"), ACTIVATIONS),
    **dict.fromkeys(("conv_state", "recurrent_state"), STATE),
}  # fmt: skip
EXPERTS = ("gate_up", "gate_up_scales", "down", "down_scales")  # of which those chosen are read
# What one op's kernels hand to the next one's.
NOT_READ = ("packed", "limbs", "units")

WHOLE, GATE_UP, DOWN, NOTHING = "whole", "gate_up", "down", ""
# {op without its phase: {kernel: what it moves of the op's bytes}}, kernels of either phase: at T = 1 both may serve. The
# experts' bytes are two parts; of other ops one kernel moves what must be moved, and the others what it handed to them.
KERNELS: dict[str, dict[str, str]] = {
    "embedding": {"embedding_kernel": WHOLE},
    "linear": {
        "gemv_kernel": WHOLE, "gated_gemv_kernel": WHOLE, "linear_tile_kernel": WHOLE, "gemm_kernel": WHOLE,
        "dequantise_kernel": WHOLE, "limbs_kernel": NOTHING, "rms_norm_kernel": NOTHING,
    },
    "gdn": {
        "_decode_kernel": WHOLE, "_finish_kernel": NOTHING, "_scan_kernel": WHOLE, "conv_kernel": NOTHING,
        "_local_kernel": NOTHING, "_output_kernel": NOTHING,
    },
    "qk_norm_rope": {"_qk_norm_rope_kernel": WHOLE},
    "sdpa": {"_attend_kernel": WHOLE, "_attend_splits_kernel": WHOLE, "_merge_kernel": NOTHING},
    "router": {
        "gemv_kernel": WHOLE, "gemm_kernel": WHOLE, "limb_logits_kernel": WHOLE, "rms_norm_kernel": NOTHING,
        "norm_limbs_kernel": NOTHING, "choose_experts_kernel": NOTHING, "logits_packed_kernel": WHOLE,
    },
    "moe": {
        **dict.fromkeys(("gate_up_kernel", "gate_up_packed_kernel", "gate_up_routed_kernel", "gate_up_tile_kernel",
                         "grouped_gate_up_kernel"), GATE_UP),
        **dict.fromkeys(("down_kernel", "down_packed_kernel", "down_routed_kernel", "down_tile_kernel",
                         "grouped_down_kernel"), DOWN),
        **dict.fromkeys(("limbs_kernel", "combine_tile_kernel", "norm_kernel", "count_kernel", "sort_kernel",
                         "combine_kernel", "order_pairs_kernel"), NOTHING),
    },
    "sample": {"_chunk_best_kernel": WHOLE, "_narrow_kernel": NOTHING, "_best_kernel": NOTHING},
}  # fmt: skip
# The kernels after which an op is over, where the next op may begin with one that both have.
LAST = {
    "embedding": ("embedding_kernel",),
    "linear": ("gemv_kernel", "gated_gemv_kernel", "linear_tile_kernel", "gemm_kernel", "dequantise_kernel"),
    "gdn": ("_finish_kernel", "_output_kernel"),
    "qk_norm_rope": ("_qk_norm_rope_kernel",), "sdpa": ("_merge_kernel",), "sample": ("_best_kernel",),
    "router": ("choose_experts_kernel", "logits_packed_kernel"),
    "moe": ("down_kernel", "down_packed_kernel", "down_routed_kernel", "combine_tile_kernel", "combine_kernel"),
}  # fmt: skip


def base(op: str) -> str:
    """An op without its phase."""
    return op.removesuffix("_decode").removesuffix("_prefill")


def _rows(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*like.shape[:-1], *shape, dtype=dtype or like.dtype, device="meta")


# {op: what a call returns}, of shapes and dtypes alone.
OUTPUTS: dict[str, Callable[[Mapping[str, Any]], tuple[Tensor, ...]]] = {
    "linear": lambda a: (_rows(a["x"], a["weight"].shape[0]),),
    "gdn": lambda a: (_rows(a["proj"], a["num_v_heads"] * a["head_v_dim"]),),
    "qk_norm_rope": lambda a: (_rows(a["qkv"], a["num_heads"], a["k_cache"].shape[-1]),),
    "sdpa": lambda a: (torch.empty_like(a["q"], device="meta").flatten(2),),
    "router": lambda a: (_rows(a["x"], a["top_k"], dtype=torch.int32), _rows(a["x"], a["top_k"], dtype=torch.float32)),
    "moe": lambda a: (torch.empty_like(a["x"], device="meta"),),
    "sample": lambda a: (torch.empty(a["logits"].shape[0], 1, dtype=torch.int64, device="meta"),),
}


def traffic(
    op: str, arguments: Mapping[str, Any], *, slots: float = 0, experts: float = 0, without: Collection[str] = ()
) -> dict[str, Counter[str]]:
    """{part, as `KERNELS` names it: bytes of each kind} of one call of an op without its phase. slots: of the KV cache in use
    before it; experts: distinct ones that are chosen; without: arguments that do not count. Of tensors only shapes are read:
    they may be on meta."""
    outputs = OUTPUTS[op](arguments)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    found[DOWN if op == "moe" else WHOLE][ACTIVATIONS] += sum(output.nbytes for output in outputs)
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or name in NOT_READ or name in without:
            continue
        kind, size = ARGUMENTS.get(name, WEIGHTS), float(value.nbytes)
        if name in EXPERTS and op == "moe":
            size *= experts / value.shape[0]
        elif name == "expert_ids":  # a trace, of which this call writes the new slots
            kind, size = ACTIVATIONS, size / value.shape[1] * arguments["x"].shape[1]
        elif name.endswith("_cache"):
            kind, size = KV_CACHE, size / value.shape[2] * (slots if op == "sdpa" else arguments["qkv"].shape[1])
        elif name == "qkv":  # of which attention reads the gate, and the rotation all but that
            gate = (arguments["q"] if op == "sdpa" else outputs[0]).nbytes
            kind, size = ACTIVATIONS, gate if op == "sdpa" else size - gate
        elif kind == STATE:
            size *= 2
        part = WHOLE if op != "moe" else DOWN if "down" in name else GATE_UP
        found[part][kind] += round(size)
    return dict(found)


def moved(op: str, arguments: Mapping[str, Any], *, slots: float = 0, experts: float = 0) -> int:
    """All bytes of such a call."""
    return sum(sum(part.values()) for part in traffic(op, arguments, slots=slots, experts=experts).values())
