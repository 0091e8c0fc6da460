"""Shapes of a Qwen3.5-MoE text model, read from and written as a Hugging Face `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeexp.config import end_of_sequence
from moeexp.config.config_keys import check_keys
from moeexp.config.files import cut, read_object, short
from moeexp.config.rope import Yarn, check_rope, read_rope

LAYER_TYPES = ("linear_attention", "full_attention")
NESTED, FLAT = "qwen3_5_moe", "qwen3_5_moe_text"  # model_type: with a text_config, and of one or of a config without

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Architecture:
    """Field names are those of transformers' `Qwen3_5MoeTextConfig`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    partial_rotary_factor: float
    rope_theta: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    rope_scaling: Yarn | None = None

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context(self) -> int:
        """Positions that the model is made for."""
        return self.max_position_embeddings if self.rope_scaling is None else self.rope_scaling.context

    @property
    def weights_per_token(self) -> int:
        """Elements of the matrices that one token is multiplied by: of the experts those that it chooses."""
        hidden, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        linear = self.conv_dim + 2 * self.value_dim + 2 * self.linear_num_value_heads
        attention = 3 * heads + 2 * self.num_key_value_heads * self.head_dim
        mixers = sum(linear if kind == "linear_attention" else attention for kind in self.layer_types)
        experts = 3 * (self.num_experts_per_tok * self.moe_intermediate_size + self.shared_expert_intermediate_size)
        moe = self.num_hidden_layers * (self.num_experts + 1 + experts)
        return hidden * (mixers + moe + self.vocab_size)

    @staticmethod
    def from_hf(config: dict[str, Any]) -> Architecture:
        """Reads a flat text config or a multimodal one that nests it as `text_config`. `ValueError` names what is off."""
        if not isinstance(config, dict):
            raise ValueError(f"a model config is a JSON object, got {type(config).__name__}")
        check_keys(config)
        check_rope(config)
        outer = config
        config = dict(config.get("text_config") or config)
        for level, kind in [(outer, NESTED), (config, FLAT)] if outer.get("text_config") else [(config, FLAT)]:
            if level.get("model_type") not in (None, kind):
                raise ValueError(
                    f"model_type={short(level['model_type'])} is not a Qwen3.5-MoE model; supported: {NESTED} with a "
                    f"text_config, and {FLAT} without one or inside it"
                )
        missing = [key for key in REQUIRED if config.get(key) is None]
        if missing:
            raise ValueError(
                f"the model config lacks {cut(', '.join(missing), 200)}: it does not describe a Qwen3.5-MoE text model"
            )
        for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("attn_output_gate", True)):
            if config.get(key, wanted) != wanted:
                raise ValueError(f"{key}={short(config[key])} in the model config; only {wanted!r} is supported")
        theta, partial, yarn = read_rope(config)
        layers = config["num_hidden_layers"]
        types = config.get("layer_types")
        if types is None:
            interval = config.get("full_attention_interval", 4)
            types = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        arch = Architecture(
            **{key: config[key] for key in REQUIRED},
            layer_types=tuple(types),
            partial_rotary_factor=partial,
            rope_theta=theta,
            linear_conv_kernel_dim=int(config.get("linear_conv_kernel_dim", 4)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(outer.get("tie_word_embeddings", False)),  # of a nested config too
            max_position_embeddings=int(config.get("max_position_embeddings", 32768)),
            eos_token_ids=end_of_sequence.of_config(outer),
            rope_scaling=yarn,
        )
        arch._validate()
        return arch

    @staticmethod
    def from_folder(folder: Path) -> Architecture:
        """Of a snapshot's config.json; a generation_config.json has the ids that end a sequence."""
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face snapshot")
        config = read_object(path)
        try:
            arch = Architecture.from_hf(config)
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from error
        return replace(arch, eos_token_ids=end_of_sequence.of_snapshot(folder))

    def to_hf(self) -> dict[str, Any]:
        """A flat dict that `Qwen3_5MoeTextConfig(**d)` accepts."""
        fields = {key: getattr(self, key) for key in REQUIRED}
        return fields | {
            "layer_types": list(self.layer_types),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.partial_rotary_factor,
                **(asdict(self.rope_scaling) if self.rope_scaling else {}),
            },
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "eos_token_id": list(self.eos_token_ids) or None,
        }

    def _validate(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(LAYER_TYPES):
            raise ValueError(
                f"layer_types={short(list(self.layer_types))} must hold num_hidden_layers={self.num_hidden_layers} entries "
                f"out of {LAYER_TYPES}"
            )
        for small, large in (
            ("num_key_value_heads", "num_attention_heads"),
            ("linear_num_key_heads", "linear_num_value_heads"),
        ):
            if getattr(self, large) % getattr(self, small):
                raise ValueError(f"{large}={getattr(self, large)} must be a multiple of {small}={getattr(self, small)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..num_experts={self.num_experts}")
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} gives {self.rotary_dim} "
                "rotary dims; an even number from 2 to head_dim is needed"
            )
