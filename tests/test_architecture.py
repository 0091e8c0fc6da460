"""Shapes read from a Hugging Face config, and what is refused there."""

import json

import pytest
from common import EVEN, ODD, ODD_CONFIG

from moeexp.config.architecture import Architecture


def config_class():
    from transformers import Qwen3_5MoeTextConfig

    return Qwen3_5MoeTextConfig


@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
def test_round_trip_through_transformers(arch):
    assert Architecture.from_hf(arch.to_hf()) == arch
    assert Architecture.from_hf(config_class()(**arch.to_hf()).to_dict()) == arch


def test_every_field_is_read():
    assert ODD == Architecture(
        vocab_size=61, hidden_size=48, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"),
        num_attention_heads=3, num_key_value_heads=1, head_dim=24, partial_rotary_factor=0.5, rope_theta=5000.0,
        linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=20, linear_value_head_dim=12,
        linear_conv_kernel_dim=4, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=28,
        shared_expert_intermediate_size=36, rms_norm_eps=1e-5, tie_word_embeddings=False, max_position_embeddings=256,
        eos_token_ids=(3, 60),
    )  # fmt: skip
    assert (ODD.key_dim, ODD.value_dim, ODD.conv_dim, ODD.rotary_dim) == (20, 36, 76, 12)


def test_defaults_are_those_of_transformers():
    sizes = {key: ODD_CONFIG[key] for key in ODD_CONFIG if key.startswith(("num_", "linear_num", "hidden", "vocab"))}
    sizes |= {key: ODD_CONFIG[key] for key in ("moe_intermediate_size", "shared_expert_intermediate_size")}
    sizes |= {"head_dim": 24, "linear_key_head_dim": 20, "linear_value_head_dim": 12, "num_hidden_layers": 9}
    theirs = config_class()(**sizes)
    arch = Architecture.from_hf(sizes)
    assert arch.layer_types == tuple(theirs.layer_types) and arch.layer_types.count("full_attention") == 2
    rope = theirs.rope_parameters
    assert arch.rope_theta == rope["rope_theta"] and arch.partial_rotary_factor == rope["partial_rotary_factor"]
    for key in ("linear_conv_kernel_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(arch, key) == getattr(theirs, key), key
    assert arch.eos_token_ids == ()


def test_nested_config_takes_what_only_the_outside_has():
    inner = {key: value for key, value in ODD_CONFIG.items() if key not in ("tie_word_embeddings", "eos_token_id")}
    outer = {"model_type": "qwen3_5_moe", "text_config": inner, "tie_word_embeddings": True, "eos_token_id": 7}
    arch = Architecture.from_hf(outer)
    assert arch.hidden_size == 48 and arch.tie_word_embeddings is True and arch.eos_token_ids == (7,)


def test_full_attention_interval():
    config = {key: value for key, value in ODD_CONFIG.items() if key != "layer_types"}
    config |= {"num_hidden_layers": 3, "full_attention_interval": 2}
    assert Architecture.from_hf(config).layer_types == ("linear_attention", "full_attention", "linear_attention")
    with pytest.raises(ValueError, match="full_attention_interval=0"):
        Architecture.from_hf(config | {"full_attention_interval": 0})


NESTED = {"model_type": "qwen3_5_moe", "text_config": ODD_CONFIG}
WRONG = [
    ({"model_type": "llama"}, "llama.*supported: qwen3_5_moe"),
    ({"model_type": "qwen3_5_moe"}, "supported: qwen3_5_moe with a text_config"),
    ({"text_config": ODD_CONFIG}, "model_type='qwen3_5_moe_text'.*without one or inside it"),
    *[(NESTED | {"text_config": ODD_CONFIG | {"model_type": kind}}, f"model_type='{kind}'") for kind in ("qwen3_5_moe", "llama")],
    (NESTED | {"text_config": ODD_CONFIG | {"text_config": {}}}, "text_config.text_config={}.*null or left out"),
    ({"per_layer_config": {"1": {"num_experts_per_tok": 1}}}, "per_layer_config=.*null or left out"),
    *[(change | {key: {}}, f"{key}={{}}.*null") for key in ("decoder", "generator", "text_encoder") for change in ({}, NESTED)],
    ({"hidden_size": None}, "hidden_size=null.*whole number of at least 1"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type='linear'.*default, yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_scaling has rope_type=yarn and no factor"),
    ({"layer_types": ["linear_attention"]}, "layer_types.*num_hidden_layers=2"),
    ({"layer_types": ["linear_attention", "sliding_attention"]}, "sliding_attention"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads=3.*multiple.*num_key_value_heads=2"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0.*at least 1"),
    ({"linear_num_key_heads": 2}, "linear_num_value_heads=3.*linear_num_key_heads=2"),
    ({"num_experts_per_tok": 6}, "num_experts_per_tok=6.*1..num_experts=5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.3}}, "7 rotary dims"),
    ({"hidden_size": -48}, "hidden_size=-48.*at least 1"),
    ({"hidden_size": "48"}, "hidden_size='48'.*whole number"),
    ({"hidden_size": 48.5}, "hidden_size=48.5.*whole number"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(sorted(change)[0]) for change, _ in WRONG])
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Architecture.from_hf(ODD_CONFIG | change)
    assert "\n" not in str(caught.value)


def test_from_folder(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        Architecture.from_folder(tmp_path)
    path = tmp_path / "config.json"
    for content, message in [(b"{", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"[1]", "JSON object")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Architecture.from_folder(tmp_path)
    path.write_text(json.dumps(ODD_CONFIG))
    assert Architecture.from_folder(tmp_path) == ODD
