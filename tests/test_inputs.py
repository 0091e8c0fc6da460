"""Snapshots that cannot be what they seem: refused in one line that names what is off, before weights are read."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from common import EVEN, ODD, ODD_CONFIG, build_snapshot
from safetensors.torch import load_file, save_file

from moeexp.cli import main
from moeexp.config.architecture import Architecture
from moeexp.model.checkpoint import Snapshot
from moeexp.record.record import read_record
from moeexp.run.identity import Identities

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12807982\n"
ARGUMENTS = [
    "model=tiny", "model.heldout=null", "device=cpu", "export=eager", "tracker=jsonl", "new_tokens=4", "max_seq_len=64",
    "repeats=1", "min_samples=1", "min_time_s=0", "eval_bytes=0", "check=off",
]  # fmt: skip
NAME = "model.layers.0.linear_attn.in_proj_qkv.weight"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "s"
    build_snapshot(folder, ODD)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "s"))


def run(folder, *overrides):
    given = list(overrides)
    if not any(one.startswith("quant") for one in given):
        given.append("quant=none")
    if not any(one.startswith("prompt") for one in given):
        given.append("prompt_ids=[1,2,3]")
    return main([*ARGUMENTS, f'model.weights="{folder}"', *given])


@pytest.fixture
def refused(capsys, monkeypatch):
    """(folder, overrides) -> the line that refuses it, before a digest of its weights is made."""

    def refuse(folder, *overrides, reads=False):
        with monkeypatch.context() as patch:
            if not reads:
                patch.setattr(Identities, "of", lambda *_, **__: pytest.fail("weights were read"))
            code = run(folder, *overrides)
        line = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and len(line) <= 400, (code, line)
        return line

    return refuse


def config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def tensors(folder, change):
    path = folder / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


ODD_TYPES = {
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.uint16: "U16",
}  # fmt: skip
SOME = [NAME, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize("dtype", ODD_TYPES, ids=ODD_TYPES.get)
@pytest.mark.parametrize("name", SOME)
def test_a_tensor_that_is_no_plain_weight_is_refused_by_name(folder, dtype, name):
    tensors(folder, lambda found: found.update({name: torch.ones(found[name].shape).to(dtype)}))
    config(folder, quantization_config={"quant_method": "some"})
    with pytest.raises(ValueError) as caught:
        Snapshot(folder, ODD)
    short = name.removeprefix("model.")
    assert f"tensor {short} is of type {ODD_TYPES[dtype]}, and config.json has a quantization_config" in str(caught.value)
    assert "quant_method='some'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floats_are_weights(folder, dtype):
    tensors(folder, lambda found: found.update({key: value.to(dtype) for key, value in found.items()}))
    assert run(folder) == 0


def test_types_of_tensors_that_a_text_model_leaves_out_do_not_matter(folder):
    tensors(folder, lambda found: found.update({"model.visual.ids": torch.ones(3, dtype=torch.int64)}))
    assert run(folder) == 0


@pytest.mark.parametrize("name", ["visual.ids", "model.mtp.fc.weight", "model.language_model.mtp.fc.weight"])
def test_tensors_of_which_transformers_warns_are_refused_before_the_check_counts_them(folder, refused, name):
    tensors(folder, lambda found: found.update({name: torch.ones(3)}))
    short = name.removeprefix("model.language_model.").removeprefix("model.")
    assert f"1 unexpected: {short}" in refused(folder)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("change", "said"), [({}, "F8_E4M3:"), (FP8, "F8_E4M3, and config.json has a quantization_config with quant_method='fp8'")]
)
def test_a_run_of_quantised_weights_is_refused_before_they_are_read(folder, refused, change, said):
    config(folder, **change)
    tensors(folder, lambda found: found.update({NAME: found[NAME].to(torch.float8_e4m3fn)}))
    line = refused(folder)
    assert f"tensor {NAME.removeprefix('model.')} is of type {said}" in line


COMPANIONS = [
    "weight_scale_inv", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight.absmax", "weight_scale", "weight_zeros",
    "input_scale", "weight.quant_map", "SCB", "zero_point",
]  # fmt: skip


@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("method", [None, "gptq"])
def test_companions_of_quantised_weights_are_named_as_such(folder, companion, method):
    key = NAME.replace("weight", companion)
    tensors(folder, lambda found: found.update({key: torch.ones(2, 2)}))
    config(folder, quantization_config=method and {"quant_method": method})
    with pytest.raises(ValueError, match=f"{key.removeprefix('model.')} of type F32 belongs to quantised weights") as caught:
        Snapshot(folder, ODD)
    assert ("quant_method='gptq'" in str(caught.value)) == (method == "gptq")


@pytest.mark.parametrize("value", [{"quant_method": "bitsandbytes"}, {}, "fp8", [1], True, {"quant_method": "x" * 999}])
@pytest.mark.parametrize("key", ["quantization_config", pytest.param("compression_config", marks=pytest.mark.slow)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_config_is_refused_also_beside_plain_tensors(folder, refused, key, value, nested):
    change = {key: value}
    if nested:
        inner = json.loads((folder / "config.json").read_text()) | change
        change = {"model_type": "qwen3_5_moe", "text_config": inner, "tie_word_embeddings": False}
    config(folder, **change)
    line = refused(folder)
    assert key in line and "config.json" in line
    assert "must be an object" in line or "quantised already" in line
    if isinstance(value, dict) and value.get("quant_method") == "bitsandbytes":
        assert "quant_method='bitsandbytes'" in line


def test_a_null_quantization_config_is_none(folder):
    config(folder, quantization_config=None)
    assert run(folder) == 0


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, refused, value, layout):
    build_snapshot(tmp_path / "s", EVEN, layout=layout)
    names = {"fused": "model.layers.1.mlp.experts.gate_up_proj", "per_expert": "model.layers.1.mlp.experts.3.up_proj.weight"}
    for name in (names[layout], "model.layers.0.linear_attn.A_log"):  # the second comes first
        tensors(tmp_path / "s", lambda found, name=name: found[name].view(-1)[-1:].fill_(float(value)))
        line = refused(tmp_path / "s", reads=True)
        assert f"tensor {name} has 1 of " in line and "NaN or Inf" in line


@pytest.mark.parametrize(("dtype", "stored", "value"), [("float32", torch.float64, -1e39), ("bfloat16", torch.float32, 3.4e38)])
def test_a_value_beyond_the_run_s_type_is_no_damage(folder, refused, dtype, stored, value):
    def change(found):
        found[NAME] = found[NAME].to(stored)
        found[NAME][0, 0] = value

    tensors(folder, change)
    line = refused(folder, f"dtype={dtype}", reads=True)
    assert f"tensor {NAME} has values up to {abs(value):.3g}, and {dtype} holds none beyond" in line and "NaN" not in line


def test_no_value_is_finite_by_chance():
    from moeexp.model.tensor_types import is_finite

    for dtype in (torch.float32, torch.bfloat16):
        good = torch.randn(7, 1031).to(dtype)
        good[3, 5] = torch.finfo(dtype).max
        assert is_finite(good)
        for value in (float("nan"), float("inf"), -float("inf")):
            for place in (0, 7 * 1031 // 2, 7 * 1031 - 1):
                bad = good.clone()
                bad.view(-1)[place] = value
                assert not is_finite(bad), (dtype, value, place)


WHOLE = ["vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "num_experts", "linear_conv_kernel_dim"]
WHOLE += ["max_position_embeddings", "num_experts_per_tok", "full_attention_interval", "linear_key_head_dim"]
REAL = ["rms_norm_eps", "rope_theta", "partial_rotary_factor"]
BOOLEAN = ["tie_word_embeddings", "attention_bias", "attn_output_gate", "norm_topk_prob"]
NO_NUMBER = ["48", "", [], [48], {}, None, True, float("nan"), float("inf"), 0, -1]
WRONG = [(key, value) for key in WHOLE for value in [*NO_NUMBER, 48.5, 48.0, 10**30]]
WRONG += [(key, value) for key in REAL for value in NO_NUMBER]
WRONG += [(key, value) for key in BOOLEAN for value in ("false", "true", 0, 1, None, [], {}, 1.0, "x" * 5000)]
WRONG += [("layer_types", value) for value in ("full_attention", 3, [1, 2], [None, None], {"a": 1}, True)]
WRONG += [(key, value) for key in ("rope_parameters", "rope_scaling") for value in ("yarn", 3, [1], True)]
WRONG += [("text_config", value) for value in ("x", 3, [1], True)]
WRONG += [("eos_token_id", value) for value in ("3", [3, "4"], 3.5, True, {}, [True])]
WRONG += [("hidden_act", value) for value in (None, 3, ["silu"], True)]
WRONG += [("model_type", value) for value in (3, ["qwen3_5_moe_text"], {}, True)]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("nested", [False, True])
def test_a_mistyped_key_is_named_with_value_file_and_what_is_allowed(tmp_path, key, value, nested):
    given = {name: kept for name, kept in ODD_CONFIG.items() if name != "layer_types" or key != "full_attention_interval"}
    given |= {key: value}
    if nested and key != "text_config":
        given = {"model_type": "qwen3_5_moe", "text_config": given}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError) as caught:
        Architecture.from_folder(tmp_path)
    line = str(caught.value)
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)[:70]
    assert f"{key}={shown}" in line and str(tmp_path / "config.json") in line
    assert "must be" in line or "only" in line or "supported" in line
    assert len(line) < 400 + len(str(tmp_path)) and "\n" not in line


@pytest.mark.parametrize("value", ["48", None, float("nan"), 0])
def test_a_run_of_a_mistyped_config_is_one_line(folder, refused, value):
    config(folder, hidden_size=value)
    line = refused(folder)
    assert "hidden_size=" in line and "whole number of at least 1" in line and "config.json" in line


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor", "rope_type"])
@pytest.mark.parametrize("value", [None, [], {}, True, float("nan")])
def test_keys_of_rope_are_checked_too(folder, key, value):
    config(folder, rope_parameters=ODD_CONFIG["rope_parameters"] | {key: value})
    with pytest.raises(ValueError, match=rf"rope_parameters\.{key}=.* must be .*config\.json"):
        Architecture.from_folder(folder)


DEFAULT_ROPE = {"rope_theta": 1e4, "partial_rotary_factor": 0.25}
NULL = {"rope_scaling": {}, "eos_token_id": {"eos_token_ids": ()}, "rope_parameters": DEFAULT_ROPE}


@pytest.mark.parametrize(("key", "means"), NULL.items())
def test_null_is_right_where_transformers_writes_it(folder, key, means):
    config(folder, **{key: None})
    assert Architecture.from_folder(folder) == dataclasses.replace(ODD, **means)


OTHER_FILES = ["tokenizer_config.json", "model.safetensors.index.json"]
FILES = {
    "pointer": (POINTER, "git-lfs pointer"),
    "cut": ('{"vocab_size": 6', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "list": ("[1]", "JSON object"),
    "deep": ("[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHER_FILES)],
)
def test_a_file_that_is_no_json_object_is_named(folder, refused, name, case):
    content, said = FILES[case]
    (folder / name).write_text(content)
    line = refused(folder, "prompt=a" if name.startswith("tokenizer") else "prompt_ids=[1]")
    assert name in line and said in line


@pytest.mark.parametrize("content", [POINTER, "", POINTER * 4])
def test_weights_that_are_a_pointer_are_named(folder, refused, content):
    (folder / "model.safetensors").write_text(content)
    line = refused(folder)
    assert "model.safetensors" in line and ("git-lfs pointer" in line) == content.startswith("version")


@pytest.mark.parametrize("value", [{"a": 1}, {"a": ["x"]}, {"a": None}, 3, "x"])
def test_an_index_that_names_no_files_is_named(folder, refused, value):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    assert "model.safetensors.index.json is not a safetensors index" in refused(folder)


LINKS = ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json", "generation_config.json"]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_points_to_nothing_is_named_as_one(folder, refused, name):
    (folder / name).unlink(missing_ok=True)
    os.symlink(f"../../blobs/{'0' * 64}", folder / name)
    line = refused(folder)
    assert name in line and "link that points to '../../blobs/000" in line and "blobs/" in line


def test_links_of_a_whole_cache_are_followed(folder, tmp_path):
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(tmp_path / "blobs" / name)
        os.symlink(f"../blobs/{name}", folder / name)
    os.symlink("nowhere", folder / "README.md")  # of no use to a run
    assert run(folder) == 0


def test_folders_and_texts_that_are_links_to_nothing(folder, tmp_path, refused):
    os.symlink(tmp_path / "gone", tmp_path / "link")
    assert "is a link that points to nothing" in refused(tmp_path / "link")
    assert "model.heldout" in (line := refused(folder, f"model.heldout={tmp_path / 'link'}")) and "link" in line


def tokenizer(folder, special=("<|endoftext|>", "<|im_end|>")):
    """One token a byte, then the special ones: ids 0 to 255, and from 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": special[-1], "pad_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def with_text(tmp_path):
    build_snapshot(tmp_path / "s", dataclasses.replace(ODD, vocab_size=257))
    tokenizer(tmp_path / "s")
    return tmp_path / "s"


def test_a_special_token_beyond_the_vocabulary(with_text, refused):
    assert run(with_text, 'prompt="a<|endoftext|>"') == 0, "256 is the last of 257"
    line = refused(with_text, 'prompt="a<|im_end|>"')
    assert "tokenizer makes token 257" in line and "vocab_size=257" in line and "0 to 256" in line


def test_heldout_text_beyond_the_vocabulary(with_text, tmp_path, refused):
    (tmp_path / "text").write_text("a text <|im_end|> and more")
    line = refused(with_text, "prompt=a", f"model.heldout={tmp_path / 'text'}", "eval_bytes=100")
    assert "token 257 of held-out text" in line


def test_a_long_prompt_that_is_refused_still_makes_a_short_line(with_text, refused):
    assert "token 257" in refused(with_text, f'prompt="{"a" * 9000}<|im_end|>"')


def test_a_tokenizer_without_its_vocabulary(with_text, refused):
    (with_text / "tokenizer.json").unlink()
    line = refused(with_text, "prompt=hello")
    assert "tokenizer_config.json" in line and "vocabulary (tokenizer.json) is missing" in line


@pytest.mark.parametrize("keep", ['{"model": {"type": "BPE"}}', "{}", '{"version": "1.0", "model": 3}'])
def test_a_tokenizer_that_transformers_cannot_load(with_text, refused, keep):
    (with_text / "tokenizer.json").write_text(keep)
    line = refused(with_text, "prompt=hello")
    assert "transformers cannot load the tokenizer of" in line and "tokenizer.json" in line


def test_a_text_without_a_token(with_text, refused):
    made = json.loads((with_text / "tokenizer.json").read_text())
    made["model"]["vocab"] = {"a": 0}
    made["pre_tokenizer"] = None
    (with_text / "tokenizer.json").write_text(json.dumps(made))
    assert "makes no token of prompt='bcd'" in refused(with_text, "prompt=bcd")


def test_a_context_beyond_the_models_is_noted(folder):
    for index, (length, noted) in enumerate([(256, False), (257, True)]):
        assert run(folder, f"max_seq_len={length}", f"hydra.run.dir=out{index}") == 0
        notes = [one for one in read_record(folder.parent / f"out{index}" / "record.json")["notes"] if "max_position" in one]
        assert len(notes) == noted
    assert "max_seq_len=257" in notes[0] and "max_position_embeddings=256" in notes[0] and "yarn" in notes[0]


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("given", [[], ["quant.group_size=32"], ["quant.group_size=2"]])
def test_a_width_that_no_group_divides(tmp_path, refused, quant, given):
    build_snapshot(tmp_path / "s", dataclasses.replace(ODD, moe_intermediate_size=27))
    line = refused(tmp_path / "s", f"quant={quant}", *given)
    assert "group_size=1" not in line and "quant.skip" in line
    assert "no even group divides the 27 input features of experts down" in line and "adding experts to" in line


def test_an_odd_output_is_left_out_by_its_own_kind(tmp_path, refused):
    build_snapshot(tmp_path / "s", dataclasses.replace(ODD, linear_value_head_dim=13))
    line = refused(tmp_path / "s", "quant=int4")
    assert "39 input features of linear_attention out_proj" in line and "adding out_proj to" in line
    skip = "[embedding,router,shared_expert_gate,out_proj]"
    assert run(tmp_path / "s", "quant=int4", f"quant.skip={skip}") == 0, "as the line says"


def test_a_group_of_one_is_no_advice():
    from moeexp.model.quantise import quantise

    with pytest.raises(ValueError, match="quant.group_size=1 is not an even number of at least 2"):
        quantise(torch.ones(4, 64), bits=4, group_size=1)
