"""Our reading of a model config is transformers' own, or the config is refused before weights are read."""

import dataclasses
import json

import pytest
from common import EVEN, ODD, ODD_CONFIG, build_snapshot, load_model, write_snapshot
from rich.console import Console

from moeexp.config import compose
from moeexp.config.architecture import Architecture
from moeexp.config.resolve import resolve, resolved
from moeexp.config.rope import Yarn
from moeexp.config.schema import ModelConfig
from moeexp.config.sources import load_architecture
from moeexp.model.checkpoint import Snapshot
from moeexp.model.config_agreement import check_agreement, differences, text_config
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.stack.factory import build_model


def folder_model(folder, config) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig("test", str(folder), None, 0, None, "none")


@pytest.mark.parametrize("name", ["tiny", "nano", "small", "qwen3_5_35b_a3b"])
def test_models_that_ship_are_read_alike(name):
    model = compose.compose([f"model={name}"]).model
    check_agreement(model)
    assert list(differences(load_architecture(model), text_config(model))) == []


@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("nested", [False, True])
def test_snapshots_are_read_alike(tmp_path, arch, nested):
    write_snapshot(tmp_path, arch, {}, nested=nested)
    model = ModelConfig("test", str(tmp_path), None, 0, None, "none")
    check_agreement(model)
    assert load_architecture(model) == arch and list(differences(arch, text_config(model))) == []


OTHER = {
    "layer_types": ("full_attention", "full_attention"),
    "partial_rotary_factor": 0.505,
    "rope_theta": 5050.0,
    "rms_norm_eps": 1.01e-5,
    "tie_word_embeddings": True,
    "eos_token_ids": (3,),
    "rope_scaling": Yarn("yarn", 4.0, 256, 1.1, 32.0, 1.0, True),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Architecture)])
def test_every_field_that_we_use_is_compared(tmp_path, field):
    model = folder_model(tmp_path, ODD_CONFIG)
    ours = getattr(ODD, field)
    misread = dataclasses.replace(ODD, **{field: OTHER.get(field, ours + 1 if isinstance(ours, int) else None)})
    found = {key for key, *_ in differences(misread, text_config(model))}
    assert found == {{"eos_token_ids": "eos_token_id", "rope_scaling": "rope_type"}.get(field, field)}
    with pytest.raises(ValueError, match=r"moeexp reads .*, transformers .*not supported") as caught:
        check_agreement(model, misread)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_act", "attention_bias", "attn_output_gate", "norm_topk_prob"])
def test_what_the_model_takes_for_granted_is_compared(tmp_path, key):
    config = text_config(folder_model(tmp_path, ODD_CONFIG))
    setattr(config, key, "gelu" if key == "hidden_act" else key == "attention_bias")
    assert [found[0] for found in differences(ODD, config)] == [key]


@pytest.mark.parametrize("nested", [False, True])
def test_a_setting_that_our_reading_passes_over_is_refused(tmp_path, nested):
    config = ODD_CONFIG | {"norm_topk_prob": False}
    model = folder_model(tmp_path, {"model_type": "qwen3_5_moe", "text_config": config} if nested else config)
    load_architecture(model)  # our reading alone sees nothing
    with pytest.raises(ValueError, match="norm_topk_prob.*transformers"):
        check_agreement(model)


def test_what_stands_outside_the_text_config_counts(tmp_path):
    inner = {key: value for key, value in ODD_CONFIG.items() if key not in ("tie_word_embeddings", "eos_token_id")}
    outer = {"model_type": "qwen3_5_moe", "text_config": inner, "tie_word_embeddings": True, "eos_token_id": 7}
    model = folder_model(tmp_path, outer)
    check_agreement(model)
    config = text_config(model)
    assert config.tie_word_embeddings is True and config.eos_token_id == 7


def test_what_transformers_refuses_is_refused_in_one_line(tmp_path):
    model = folder_model(tmp_path, ODD_CONFIG | {"max_position_embeddings": "many"})
    with pytest.raises(ValueError, match="transformers refuses this model config") as caught:
        text_config(model)
    assert "\n" not in str(caught.value)


def _build(cfg, tmp_path):
    record = Record(tmp_path / "record.json", id="t", config=cfg, command=["test"])
    return build_model(cfg, Phases(record, Console(quiet=True)))


def test_refused_before_weights_are_read(tmp_path):
    """The folder holds no weights at all, and it is the config that is named."""
    folder = tmp_path / "snapshot"
    folder_model(folder, ODD_CONFIG | {"norm_topk_prob": False})
    cfg = resolved(compose.compose(["model=tiny", f"model.weights={folder}", "device=cpu"]), cuda_available=False)
    with pytest.raises(ValueError, match="norm_topk_prob.*False"):
        _build(cfg, tmp_path)


def test_shapes_given_for_random_weights_are_compared_as_they_are_given(tmp_path):
    rope = "{rope_type: default, rope_theta: 10000.0, partial_rotary_factor: 0.25}"
    overrides = ["model=nano", "device=cpu", f"+model.architecture.rope_parameters={rope}"]
    scaled = "model.architecture.rope_scaling={rope_type: default, rope_theta: 77.0}"
    cfg = resolve(compose.compose(overrides), cuda_available=False)
    assert "rope_parameters" in cfg.model.architecture
    _build(cfg, tmp_path)
    cfg = resolved(compose.compose([*overrides, scaled]), cuda_available=False)
    assert _build(cfg, tmp_path).arch.rope_theta == 77.0


SHAPES = [
    {name: getattr(ODD, name) + 1}
    for name in (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
        "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts",
        "moe_intermediate_size", "shared_expert_intermediate_size",
    )
]  # fmt: skip
SHAPES += [{"layer_types": ("full_attention", "linear_attention")}, {"layer_types": (*ODD.layer_types, "full_attention")}]
SHAPES += [{"tie_word_embeddings": True}]


@pytest.mark.parametrize("change", SHAPES, ids=lambda change: next(iter(change)))
def test_a_shape_that_we_misread_fails_at_loading(tmp_path, change):
    """In our reading alone, past the comparison of configs."""
    build_snapshot(tmp_path, ODD)
    with pytest.raises(ValueError, match="does not fit its config.json|differs from the embedding"):
        load_model(Snapshot(tmp_path, dataclasses.replace(ODD, **change)))
