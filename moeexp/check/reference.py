"""The reference: transformers' Qwen3.5-MoE decoder layers, one layer in memory at a time.

Layer-major: each layer runs all positions but the last few as one call and then one call per further token, with
transformers' own cache, before the next layer is loaded. A 35B model so needs one dequantised layer (3.3 GB in float32), not
itself. Which call a position belongs to changes its result by the rounding of the run's dtype alone; a call costs 2.5 ms a
layer however short it is, so that one for each of 256 generated tokens would be half of a check's time at full size.
Of a long call the mixer alone goes in pieces. Of full attention because its scores are heads x queries x positions: each query
still has all positions before it in one softmax of transformers' own. Of the delta net because it holds some twenty float32
tensors of value heads x positions x head dim: a piece is whole chunks and begins with the state that the one before left.
Norms and experts see the call whole: transformers' loop over all experts takes its time again for each call, however few tokens
that has.
Shape letters: B batch, S sequence, L layers, D hidden, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moeexp.check.pure_torch import assert_pure_torch, eager, full_precision, modeling, pure_torch
from moeexp.record import free_memory

# Positions at the end that are calls of their own: transformers' own decode path, from a state that its prompt path left.
SINGLE_STEPS = 4
# Scores of one piece of full attention, of which transformers holds three tensors at a time, in float32 8 GiB each. At full size
# 11,585 positions are one piece; of 262,144 a piece has 512 queries. With 256 a layer takes a quarter longer, as the product with
# the values has too few tiles for a GPU.
SCORES = 1 << 31
SCORES_BYTES = 3 * 4
# The three tensors have at most one part in so many of a GPU's free memory, beside keys and values of all heads. Where that is
# less than these take, torch says what did not fit.
SHARE = 2
FEWEST_SCORES = 1 << 28
# Positions, of all sequences, of one piece of the delta net: at full size float32 tensors of 512 MiB.
DELTA_POSITIONS = 1 << 15
CHUNK = 64  # of transformers' chunked delta rule


class ReferenceWeights(Protocol):
    """Dequantised weights, float32, on the device of the run; each call may make its tensors anew."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """Every parameter of decoder layer `index`, named as in transformers, relative to the layer."""

    def embedding(self) -> Tensor:
        """[V, D]"""

    def final_norm(self) -> Tensor:
        """[D]"""

    def head(self) -> Tensor:
        """[V, D]; the embedding where the two are tied."""


@dataclass
class ReferenceRun:
    """What transformers computes on one set of token sequences. `expert_ids` are the experts that were used."""

    config: Any  # transformers' own text config
    weights: ReferenceWeights = field(repr=False)
    token_ids: Tensor  # [B, S] int64
    prompt_len: int
    dtype: torch.dtype
    hidden: Tensor = field(repr=False)  # [B, S, D] after the last layer, before the final norm, run's dtype
    router_logits: Tensor = field(repr=False)  # [L, B, S, E] float32, what the router computed itself
    expert_ids: Tensor = field(repr=False)  # [L, B, S, k] int64
    states: dict[str, Tensor] = field(repr=False)  # after the last token; caches are [B, Hkv, S, Dh]

    def tensors(self) -> list[Tensor]:
        return [self.token_ids, self.hidden, self.router_logits, self.expert_ids, *self.states.values()]

    def nbytes(self) -> int:
        """Without the weights, which are the model's."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device | str) -> ReferenceRun:
        """The same, bit for bit, on another device; itself where it is there."""
        if self.hidden.device == torch.device(device):
            return self
        token_ids, hidden, router_logits, expert_ids, *states = (tensor.to(device) for tensor in self.tensors())
        return replace(
            self, token_ids=token_ids, hidden=hidden, router_logits=router_logits, expert_ids=expert_ids,
            states=dict(zip(self.states, states, strict=True)),
        )  # fmt: skip

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """Logits of positions start..stop-1, [B, n, V] float32; norm and head in the run's dtype."""
        hidden = self.hidden[:, start:stop]
        with torch.device("meta"):
            norm = modeling().Qwen3_5MoeRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        _fill(norm, {"weight": self.weights.final_norm()}, self.dtype, hidden.device, "final norm")
        with full_precision():
            return nn.functional.linear(norm(hidden), self.weights.head().to(hidden.device, self.dtype)).float()


@torch.inference_mode()  # a sixth of a check's time on a small model is bookkeeping that no_grad leaves on
def run_reference(
    config: Any,
    weights: ReferenceWeights,
    token_ids: Tensor,
    prompt_len: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    expert_ids: Tensor | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> ReferenceRun:
    """Runs `token_ids` [B, S] int64, of which the first `prompt_len` are not generated: all positions as one call but the last
    `SINGLE_STEPS` generated ones, which are one call each.

    `config` is transformers' own text config of the model (`moeexp.model.config_agreement.text_config`), never our reading of it.
    With `expert_ids` [L, B, S, k] the routers compute their logits as ever, but the given experts are used, weighted
    by the softmax over all experts renormalised over them. `on_layer(i, L)` is called after layer i.
    `ValueError` for tokens, a prompt length or expert ids out of range.
    """
    device = torch.device(device)
    token_ids = token_ids.to(device, torch.int64)
    _validate(config, token_ids, prompt_len, expert_ids)
    config = eager(config)
    layers, (batch, length) = config.num_hidden_layers, token_ids.shape
    top_k, experts = config.num_experts_per_tok, config.num_experts

    router_logits = torch.full((layers, batch, length, experts), float("nan"), device=device)
    used_ids = torch.full((layers, batch, length, top_k), -1, dtype=torch.int64, device=device)
    states: dict[str, Tensor] = {}
    hidden = nn.functional.embedding(token_ids, weights.embedding().to(device)).to(dtype)
    positions = torch.arange(length, device=device).expand(batch, length)
    rotary = modeling().Qwen3_5MoeTextRotaryEmbedding(config).to(device)
    rope = rotary(hidden, positions[None].expand(3, -1, -1))

    with pure_torch(), full_precision():
        for index in range(layers):
            given = None if expert_ids is None else expert_ids[index].to(device, torch.int64)
            layer = _load_layer(config, index, weights.layer(index), dtype, device)
            route = _Routing(router_logits[index], used_ids[index], given)
            handle = layer.mlp.gate.register_forward_hook(route.hook)
            hidden, layer_states = _run_layer(layer, config, index, hidden, rope, prompt_len, route)
            states.update(layer_states)
            handle.remove()
            del layer, route, handle  # before the next layer's weights are made
            if on_layer is not None:
                on_layer(index, layers)
    return ReferenceRun(config, weights, token_ids, prompt_len, dtype, hidden, router_logits, used_ids, states)


class _Routing:
    """Hook of one layer's router: records its logits and the experts in use, and replaces these where given."""

    def __init__(self, logits: Tensor, used: Tensor, given: Tensor | None):
        self.logits, self.used, self.given = logits, used, given  # [B, S, E], [B, S, k], [B, S, k] or None
        self.start = self.stop = 0  # positions of the call in progress

    def hook(self, gate: nn.Module, args: tuple, output: tuple) -> tuple | None:
        logits, _, ids = output  # [B*T, E], [B*T, k], [B*T, k]
        here = slice(self.start, self.stop)
        self.logits[:, here] = logits.float().view_as(self.logits[:, here])
        if self.given is None:
            self.used[:, here] = ids.view_as(self.used[:, here])
            return None
        ids = self.given[:, here].reshape(ids.shape)
        self.used[:, here] = ids.view_as(self.used[:, here])
        # The router's own maths and order of roundings, with the given experts in place of its top-k.
        scores = torch.softmax(logits, dtype=torch.float, dim=-1).gather(-1, ids)
        scores /= scores.sum(dim=-1, keepdim=True)
        return logits, scores.to(logits.dtype), ids


def _run_layer(
    layer: nn.Module,
    config: Any,
    index: int,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    prompt_len: int,
    route: _Routing,
) -> tuple[Tensor, dict[str, Tensor]]:
    """hidden [B, S, D] through one layer -> ([B, S, D], the layer's states after the last token)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)  # a fresh one: only the entry of this layer is ever used
    output = torch.full_like(hidden, float("nan"))
    batch, length, _ = hidden.shape
    first = max(prompt_len, length - SINGLE_STEPS)
    attends = config.layer_types[index] == "full_attention"
    if attends:
        scores = _scores(hidden.device)
        layer.self_attn = _InPieces(layer.self_attn, max(1, scores // (batch * config.num_attention_heads * length)))
    else:
        layer.linear_attn = _DeltaInPieces(layer.linear_attn, max(1, DELTA_POSITIONS // (batch * CHUNK)) * CHUNK)
    for route.start, route.stop in pairwise([0, *range(first, length + 1)]):
        here = slice(route.start, route.stop)
        output[:, here] = layer(hidden[:, here], position_embeddings=(rope[0][:, here], rope[1][:, here]), past_key_values=cache)
    entry: Any = cache.layers[index]  # of another class for each kind of layer
    prefix = f"layers.{index}"
    if attends:
        return output, {f"{prefix}.k_cache": entry.keys, f"{prefix}.v_cache": entry.values}
    # transformers keeps as many inputs as the convolution is wide; the oldest is never read again.
    conv_state = entry.conv_states[0][..., 1:].contiguous()
    return output, {f"{prefix}.conv_state": conv_state, f"{prefix}.recurrent_state": entry.recurrent_states[0]}


def _scores(device: torch.device) -> int:
    """Of one piece of attention, on a device whose memory holds the layer by now."""
    free = free_memory.for_tensors() if device.type == "cuda" else None
    return SCORES if free is None else min(SCORES, max(FEWEST_SCORES, free // SHARE // SCORES_BYTES))


class _InPieces(nn.Module):
    """A layer's attention, in whose place it stands: queries at most `most` at a time, and the cache grows with each piece."""

    def __init__(self, attention: Any, most: int):
        super().__init__()
        self.attention, self.most = attention, most

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None,
        past_key_values: Any,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, D] -> ([B, T, D], no weights), as of transformers' own attention: of the first T positions, or of
        one (T = 1) after those in the cache. position_embeddings: of these T. The mask is each piece's own."""
        length, outputs = hidden_states.shape[1], []
        if hidden_states.is_cuda and length > self.most:
            self._reserve(hidden_states)
        for start in range(0, length, self.most):
            here = slice(start, min(start + self.most, length))
            mask = _causal_mask(start, here.stop, hidden_states) if here.stop - start > 1 else None
            found = self.attention(
                hidden_states=hidden_states[:, here],
                position_embeddings=(position_embeddings[0][:, here], position_embeddings[1][:, here]),
                attention_mask=mask,
                past_key_values=past_key_values,
                **options,
            )
            outputs.append(found[0])
            del found  # with the scores, before the next piece's are made
        return torch.cat(outputs, dim=1), None

    def _reserve(self, hidden_states: Tensor) -> None:
        """One block as large as all that the last piece holds, given back at once to torch's allocator, which cuts the tensors of
        all pieces from it. They grow from piece to piece: without it none fits where one of the piece before was, and each is
        asked of the driver."""
        config, (batch, length, _) = self.attention.config, hidden_states.shape
        heads, head_dim = config.num_attention_heads, config.head_dim
        scores = SCORES_BYTES * self.most * heads * length
        keys_and_values = 2 * hidden_states.element_size() * head_dim * length * (heads + 2 * config.num_key_value_heads)
        with contextlib.suppress(torch.OutOfMemoryError):  # then piece by piece, which may fit where one block does not
            torch.empty(batch * (scores + keys_and_values), dtype=torch.uint8, device=hidden_states.device)


class _DeltaInPieces(nn.Module):
    """A layer's delta net, in whose place it stands: positions at most `most`, a multiple of its chunk, at a time."""

    def __init__(self, delta: Any, most: int):
        super().__init__()
        self.delta, self.most = delta, most

    def forward(self, hidden_states: Tensor, attention_mask: None, cache_params: Any, **options: Any) -> Tensor:
        """hidden_states [B, T, D] -> [B, T, D], as of transformers' own: after those that `cache_params` has seen."""
        pieces = hidden_states.split(self.most, dim=1)
        outputs = [self.delta(hidden_states=piece, attention_mask=None, cache_params=cache_params, **options) for piece in pieces]
        return torch.cat(outputs, dim=1)


def _causal_mask(start: int, stop: int, like: Tensor) -> Tensor:
    """Additive [1, 1, stop - start, stop], of queries from `start` on. Built here because transformers' own builder asks the
    cache of the *first* attention layer how long the past is, which is empty in a layer-major run."""
    full = torch.full((stop - start, stop), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device)
    return full.triu(start + 1)[None, None]


def _load_layer(config: Any, index: int, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device):
    with torch.device("meta"):
        layer = modeling().Qwen3_5MoeDecoderLayer(config, index)
    _fill(layer, tensors, dtype, device, f"layer {index}")
    assert_pure_torch(layer)
    return layer.eval()


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device, where: str) -> None:
    """Gives each parameter of a meta module its tensor, uncopied where dtype and device fit. `ValueError` naming keys
    that are missing, surplus or of another shape; nothing stays on the meta device."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        both = sorted(wanted.keys() & found.keys())
        shapes = [f"{name} {found[name]} instead of {wanted[name]}" for name in both if wanted[name] != found[name]]
        raise ValueError(f"weights of {where} do not fit: missing {missing}, surplus {surplus}, shapes {shapes}")
    module.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, strict=True, assign=True)
    left = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    assert not left, f"{where}: {left} were never filled"


def _validate(config: Any, token_ids: Tensor, prompt_len: int, expert_ids: Tensor | None) -> None:
    if token_ids.ndim != 2 or not token_ids.numel():
        raise ValueError(f"token_ids of shape {tuple(token_ids.shape)}: [batch, sequence] is needed, neither empty")
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token ids reach from {low} to {high}: they must lie in 0..{config.vocab_size - 1}")
    if not 1 <= prompt_len <= token_ids.shape[1]:
        raise ValueError(f"prompt_len={prompt_len} must lie in 1..{token_ids.shape[1]}, the length of the sequence")
    if expert_ids is None:
        return
    shape = (config.num_hidden_layers, *token_ids.shape, config.num_experts_per_tok)
    if tuple(expert_ids.shape) != shape:
        raise ValueError(f"expert_ids of shape {tuple(expert_ids.shape)}: [L, B, S, k] = {shape} is needed")
    low, high = int(expert_ids.min()), int(expert_ids.max())
    if low < 0 or high >= config.num_experts:
        raise ValueError(f"expert ids reach from {low} to {high}: they must lie in 0..{config.num_experts - 1}")


@torch.inference_mode()
def generate_reference(model: str | Path | nn.Module, prompt_ids: Tensor, new_tokens: int, *, config: Any = None) -> Tensor:
    """Greedy `transformers.generate` in float32, eager: prompt_ids [B, P] -> the new ids [B, new_tokens].

    `model` is a snapshot folder or a `Qwen3_5MoeForCausalLM` in float32. `config` of a folder is transformers' text config
    as in `run_reference`: the class alone would not see what a multimodal config says outside. Goes on past end-of-sequence
    tokens: a row is cut later. For models whose float32 weights fit; `ValueError` where the snapshot does not fill the model.
    """
    causal: Any = model if isinstance(model, nn.Module) else _load_causal_lm(Path(model), config)
    assert all(p.dtype == torch.float32 for p in causal.parameters()), "the model must be in float32"
    settings = causal.generation_config
    causal.generation_config = type(settings)()  # the snapshot's own would bring sampling and end-of-sequence back
    try:
        with pure_torch(), full_precision():
            assert_pure_torch(causal)
            prompt_ids = prompt_ids.to(causal.device)
            ids = causal.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
    finally:
        causal.generation_config = settings
    return ids[:, prompt_ids.shape[1] :]


def _load_causal_lm(folder: Path, config: Any) -> nn.Module:
    from transformers import Qwen3_5MoeForCausalLM

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face snapshot")
    loaded: Any = Qwen3_5MoeForCausalLM.from_pretrained(
        folder,
        config=None if config is None else eager(config),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    off = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if off:
        raise ValueError(f"{folder} does not fill Qwen3_5MoeForCausalLM: {off}")
    return model.eval()
