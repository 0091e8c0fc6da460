"""Seeded faults: what a check of this program has to see. `moeexp.power` injects each and tells which part sees it.

They come in by the seams that are there: an op of the registry is wrapped, a loaded model is changed, our reading of the
config or our table of names is. Positions are those of a prompt of `PROMPT_LEN` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moeexp.config.rope import Yarn
from moeexp.model.checkpoint import Piece
from moeexp.model.dequantise import as_dtype
from moeexp.model.qwen3_5_moe import Linear, Qwen35MoE
from moeexp.model.rope import inverse_frequencies

PROMPT_LEN = 70  # one whole chunk of the delta rule and a part of another
POSITION = PROMPT_LEN + 1  # of the second decode step

Wrapper = Callable[..., Any]  # (the op, the model, its arguments) -> what the op returns
Pieces = dict[str, list[Piece]]


@dataclass(frozen=True)
class Fault:
    """`ops` are wrapped, `pieces` changes the table of names before loading, `model` what was loaded, `reading` fields of
    our Architecture, `config` keys of the snapshot's config.json; `session` has seen another prompt, and does not forget."""

    name: str
    ops: dict[str, Wrapper] = field(default_factory=dict)
    pieces: Callable[[Pieces], Pieces] | None = None
    model: Callable[[Qwen35MoE], None] | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    session: bool = False


# --- ops ---


def _scaled(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Any:
    result = op(**arguments)
    return (result[0], result[1] * 1.01) if isinstance(result, tuple) else result * 1.01


def _at(arguments: dict[str, Any], tokens: Tensor) -> bool:
    """A decode step at POSITION."""
    return tokens.shape[1] == 1 and int(arguments["positions"][0]) == POSITION


def _zeroed_head(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    out = op(**arguments).clone()
    if _at(arguments, arguments["q"]):
        out.view(*out.shape[:2], arguments["q"].shape[2], -1)[:, :, 0] = 0
    return out


def _stale_slot(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    before = [cache[:, :, POSITION].clone() for cache in caches]
    out = op(**arguments)
    if _at(arguments, arguments["qkv"]):
        for cache, old in zip(caches, before, strict=True):
            cache[:, :, POSITION] = old
    return out


def _next_position(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    copies = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    op(**arguments)
    return op(**arguments | copies | {"positions": arguments["positions"] + 1})


def _no_final_norm(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    is_head = arguments["weight"].shape[0] == model.arch.vocab_size
    return op(**arguments | ({"norm_weight": None} if is_head else {}))


def _other_expert(*, recorded: bool) -> Wrapper:
    """In the last layer, at one position: an expert that was not chosen in place of the best."""

    def wrapper(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids, weights = op(**arguments)
        if _at(arguments, arguments["x"]) and _same(arguments["norm_weight"], model.layers[-1].post_norm):
            free = set(range(model.arch.num_experts)) - set(ids[0, 0].tolist())
            ids = ids.clone()
            ids[:, :, 0] = min(free)
            if recorded:
                arguments["expert_ids"][:, POSITION] = ids[:, 0]
        return ids, weights

    return wrapper


def _dropped_chunk(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    """The recurrent state misses the tokens after the last whole chunk of 64."""
    state = arguments["recurrent_state"]
    kept, before = arguments["proj"].shape[1] // 64 * 64, state.clone()
    out = op(**arguments)
    if kept < arguments["proj"].shape[1]:
        conv = torch.zeros_like(arguments["conv_state"])  # as at the start of the prompt
        state.copy_(before)
        if kept:
            op(**arguments | {"proj": arguments["proj"][:, :kept].contiguous(), "conv_state": conv})
    return out


def _second_best(op: Callable, model: Qwen35MoE, arguments: dict[str, Any]) -> Tensor:
    """At every choice of a token."""
    logits = arguments["logits"].clone()
    return op(**arguments | {"logits": logits.scatter(-1, logits.argmax(-1, keepdim=True), float("-inf"))})


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


SCALED = (
    "linear", "gdn_prefill", "gdn_decode", "qk_norm_rope", "sdpa_prefill", "sdpa_decode", "router", "moe_prefill", "moe_decode",
)  # fmt: skip

# --- the table of names ---


def swapped(left: str, right: str) -> Callable[[Pieces], Pieces]:
    """Two parts of the snapshot's names, each for the other."""

    def change(table: Pieces) -> Pieces:
        def rename(piece: Piece) -> Piece:
            for old, new in ((left, right), (right, left)):
                if old in piece.key:
                    return replace(piece, key=piece.key.replace(old, new))
            return piece

        return {name: [rename(piece) for piece in parts] for name, parts in table.items()}

    return change


def swapped_in_experts(table: Pieces) -> Pieces:
    """`gate_proj` and `up_proj`, of routed experts."""
    change = swapped(".gate_proj.", ".up_proj.")
    return table | change({name: parts for name, parts in table.items() if name.endswith("moe.gate_up.weight")})


def rotated_experts(table: Pieces) -> Pieces:
    """Each expert of a snapshot that has them one by one is filled from the next one's tensors."""

    def rotate(parts: list[Piece]) -> list[Piece]:
        if parts[0].expert is None:
            return parts
        per_expert = len(parts) // (1 + max(piece.expert or 0 for piece in parts))
        keys = [piece.key for piece in parts]
        keys = keys[per_expert:] + keys[:per_expert]
        return [replace(piece, key=key) for piece, key in zip(parts, keys, strict=True)]

    return {name: rotate(parts) for name, parts in table.items()}


# --- what was loaded ---


def _reordered(linear: Linear, rows: Tensor, dim: int) -> None:
    """Quantised or not: groups lie within rows."""
    linear.weight = linear.weight.index_select(dim, rows)
    if linear.scales is not None:
        linear.scales = linear.scales.index_select(dim, rows)


def _swapped_rows(linear: Linear, first: int, second: int, count: int) -> None:
    dim = linear.weight.ndim - 2  # counted from the front, as scales have one dimension more
    rows = torch.arange(linear.weight.shape[dim])
    rows[first : first + count], rows[second : second + count] = (
        rows[second : second + count].clone(), rows[first : first + count].clone(),
    )  # fmt: skip
    _reordered(linear, rows.to(linear.weight.device), dim)


def _attention(model: Qwen35MoE) -> Any:
    return next(layer for layer in model.layers if layer.layer_type == "full_attention").mixer


def _swap_gate_up(model: Qwen35MoE) -> None:
    width = model.arch.moe_intermediate_size
    _swapped_rows(model.layers[0].moe.gate_up, 0, width, width)


def _swap_q_gate(model: Qwen35MoE) -> None:
    _swapped_rows(_attention(model).qkv_proj, 0, model.arch.head_dim, model.arch.head_dim)


def _swap_k_v(model: Qwen35MoE) -> None:
    a = model.arch
    start, count = 2 * a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    _swapped_rows(_attention(model).qkv_proj, start, start + count, count)


def _swap_b_a(model: Qwen35MoE) -> None:
    a = model.arch
    _swapped_rows(model.layers[0].mixer.in_proj, start := a.conv_dim + a.value_dim, start + a.linear_num_value_heads,
                  a.linear_num_value_heads)  # fmt: skip


def _rotate_experts(model: Qwen35MoE) -> None:
    rows = torch.arange(model.arch.num_experts, device=model.norm.device).roll(1)
    for linear in (model.layers[0].moe.gate_up, model.layers[0].moe.down):
        _reordered(linear, rows, 0)


def _swap_layers(model: Qwen35MoE) -> None:
    first, second = model.layers[0].moe, model.layers[1].moe
    model.layers[0].moe, model.layers[1].moe = second, first


def _swap_norms(model: Qwen35MoE) -> None:
    layer = model.layers[0]
    layer.input_norm, layer.post_norm = layer.post_norm, layer.input_norm


def _tie(model: Qwen35MoE) -> None:
    model.head.weight, model.head.scales = model.embed_tokens.weight, None


def _zero_row(model: Qwen35MoE) -> None:
    down = model.layers[0].moe.down
    if down.scales is None:
        down.weight = down.weight.clone()
        down.weight[0, 5] = 0
    else:
        down.scales = down.scales.clone()
        down.scales[0, 5] = 0


# A model without YaRN is one that is stretched by 1; over so short a context nearly every dim would be.
UNSTRETCHED = Yarn(
    rope_type="yarn", factor=1.0, original_max_position_embeddings=16, attention_factor=1.0, beta_fast=32.0, beta_slow=1.0,
    truncate=True,
)  # fmt: skip

FAULTS = (
    Fault("none"),
    *(Fault(f"{op} off by 1 %", ops={op: _scaled}) for op in SCALED),
    Fault("one head of one step zeroed (sdpa_decode)", ops={"sdpa_decode": _zeroed_head}),
    Fault("a KV slot is not written in one step", ops={"qk_norm_rope": _stale_slot}),
    Fault("queries rotated for the next position", ops={"qk_norm_rope": _next_position}),
    Fault("the final norm is skipped", ops={"linear": _no_final_norm}),
    Fault("another expert is chosen at one position", ops={"router": _other_expert(recorded=True)}),
    Fault("another expert is used than was recorded", ops={"router": _other_expert(recorded=False)}),
    Fault("the state misses the prompt's last, partial chunk", ops={"gdn_prefill": _dropped_chunk}),
    Fault("the second-best token is generated", ops={"sample": _second_best}),
    Fault("state of another prompt", session=True),
    Fault("reading: rms_norm_eps 1 % up", reading={"rms_norm_eps": 1.01e-6}),
    Fault("reading: rope_theta 1 % up", reading={"rope_theta": 10100.0}),
    Fault("reading: rope_theta 1 % down", reading={"rope_theta": 9900.0}),
    Fault("reading: partial_rotary_factor 1 % down", reading={"partial_rotary_factor": 0.2475}),
    Fault("reading: yarn's factor 1 % up", reading={"rope_scaling": replace(UNSTRETCHED, factor=1.01)}),
    Fault("reading: yarn's attention_factor 1 % up", reading={"rope_scaling": replace(UNSTRETCHED, attention_factor=1.01)}),
    Fault("reading: one expert more per token", reading={"num_experts_per_tok": 5}),
    Fault("reading: one expert less per token", reading={"num_experts_per_tok": 3}),
    Fault("config.json: a rope_scaling that we do not read",
          config={"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    Fault("map: gate and up of the experts swapped", pieces=swapped_in_experts),
    Fault("map: gate and up of the shared expert swapped", pieces=swapped("shared_expert.gate_proj", "shared_expert.up_proj")),
    Fault("map: k and v swapped", pieces=swapped("self_attn.k_proj", "self_attn.v_proj")),
    Fault("map: b and a of the delta net swapped", pieces=swapped("in_proj_b", "in_proj_a")),
    Fault("map: experts in another order", pieces=rotated_experts),
    Fault("map: layers 0 and 1 swapped", pieces=swapped("layers.0.", "layers.1.")),
    Fault("map: norms before mixer and experts swapped", pieces=swapped("input_layernorm", "post_attention_layernorm")),
    Fault("loaded: gate and up of one layer's experts swapped", model=_swap_gate_up),
    Fault("loaded: query and gate of one head swapped", model=_swap_q_gate),
    Fault("loaded: k and v of one layer swapped", model=_swap_k_v),
    Fault("loaded: b and a of one layer swapped", model=_swap_b_a),
    Fault("loaded: one layer's experts in another order", model=_rotate_experts),
    Fault("loaded: experts of layers 0 and 1 swapped", model=_swap_layers),
    Fault("loaded: norms of one layer swapped", model=_swap_norms),
    Fault("loaded: the head tied, where the snapshot has its own", model=_tie),
    Fault("loaded: one row of one expert zeroed", model=_zero_row),
)  # fmt: skip


def copy_of(model: Qwen35MoE) -> Qwen35MoE:
    """Shares every tensor; its own may be replaced."""
    return as_dtype(model, model.embed_tokens.weight.dtype)


def with_reading(model: Qwen35MoE, **fields: Any) -> Qwen35MoE:
    """The same weights under another reading of the config."""
    arch, source = replace(model.arch, **fields), copy_of(model)
    other = Qwen35MoE(arch, dtype=model.embed_tokens.weight.dtype, device="meta")
    for name, _ in list(other.named_buffers()):
        other.assign(name, source.get_buffer(name))
        if isinstance(owner := other.get_submodule(name.rpartition(".")[0]), Linear):
            owner.scales = source.get_submodule(name.rpartition(".")[0]).scales  # type: ignore[assignment]
    other.register_buffer("inv_freq", inverse_frequencies(arch).to(model.norm.device))
    return other
