"""Rotary embedding of a text config, read as transformers reads it: plain, or stretched by YaRN.

YaRN: Peng et al., arXiv 2309.00071; keys and defaults are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moeexp.config.config_keys import BOOLEAN, MOST, POSITIVE, RULES, TEXT, Rule, check_values, list_of, or_null, shown
from moeexp.config.files import cut, short

DEFAULT_THETA, DEFAULT_PARTIAL = 10000.0, 0.25

AT_LEAST_ONE: Rule = (lambda value: POSITIVE[0](value) and value >= 1, "a finite number of at least 1")
NOT_NEGATIVE: Rule = (
    lambda value: POSITIVE[0](value) or (type(value) in (int, float) and value == 0),
    "a finite number, not below 0",
)
THREE: Rule = (
    lambda value: list_of(int)(value) and len(value) == 3 and all(0 <= item <= MOST for item in value),
    "a list of three whole numbers, none below 0",
)

PLAIN: dict[str, Rule] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": RULES["rope_theta"],
    "partial_rotary_factor": RULES["partial_rotary_factor"],
    # Which frequencies turn with time, height and width: of text all three are the same position.
    "mrope_section": THREE,
    "mrope_interleaved": BOOLEAN,
}
# null where transformers takes it for absent; it takes a null `truncate` for false, and a null `factor` for a ratio.
YARN: dict[str, Rule] = {
    "factor": AT_LEAST_ONE,
    "original_max_position_embeddings": RULES["original_max_position_embeddings"],
    "attention_factor": or_null(POSITIVE),
    "beta_fast": or_null(POSITIVE),
    "beta_slow": or_null(POSITIVE),
    "mscale": or_null(NOT_NEGATIVE),
    "mscale_all_dim": or_null(NOT_NEGATIVE),
    "truncate": BOOLEAN,
}
KINDS = {"default": PLAIN, "yarn": PLAIN | YARN}
NAMES = ("rope_scaling", "rope_parameters")  # the first that is set is read, whole, and the other is not


@dataclass(frozen=True)
class Yarn:
    """Keys of `rope_parameters`; what a config leaves out is filled in as transformers infers it."""

    rope_type: str  # "yarn"
    factor: float  # longer contexts by so much
    original_max_position_embeddings: int
    attention_factor: float  # of cosine and sine
    beta_fast: float  # dims that turn more often than this over the original context keep their frequency,
    beta_slow: float  # those that turn less often have it divided by `factor`, with a ramp between
    truncate: bool  # the ramp begins and ends at whole dims

    @property
    def context(self) -> int:
        """Positions that the stretched embedding is made for."""
        return round(self.factor * self.original_max_position_embeddings)


def check_rope(config: dict[str, Any]) -> None:
    """`ValueError`, one line, for what is not supported in `rope_parameters` or `rope_scaling`, whichever is read.
    Of a nested config, both levels."""
    inner = config.get("text_config")
    for name in NAMES:
        if inner and config.get(name) and config[name] != inner.get(name):
            raise ValueError(
                f"{name}={short(config[name])} beside text_config in the model config: transformers reads what is in "
                "text_config only; move it there, or remove it"
            )
        _check(name, (inner or config).get(name) or {})


def _check(name: str, rope: dict[str, Any]) -> None:
    by_layer = [key for key, value in rope.items() if isinstance(value, dict) and key not in KINDS["yarn"]]
    if by_layer:
        raise ValueError(
            f"{name}.{cut(by_layer[0], 40)}={short(rope[by_layer[0]], 60)} in the model config: rotary embeddings that "
            f"differ by layer type are not supported; {name} itself must hold rope_type, rope_theta, …"
        )
    check_values(rope, {key: PLAIN[key] for key in ("rope_type", "type")}, f"{name}.")
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(key, "default")
    if kind not in KINDS:
        raise ValueError(f"{name}.{key}={short(kind)} in the model config is not supported; allowed: {', '.join(KINDS)}")
    rules = KINDS[kind]
    check_values(rope, rules, f"{name}.")
    unknown = [key for key in rope if key not in rules]
    if unknown:
        known = [key for key in rules if key != "type" and not key.startswith("mrope")]
        raise ValueError(
            f"{name}.{cut(unknown[0], 40)}={shown(rope[unknown[0]], 40)} in the model config is no key of rope_type={kind}; "
            f"allowed: {', '.join(known)}"
        )
    if kind == "yarn" and "factor" not in rope:
        raise ValueError(f"{name} has rope_type=yarn and no factor in the model config; factor must be {AT_LEAST_ONE[1]}")


def read_rope(config: dict[str, Any]) -> tuple[float, float, Yarn | None]:
    """(rope_theta, partial_rotary_factor, YaRN) of a checked text config. `ValueError` for values that do not go together."""
    rope: dict[str, Any] = next((config[name] for name in NAMES if config.get(name)), {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA)))
    partial = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", DEFAULT_PARTIAL)))
    yarn = _yarn(rope, config, theta) if rope.get("rope_type", rope.get("type")) == "yarn" else None
    return theta, partial, yarn


def _yarn(rope: dict[str, Any], config: dict[str, Any], theta: float) -> Yarn:
    beta_fast, beta_slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if beta_fast < beta_slow:
        raise ValueError(f"beta_fast={beta_fast} in the model config must be at least beta_slow={beta_slow} with rope_type=yarn")
    if theta <= 1:
        raise ValueError(f"rope_theta={theta} in the model config must be above 1 with rope_type=yarn")
    # One that stands outside wins in transformers, and without any the context is that of the config.
    original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings", 32768))
    return Yarn(
        rope_type="yarn",
        factor=float(rope["factor"]),
        original_max_position_embeddings=config.get("original_max_position_embeddings", original),
        attention_factor=float(rope.get("attention_factor") or _attention_factor(rope)),
        beta_fast=float(beta_fast),
        beta_slow=float(beta_slow),
        truncate=rope.get("truncate", True),
    )


def _attention_factor(rope: dict[str, Any]) -> float:
    """0.1 ln(factor) + 1, or the ratio of two such with weights of their own."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    weight, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(weight) / scale(of_all) if weight and of_all else scale(1)
