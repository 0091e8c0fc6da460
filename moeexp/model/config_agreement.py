"""Do we read a model config as transformers does? Decided before weights are read, on transformers' own config object.

The reference is built from that object, never from our reading of it (`moeexp.config.architecture`): a check whose reference
shares a misreading cannot see it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeexp.config.architecture import REQUIRED, Architecture
from moeexp.config.files import cut, read_object
from moeexp.config.schema import ModelConfig
from moeexp.config.sources import load_architecture, weights_folder
from moeexp.model.rope import inverse_frequencies

# What the model takes for granted, and transformers' attribute for it (absent: transformers does it always).
ASSUMED = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True, "norm_topk_prob": True}
PLAIN = (*REQUIRED, "linear_conv_kernel_dim", "rms_norm_eps", "max_position_embeddings")


def text_config(model: ModelConfig) -> Any:
    """transformers' own `Qwen3_5MoeTextConfig`: of the snapshot's config.json, or of `model.architecture` as it is given.
    `ValueError` where transformers refuses it.

    What the model around the text model decides stands in it as well: of a nested config the outer one says whether the
    head is tied, and the generation config has the ids that end a sequence."""
    from transformers import GenerationConfig, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig

    folder = weights_folder(model)
    given = _given(model, folder)
    nested = given.get("model_type", "qwen3_5_moe" if "text_config" in given else None) == "qwen3_5_moe"
    kind = Qwen3_5MoeConfig if nested else Qwen3_5MoeTextConfig
    try:
        if folder is not None:
            made = kind.from_pretrained(folder, local_files_only=True)
            generation = _generation_config(folder)
        else:
            made = kind(**{key: value for key, value in copy.deepcopy(given).items() if key != "model_type"})
            generation = GenerationConfig.from_model_config(made)
    except Exception as error:
        where = "" if folder is None else f" (in {folder / 'config.json'})"
        raise ValueError(f"transformers refuses this model config: {cut(str(error), 200)}{where}") from error
    config = made.get_text_config(decoder=True)
    config.tie_word_embeddings = made.tie_word_embeddings
    config.eos_token_id = generation.eos_token_id
    return config


def _generation_config(folder: Path) -> Any:
    """As transformers finds it when it loads a model."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # there is none
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


def check_agreement(model: ModelConfig, arch: Architecture | None = None) -> None:
    """`ValueError`, one line, for the first field that `arch` (our reading) and transformers read differently."""
    arch = arch or load_architecture(model)
    for key, ours, theirs in differences(arch, text_config(model)):
        raise ValueError(
            f"{key} in the model config: moeexp reads {ours!r}, transformers {theirs!r}; such a model is not supported "
            "(write the config as transformers saves it, or use a model that needs no such setting)"
        )


def differences(arch: Architecture, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, our value, transformers' value) wherever the two differ."""
    eos = config.eos_token_id
    pairs = [(key, getattr(arch, key), getattr(config, key)) for key in PLAIN]
    pairs += [
        ("layer_types", list(arch.layer_types), list(config.layer_types)),
        ("tie_word_embeddings", arch.tie_word_embeddings, config.tie_word_embeddings),
        ("eos_token_id", list(arch.eos_token_ids), [] if eos is None else [eos] if isinstance(eos, int) else list(eos)),
    ]
    pairs += [(key, value, getattr(config, key, value)) for key, value in ASSUMED.items()]
    return ((key, ours, theirs) for key, ours, theirs in [*_rope(arch, config), *pairs] if ours != theirs)


def _rope(arch: Architecture, config: Any) -> list[tuple[str, Any, Any]]:
    """(key, our value, transformers' value): settings, and of YaRN what comes of them as well."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, yarn = config.rope_parameters or {}, arch.rope_scaling
    pairs = [
        ("rope_type", "yarn" if yarn else "default", rope.get("rope_type")),
        ("rope_theta", arch.rope_theta, rope.get("rope_theta")),
        # Absent, all of a head is rotated.
        ("partial_rotary_factor", arch.partial_rotary_factor, rope.get("partial_rotary_factor", 1.0)),
    ]
    if yarn is None or any(ours != theirs for _, ours, theirs in pairs):
        return pairs
    config = copy.deepcopy(config)  # which the function completes
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = config.rope_parameters
    pairs += [(key, getattr(yarn, key), rope[key]) for key in ("factor", "original_max_position_embeddings")]
    pairs += [(key, getattr(yarn, key), rope.get(key) or default) for key, default in (("beta_fast", 32), ("beta_slow", 1))]
    pairs += [("truncate", yarn.truncate, rope.get("truncate", True))]
    pairs += [("attention_factor", yarn.attention_factor, attention_factor)]
    ours, theirs = inverse_frequencies(arch)[0].tolist(), frequencies.tolist()
    pairs += [("len(inv_freq)", len(ours), len(theirs))]
    return pairs + [(f"inv_freq[{i}]", *both) for i, both in enumerate(zip(ours, theirs, strict=False))]


def _given(model: ModelConfig, folder: Path | None) -> dict[str, Any]:
    return dict(model.architecture or {}) if folder is None else read_object(folder / "config.json")
