"""Export-friendly Qwen3.5-MoE: plain modules, named buffers, every op handed in by name.

Buffers only, no parameters: weights and state are bound into compiled methods by name, and nothing here is trained.
Fused matrices stack rows in the order that their op documents: linear attention `q | k | v | z | b | a`, full attention
`(q | gate) per head | k | v`, experts `gate | up`.

No buffer is one-dimensional and short: Inductor writes vectors of up to eight elements into the code as literals, and a
compiled method would keep the weights of whatever model it was compiled with. Hence a_log, dt_bias, inv_freq [1, n].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeexp.config.architecture import Architecture
from moeexp.model.rope import inverse_frequencies

Ops = dict[str, Callable]


class Linear(nn.Module):
    """A weight in one of the formats of `moeexp_kernels.ops.linear`, with leading dims for stacked experts."""

    weight: Tensor
    scales: Tensor | None

    def __init__(self, *rows_by_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.shape = rows_by_features
        self.register_buffer("weight", torch.empty(*rows_by_features, dtype=dtype, device=device))
        self.register_buffer("scales", None)

    @property
    def bits(self) -> int:
        return 16 if self.scales is None else 8 if self.weight.shape[-1] == self.shape[-1] else 4


class LinearAttention(nn.Module):
    conv_weight: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor

    def __init__(self, arch: Architecture, *, dtype, device):
        super().__init__()
        rows = arch.conv_dim + arch.value_dim + 2 * arch.linear_num_value_heads
        self.in_proj = Linear(rows, arch.hidden_size, dtype=dtype, device=device)
        self.out_proj = Linear(arch.hidden_size, arch.value_dim, dtype=dtype, device=device)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer("conv_weight", torch.empty(arch.conv_dim, arch.linear_conv_kernel_dim, dtype=dtype, device=device))
        self.register_buffer("a_log", torch.empty(1, arch.linear_num_value_heads, **wide))
        self.register_buffer("dt_bias", torch.empty(1, arch.linear_num_value_heads, **wide))
        self.register_buffer("norm", torch.empty(arch.linear_value_head_dim, **wide))
        self.heads = {
            "num_k_heads": arch.linear_num_key_heads,
            "num_v_heads": arch.linear_num_value_heads,
            "head_k_dim": arch.linear_key_head_dim,
            "head_v_dim": arch.linear_value_head_dim,
            "eps": arch.rms_norm_eps,
        }


class FullAttention(nn.Module):
    q_norm: Tensor
    k_norm: Tensor

    def __init__(self, arch: Architecture, *, dtype, device):
        super().__init__()
        rows = 2 * (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim
        self.qkv_proj = Linear(rows, arch.hidden_size, dtype=dtype, device=device)
        self.out_proj = Linear(arch.hidden_size, arch.num_attention_heads * arch.head_dim, dtype=dtype, device=device)
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer("q_norm", torch.empty(arch.head_dim, **wide))
        self.register_buffer("k_norm", torch.empty(arch.head_dim, **wide))
        self.num_heads, self.eps = arch.num_attention_heads, arch.rms_norm_eps
        self.rotary = {"attention_factor": arch.rope_scaling.attention_factor} if arch.rope_scaling else {}


class SparseMoe(nn.Module):
    router: Tensor
    shared_gate: Tensor

    def __init__(self, arch: Architecture, *, dtype, device):
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden, width, shared = arch.hidden_size, arch.moe_intermediate_size, arch.shared_expert_intermediate_size
        self.register_buffer("router", torch.empty(arch.num_experts, hidden, **kind))
        self.gate_up = Linear(arch.num_experts, 2 * width, hidden, **kind)
        self.down = Linear(arch.num_experts, hidden, width, **kind)
        self.shared_gate_up = Linear(2 * shared, hidden, **kind)
        self.shared_down = Linear(hidden, shared, **kind)
        self.register_buffer("shared_gate", torch.empty(1, hidden, **kind))


class DecoderLayer(nn.Module):
    """State tensors (conv_state, … expert_ids) are no part of it, but for as long as `Qwen35MoE.attached` says."""

    mixer: Any  # LinearAttention or FullAttention, as layer_type says
    input_norm: Tensor
    post_norm: Tensor

    def __init__(self, arch: Architecture, index: int, *, dtype, device):
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layer_type = arch.layer_types[index]
        linear = self.layer_type == "linear_attention"
        self.mixer = LinearAttention(arch, **kind) if linear else FullAttention(arch, **kind)
        self.moe = SparseMoe(arch, **kind)
        self.register_buffer("input_norm", torch.empty(arch.hidden_size, dtype=torch.float32, device=device))
        self.register_buffer("post_norm", torch.empty(arch.hidden_size, dtype=torch.float32, device=device))

    @property
    def first(self) -> Linear:
        """The layer's input projection."""
        return self.mixer.in_proj if self.layer_type == "linear_attention" else self.mixer.qkv_proj


class Qwen35MoE(nn.Module):
    """`forward` serves every method; `phase` ("prefill", "decode" or "single") picks the implementations of phase-bound
    ops: `gdn_{phase}`, `sdpa_{phase}`, `moe_{phase}`."""

    layers: Any  # of DecoderLayer; the stubs of ModuleList know no type of its modules
    norm: Tensor
    inv_freq: Tensor

    def __init__(self, arch: Architecture, *, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.arch = arch
        self.embed_tokens = Linear(arch.vocab_size, arch.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(DecoderLayer(arch, i, dtype=dtype, device=device) for i in range(arch.num_hidden_layers))
        self.register_buffer("norm", torch.empty(arch.hidden_size, dtype=torch.float32, device=device))
        # A tied head is the same tensor under a second name, unless quantisation replaces it.
        self.head = Linear(arch.vocab_size, arch.hidden_size, dtype=dtype, device="meta" if arch.tie_word_embeddings else device)
        self.register_buffer("inv_freq", inverse_frequencies(arch).to(device))

    @contextmanager
    def attached(self, state: dict[str, Tensor]) -> Iterator[None]:
        """Inside, the tensors of `state`, named `layers.{i}.{kind}`, are buffers, as methods are exported with and bound by.
        For no longer: several stacks may share the model, each with a state of its own."""
        taken = dict(self.named_buffers()).keys() & state.keys()
        assert not taken, f"the model has another state attached: {min(taken)}"
        for name, tensor in state.items():
            self.assign(name, tensor)
        try:
            yield
        finally:
            for name in state:
                owner, _, leaf = name.rpartition(".")
                delattr(self.get_submodule(owner), leaf)

    def assign(self, name: str, tensor: Tensor) -> None:
        """A tensor in the place of the buffer of that name."""
        owner, _, leaf = name.rpartition(".")
        self.get_submodule(owner).register_buffer(leaf, tensor)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        logit_positions: Tensor | None,
        *,
        ops: Ops,
        phase: str,
        state: dict[str, Tensor] | None = None,
        valid_len: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] int64, positions [B] int64 of each row's first token, logit_positions [n] int64 in 0..T-1 or None
        for all T. Returns logits [B, n, V] in the weights' dtype; advances the state by T tokens, that which is attached,
        or `state` (same names) where it is given. valid_len [B] int64 in 1..T: only so many tokens of each row count."""
        x = self._embed(tokens, ops, phase)
        counts = {} if valid_len is None else {"valid_len": valid_len}
        for i, layer in enumerate(self.layers):
            mixer, own = layer.mixer, _state_of(layer, i, state)
            proj = _linear(ops, x, layer.first, norm=layer.input_norm, eps=self.arch.rms_norm_eps)
            if layer.layer_type == "linear_attention":
                kind, arguments = "gdn", {
                    "proj": proj, "conv_weight": mixer.conv_weight, "a_log": mixer.a_log[0], "dt_bias": mixer.dt_bias[0],
                    "norm_weight": mixer.norm, "conv_state": own["conv_state"], "recurrent_state": own["recurrent_state"],
                    **mixer.heads, **counts,
                }  # fmt: skip
            else:
                q = ops["qk_norm_rope"](
                    qkv=proj, q_norm=mixer.q_norm, k_norm=mixer.k_norm, inv_freq=self.inv_freq[0], positions=positions,
                    k_cache=own["k_cache"], v_cache=own["v_cache"], num_heads=mixer.num_heads, eps=mixer.eps,
                    **mixer.rotary, **counts,
                )  # fmt: skip
                kind, arguments = "sdpa", {
                    "q": q, "qkv": proj, "k_cache": own["k_cache"], "v_cache": own["v_cache"], "positions": positions, **counts
                }  # fmt: skip
            x = _mix(ops, kind, phase, arguments, mixer.out_proj, x)
            x = self._moe(layer, x, ops, phase, positions=positions, expert_ids=own["expert_ids"], **counts)
        if logit_positions is not None:
            x = x.index_select(1, logit_positions)
        return _linear(ops, x, self.head, norm=self.norm, eps=self.arch.rms_norm_eps)

    def _embed(self, tokens: Tensor, ops: Ops, phase: str) -> Tensor:
        if phase == "decode" and "embedding" in ops:  # the same bits
            return ops["embedding"](tokens=tokens, weight=self.embed_tokens.weight)
        return torch.nn.functional.embedding(tokens, self.embed_tokens.weight)

    def _moe(self, layer: DecoderLayer, x: Tensor, ops: Ops, phase: str, **trace: Tensor) -> Tensor:
        moe, top_k = layer.moe, self.arch.num_experts_per_tok
        common = {"x": x, "norm_weight": layer.post_norm, "eps": self.arch.rms_norm_eps}
        experts = {
            "gate_up": moe.gate_up.weight, "gate_up_scales": moe.gate_up.scales,
            "down": moe.down.weight, "down_scales": moe.down.scales,
            "shared_gate_up": moe.shared_gate_up.weight, "shared_gate_up_scales": moe.shared_gate_up.scales,
            "shared_down": moe.shared_down.weight, "shared_down_scales": moe.shared_down.scales,
            "shared_gate": moe.shared_gate,
        }  # fmt: skip
        choice = {"weight": moe.router, "top_k": top_k, **common, **trace}
        if phase == "decode" and "routed_experts" in ops:  # each does what the other's kernels would do
            return ops["routed_experts"](choice, experts)
        ids, weights = ops["router"](**choice)
        return ops[f"moe_{phase}"](ids=ids, weights=weights, **common, **experts)


STATE = {
    "linear_attention": ("conv_state", "recurrent_state", "expert_ids"),
    "full_attention": ("k_cache", "v_cache", "expert_ids"),
}


def _state_of(layer: DecoderLayer, index: int, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The layer's state tensors by kind: its own buffers, or those in `state`."""
    kinds = STATE[layer.layer_type]
    if state is None:
        return {kind: getattr(layer, kind) for kind in kinds}
    return {kind: state[f"layers.{index}.{kind}"] for kind in kinds}


def _mix(ops: Ops, kind: str, phase: str, arguments: dict[str, Any], project: Linear, x: Tensor) -> Tensor:
    """x and the projection of what the mixer of that kind, "gdn" or "sdpa", makes of `arguments`."""
    if phase == "decode" and f"{kind}_out" in ops:  # each does what the other's kernels would do
        return ops[f"{kind}_out"](arguments, {"weight": project.weight, "scales": project.scales, "residual": x})
    return _linear(ops, ops[f"{kind}_{phase}"](**arguments), project, residual=x)


def _linear(
    ops: Ops,
    x: Tensor,
    linear: Linear,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    return ops["linear"](x=x, weight=linear.weight, scales=linear.scales, norm_weight=norm, eps=eps, residual=residual)


def state_shapes(
    arch: Architecture | Any, *, batch: int, max_seq_len: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every state tensor, by buffer name. Recurrent state is float32 whatever `dtype` is. `arch` may be
    transformers' own text config, whose names these are: the check's, which takes no reading of ours on trust."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    key, value = (getattr(arch, f"linear_num_{n}_heads") * getattr(arch, f"linear_{n}_head_dim") for n in ("key", "value"))
    for i, kind in enumerate(arch.layer_types):
        if kind == "linear_attention":
            shapes[f"layers.{i}.conv_state"] = ((batch, 2 * key + value, arch.linear_conv_kernel_dim - 1), dtype)
            recurrent = (batch, arch.linear_num_value_heads, arch.linear_key_head_dim, arch.linear_value_head_dim)
            shapes[f"layers.{i}.recurrent_state"] = (recurrent, torch.float32)
        else:
            cache = (batch, arch.num_key_value_heads, max_seq_len, arch.head_dim)
            shapes[f"layers.{i}.k_cache"] = shapes[f"layers.{i}.v_cache"] = (cache, dtype)
        shapes[f"layers.{i}.expert_ids"] = ((batch, max_seq_len, arch.num_experts_per_tok), torch.int32)
    return shapes
