"""What each key of a model's config.json may hold. Python would read "48" as a text and "false" as true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeexp.config.files import cut, short

Rule = tuple[Callable[[Any], bool], str]  # is it right?, and what is

# Beyond these no such model exists, and a mistyped one would fill the memory before anything is refused.
AT_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "linear_num_key_heads": 1 << 12,
    "linear_num_value_heads": 1 << 12,
    "linear_key_head_dim": 1 << 12,
    "linear_value_head_dim": 1 << 12,
    "linear_conv_kernel_dim": 1 << 8,
    "num_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 30,
    "original_max_position_embeddings": 1 << 30,
    "full_attention_interval": 1 << 10,
}
MOST_LABELS = 1 << 16  # for each of which transformers makes a name
MOST_THETA = 1 << 50
SMALLEST, MOST = 1e-30, 1 << 31  # of any other number; float32 has to hold it


def whole(most: int) -> Rule:
    return lambda value: type(value) is int and 1 <= value <= most, f"a whole number of at least 1 and at most {most}"


def list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(type(item) is kind for item in value)


def or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def positive(most: float) -> Rule:
    return (
        lambda value: type(value) in (int, float) and SMALLEST <= value <= most,
        f"a finite number above 0, from {SMALLEST:g} to {most}",
    )


POSITIVE = positive(MOST)
BOOLEAN: Rule = (lambda value: type(value) is bool, "true or false, without quotes")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
TEXT: Rule = (lambda value: isinstance(value, str), "a text")
ABSENT: Rule = (lambda value: value is None, "null or left out: no Qwen3.5-MoE model has it")
IDS: Rule = (lambda value: type(value) is int or list_of(int)(value), "a token or a list of tokens")

RULES: dict[str, Rule] = {key: whole(most) for key, most in AT_MOST.items()} | {
    "layer_types": or_null((list_of(str), "a list of texts")),
    "rms_norm_eps": positive(1),
    "rope_theta": positive(MOST_THETA),
    "partial_rotary_factor": positive(1),
    "attention_bias": BOOLEAN,
    "attn_output_gate": BOOLEAN,
    "norm_topk_prob": BOOLEAN,
    "tie_word_embeddings": BOOLEAN,
    "eos_token_id": or_null(IDS),
    "hidden_act": TEXT,
    "model_type": or_null(TEXT),
    "rope_parameters": or_null(OBJECT),
    "rope_scaling": or_null(OBJECT),
    "text_config": or_null(OBJECT),
    "quantization_config": or_null(OBJECT),
    "compression_config": or_null(OBJECT),
    # Layers that differ from each other, and what transformers would take for the text model instead.
    "per_layer_config": ABSENT,
    "decoder": ABSENT,
    "generator": ABSENT,
    "text_encoder": ABSENT,
}


def check_keys(config: dict[str, Any]) -> None:
    """`ValueError`, one line, for the first key whose value cannot be meant. Of a nested config, both levels.

    What `rope_parameters` and `rope_scaling` hold is looked at by `moeexp.config.rope`."""
    inner = config.get("text_config")
    for level in [config, inner] if isinstance(inner, dict) else [config]:
        check_values(level, RULES)
    if isinstance(inner, dict):
        check_values(inner, {"text_config": ABSENT}, "text_config.")
    waiting = [("", config)]
    while waiting:
        prefix, level = waiting.pop()
        check_values(level, {"num_labels": or_null(whole(MOST_LABELS))}, prefix)
        waiting += [(cut(f"{prefix}{key}.", 80), value) for key, value in level.items() if isinstance(value, dict)]


def check_values(values: dict[str, Any], rules: dict[str, Rule], prefix: str = "") -> None:
    """`ValueError`, one line, for the first of `rules` that a value breaks. Keys without a rule are left alone."""
    for key, (right, allowed) in rules.items():
        if key in values and not right(values[key]):
            raise ValueError(f"{prefix}{key}={shown(values[key])} in the model config must be {allowed}")


def shown(value: Any, limit: int = 80) -> str:
    """As JSON writes the ones that Python writes otherwise."""
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    return short(value, limit)
