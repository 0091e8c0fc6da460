"""The least memory that a run needs on its device, by its config alone: what cannot fit is refused before work.

    needed = weights + state + workspace

Weights: each matrix [N, K] as it is stored: N K bytes times bits / 8, and 4 N K / G bytes of scales, where it is quantised in
groups of G; else N K elements of `dtype`, like conv filters; norms, A_log and dt_bias are float32. A tied head counts only where
quantisation makes it a copy.
State, for each sequence: of linear attention conv_dim (kernel - 1) elements of `dtype` and the recurrent state H_v D_k D_v in
float32; of full attention 2 H_kv D elements of `dtype` for each position; of each layer the k experts chosen, int32, for each
position. With `state=explicit` twice: one set goes in while another comes out. transformers keeps its own, which grows.
Workspace: the largest of what one step has at a time: the logits [B, V], or in prefill, for each of its B T tokens, elements of
`dtype`. T is the prompt, where its length is known, or the longest piece that `prefill_chunk` cuts it into. A mixer has the
residual stream, its input projection and its output; `ops.gdn_prefill=triton` has q, k, v, and of each value head w and u, beside
them. `ops.moe_prefill=triton` has the stream, its norm, and of each expert chosen an activation of its width and an output.

It is a lower bound, so that nothing is refused that fits: a device also holds compiled code, a CUDA context and captured graphs,
and what quantising needs on the way.

The check comes after, beside weights and state. It has traces, of the run and of its float32 twin: a copy of the state, the k
experts chosen, int64, for each position, and logits, of all positions or of the prompt's last `check_logits` and those after it,
which beyond `ON_DEVICE` bytes lie in the host's memory. Beside them it has, in turns, the twin's own state, or a reference in
float32: for each position E router logits, the k experts, the residual stream before and after a layer, and the state; of the
layer that it is at all weights, unless they are float32 as they are, and keys and values of every attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moeexp_runner.pieces import piece_sizes

from moeexp.config import axes
from moeexp.config.architecture import Architecture
from moeexp.config.schema import Config, QuantConfig, model_label
from moeexp.config.sources import load_architecture

GIB = 2.0**30
FLOAT32, INT64 = 4, 8
SIZES = {"float32": 4, "bfloat16": 2}
ON_DEVICE = 8 << 30


@dataclass(frozen=True)
class Need:
    """In bytes."""

    weights: int
    state: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.workspace


def need_of(cfg: Config) -> Need:
    """Of a resolved config."""
    arch, size = load_architecture(cfg.model), SIZES[cfg.dtype]
    sets = 0 if cfg.engine == "transformers" else 2 if cfg.state == "explicit" else 1
    state = sets * cfg.batch * _state_of_sequence(arch, cfg.max_seq_len, size)
    workspace = cfg.batch * size * max(arch.vocab_size, _piece(cfg) * _held(cfg, arch))
    return Need(_weights(arch, cfg.quant, size), state, workspace)


def need_of_check(cfg: Config) -> int:
    """Of a resolved config, in bytes: what the check holds on the device beside weights and state."""
    arch, sizes = load_architecture(cfg.model), _sizes_of_traces(cfg)
    twin = cfg.batch * _state_of_sequence(arch, cfg.max_seq_len, FLOAT32) if len(sizes) > 1 else 0
    return sum(_trace(cfg, arch, size) for size in sizes) + max(twin, _reference(cfg, arch))


def check_fits(cfg: Config, available: Callable[[str], int | None]) -> None:
    """`ValueError` for a resolved config that its device cannot hold. `available`: bytes on the cpu or cuda, None: unknown."""
    need, free = need_of(cfg), available(cfg.device)
    if free is None or need.total <= free:
        if cfg.check != "off" and cfg.engine != "transformers":
            _check_logits(cfg, available("cpu"))
            _check_on_device(cfg, need.weights, free)
        return
    numbers = (need.weights, need.state, need.workspace, need.total, free)
    weights, state, workspace, total, left = (f"{number / GIB:.4g}" for number in numbers)
    raise ValueError(
        f"model={model_label(cfg.model.name, cfg.model.weights)[:60]} quant={cfg.quant.name[:20]} does not fit: weights "
        f"{weights} + state {state} + workspace {workspace} = {total} GiB needed, {left} GiB available on {_where(cfg)}: "
        f"{_advice(cfg, need, free)}"
    )


def _where(cfg: Config) -> str:
    return "the GPU" if cfg.device == "cuda" else "this machine"


def on_host(size: int) -> bool:
    """Whether so many bytes of logits of a check lie in the host's memory."""
    return size > ON_DEVICE


def _check_logits(cfg: Config, free: int | None) -> None:
    """Of the check's logits, before a long prompt has been timed in vain."""
    if free is None:
        return
    arch = load_architecture(cfg.model)
    need = [_logits(cfg, arch, size) for size in _sizes_of_traces(cfg)]
    if sum(filter(on_host, need)) > free:
        raise ValueError(
            f"check={cfg.check} of {cfg.batch} x {_with_logits(cfg)} positions keeps {sum(need) / GIB:.4g} GiB of logits in host "
            f"memory, {free / GIB:.4g} GiB available: use check_logits=4096, for those of the "
            "prompt's last positions alone, check=off, which publishes no speed, or a shorter prompt"
        )


def _check_on_device(cfg: Config, weights: int, free: int | None) -> None:
    """Likewise of all that the check has on the device at a time."""
    state = cfg.batch * _state_of_sequence(load_architecture(cfg.model), cfg.max_seq_len, SIZES[cfg.dtype])
    parts = weights, state, need_of_check(cfg)
    if free is not None and sum(parts) > free:
        held, kept, beside, needed, left = (f"{number / GIB:.4g}" for number in (*parts, sum(parts), free))
        raise ValueError(
            f"check={cfg.check} of {cfg.batch} x {_positions(cfg)} positions does not fit: weights {held} + state {kept} + "
            f"traces and reference {beside} = {needed} GiB needed, {left} GiB available on {_where(cfg)}: use a shorter prompt, "
            f"less than batch={cfg.batch} or max_seq_len={cfg.max_seq_len}, a larger device, or "
            "check=off, which publishes no speed"
        )


def _sizes_of_traces(cfg: Config) -> set[int]:
    """Bytes of an element, of the run and of its float32 twin, where that is another."""
    return {SIZES[cfg.dtype], FLOAT32}


def _trace(cfg: Config, arch: Architecture, size: int) -> int:
    choices = _positions(cfg) * arch.num_hidden_layers * arch.num_experts_per_tok * INT64
    logits = _logits(cfg, arch, size)
    return cfg.batch * (_state_of_mixers(arch, cfg.max_seq_len, size) + choices) + (0 if on_host(logits) else logits)


def _reference(cfg: Config, arch: Architecture) -> int:
    routed = arch.num_hidden_layers * (arch.num_experts * FLOAT32 + arch.num_experts_per_tok * INT64)
    repeats = "full_attention" in arch.layer_types and arch.num_attention_heads > arch.num_key_value_heads
    held = routed + (2 * arch.hidden_size + 2 * arch.num_attention_heads * arch.head_dim * repeats) * FLOAT32
    positions, as_it_is = _positions(cfg), cfg.quant.bits == 16 and cfg.dtype == "float32"
    layers = (sum(_layer(arch, kind, lambda _, n, k: n * k * FLOAT32, FLOAT32)) for kind in set(arch.layer_types))
    layer = 0 if as_it_is else max(layers)
    return cfg.batch * (positions * held + _state_of_mixers(arch, positions, FLOAT32)) + layer


def _logits(cfg: Config, arch: Architecture, size: int) -> int:
    return cfg.batch * _with_logits(cfg) * arch.vocab_size * size


def _with_logits(cfg: Config) -> int:
    """Positions of a sequence whose logits the check keeps."""
    prompt = _prompt_length(cfg)
    return min(prompt, cfg.check_logits or prompt) + cfg.new_tokens - 1


def _positions(cfg: Config) -> int:
    """Of a sequence, that the check compares."""
    return _prompt_length(cfg) + cfg.new_tokens - 1


def _advice(cfg: Config, need: Need, free: int) -> str:
    if need.weights <= free:
        shorter = "a shorter prompt" if "prefill_chunk" in axes.not_applicable(cfg) else f"less than prefill_chunk={_piece(cfg)}"
        return f"use less than batch={cfg.batch} or max_seq_len={cfg.max_seq_len}, {shorter}, or a larger device"
    fewer = "" if cfg.quant.bits == 4 or cfg.engine == "transformers" else "quant=int4, "
    return f"use {fewer}a smaller model or a larger device"


def _weights(arch: Architecture, quant: QuantConfig, size: int) -> int:
    kept = quant.bits == 16

    def matrix(kind: str, rows: int, features: int) -> int:
        if kept or kind in quant.skip:
            return rows * features * size
        assert quant.group_size is not None, "resolve sets it"
        return rows * features * quant.bits // 8 + rows * (features // quant.group_size) * 4

    tied = arch.tie_word_embeddings and (kept or "head" in quant.skip)
    rope = (arch.rotary_dim // 2 + arch.hidden_size) * FLOAT32  # and the last norm
    ends = matrix("embedding", arch.vocab_size, arch.hidden_size) + rope
    head = 0 if tied else matrix("head", arch.vocab_size, arch.hidden_size)
    layers = {kind: sum(_layer(arch, kind, matrix, size)) for kind in set(arch.layer_types)}
    return ends + head + sum(layers[kind] for kind in arch.layer_types)


def _layer(arch: Architecture, kind: str, matrix: Callable[[str, int, int], int], size: int) -> Iterator[int]:
    hidden, width, shared = arch.hidden_size, arch.moe_intermediate_size, arch.shared_expert_intermediate_size
    if kind == "linear_attention":
        yield matrix("linear_attention", _projected(arch, kind), hidden) + matrix("out_proj", hidden, arch.value_dim)
        yield arch.conv_dim * arch.linear_conv_kernel_dim * size
        yield (2 * arch.linear_num_value_heads + arch.linear_value_head_dim) * FLOAT32
    else:
        yield matrix("attention", _projected(arch, kind), hidden)
        yield matrix("out_proj", hidden, arch.num_attention_heads * arch.head_dim)
        yield 2 * arch.head_dim * FLOAT32
    yield matrix("experts", arch.num_experts * 2 * width, hidden) + matrix("experts", arch.num_experts * hidden, width)
    yield matrix("shared_expert", 2 * shared, hidden) + matrix("shared_expert", hidden, shared)
    yield matrix("router", arch.num_experts, hidden) + matrix("shared_expert_gate", 1, hidden)
    yield 2 * hidden * FLOAT32


def _projected(arch: Architecture, kind: str) -> int:
    """Rows of a layer's input projection."""
    if kind == "linear_attention":
        return arch.conv_dim + arch.value_dim + 2 * arch.linear_num_value_heads
    return 2 * (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim


def _state_of_sequence(arch: Architecture, positions: int, size: int) -> int:
    choices = arch.num_hidden_layers * arch.num_experts_per_tok * positions * 4
    return _state_of_mixers(arch, positions, size) + choices


def _state_of_mixers(arch: Architecture, positions: int, size: int) -> int:
    recurrent = arch.linear_num_value_heads * arch.linear_key_head_dim * arch.linear_value_head_dim * FLOAT32
    linear = arch.conv_dim * (arch.linear_conv_kernel_dim - 1) * size + recurrent
    full = 2 * arch.num_key_value_heads * arch.head_dim * size * positions
    return sum(linear if kind == "linear_attention" else full for kind in arch.layer_types)


def _held(cfg: Config, arch: Architecture) -> int:
    """Elements for each token of a prefill."""
    from moeexp_kernels import registry  # imports torch; `--help` does not need it

    chosen = {op: getattr(cfg.ops, op) for op in ("gdn_prefill", "moe_prefill")}
    names = registry.resolve(default=cfg.ops.default, chosen=chosen, device=cfg.device) if cfg.engine == "moeexp" else {}
    hidden, outputs = arch.hidden_size, {"linear_attention": arch.value_dim}
    outputs["full_attention"] = arch.num_attention_heads * arch.head_dim
    mixers = {kind: hidden + _projected(arch, kind) + outputs[kind] for kind in outputs}
    if names.get("gdn_prefill") == "triton":
        mixers["linear_attention"] += 2 * (arch.key_dim + arch.value_dim) + arch.linear_num_value_heads * arch.linear_key_head_dim
    pairs = arch.num_experts_per_tok * (arch.moe_intermediate_size + hidden)
    experts = 2 * hidden + pairs if names.get("moe_prefill") == "triton" else 0
    return max(experts, *(mixers[kind] for kind in arch.layer_types))


def _prompt_length(cfg: Config) -> int:
    """Of a text at least one token, whatever the tokenizer."""
    return cfg.prompt_len or len(cfg.prompt_ids or "1")


def _piece(cfg: Config) -> int:
    """Tokens of the longest call that the prompt takes."""
    if cfg.dispatch == "token_by_token":
        return 1
    return max(piece_sizes(_prompt_length(cfg), 0 if cfg.engine == "transformers" else cfg.prefill_chunk))
