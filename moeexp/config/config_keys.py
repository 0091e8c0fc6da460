"""What each key of a model's config.json may hold. Python would read "48" as a text and "false" as true."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moeexp.config.files import short

Rule = tuple[Callable[[Any], bool], str]  # is it right?, and what is

# Beyond these no such model exists, and a mistyped one would fill the memory before anything is refused.
MOST, MOST_LAYERS = 2**31 - 1, 4096


def whole(most: int) -> Rule:
    return lambda value: type(value) is int and 1 <= value <= most, f"a whole number of at least 1 and at most {most}"


def list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(type(item) is kind for item in value)


def or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


SIZE = whole(MOST)
POSITIVE: Rule = (
    lambda value: type(value) in (int, float) and 0 < value <= MOST * MOST and math.isfinite(value),
    "a finite number above 0",
)
BOOLEAN: Rule = (lambda value: type(value) is bool, "true or false, without quotes")
OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
TEXT: Rule = (lambda value: isinstance(value, str), "a text")
IDS: Rule = (lambda value: type(value) is int or list_of(int)(value), "a token or a list of tokens")

RULES: dict[str, Rule] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": whole(MOST_LAYERS),
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE,
    "linear_num_key_heads": SIZE,
    "linear_num_value_heads": SIZE,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_conv_kernel_dim": SIZE,
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "moe_intermediate_size": SIZE,
    "shared_expert_intermediate_size": SIZE,
    "max_position_embeddings": SIZE,
    "original_max_position_embeddings": SIZE,
    "full_attention_interval": SIZE,
    "layer_types": or_null((list_of(str), "a list of texts")),
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "partial_rotary_factor": POSITIVE,
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
}


def check_keys(config: dict[str, Any]) -> None:
    """`ValueError`, one line, for the first key whose value cannot be meant. Of a nested config, both levels.

    What `rope_parameters` and `rope_scaling` hold is looked at by `moeexp.config.rope`."""
    inner = config.get("text_config")
    for level in [config, inner] if isinstance(inner, dict) else [config]:
        check_values(level, RULES)


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
