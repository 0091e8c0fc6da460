"""Rotary embedding and YaRN: read as transformers reads them, computed to the same bits, refused where not supported."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from common import ODD_CONFIG, build_session, build_snapshot, load_model, random_tokens

from moeexp.check.faults import Fault
from moeexp.check.reference import generate_reference
from moeexp.cli import main
from moeexp.config import compose
from moeexp.config.architecture import Architecture
from moeexp.config.resolve import resolved
from moeexp.config.rope import Yarn
from moeexp.config.schema import ModelConfig
from moeexp.model.checkpoint import Snapshot
from moeexp.model.config_agreement import check_agreement, differences, text_config
from moeexp.model.inputs import note_of_context
from moeexp.model.rope import inverse_frequencies
from moeexp.power import _phases, configured, seen_by
from moeexp.record.record import read_record
from moeexp.report import command_line
from moeexp.run.identity import Identities, config_hash
from moeexp.stack.factory import build_model

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
BARE = {key: value for key, value in ODD_CONFIG.items() if key != "rope_parameters"}


def model_of(folder: Path, config: dict) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig("test", str(folder), None, 0, None, "none")


def rotary(model: ModelConfig):
    """transformers' own module of the snapshot's config.json."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    return Qwen3_5MoeTextRotaryEmbedding(text_config(model))


def read_alike(model: ModelConfig) -> Architecture:
    """Our reading, after settings, frequencies and attention factor were compared with transformers', bit for bit."""
    arch = Architecture.from_folder(Path(model.weights))
    check_agreement(model, arch)
    theirs = rotary(model)
    assert torch.equal(inverse_frequencies(arch)[0], theirs.inv_freq) and inverse_frequencies(arch).dtype == torch.float32
    ours = 1.0 if arch.rope_scaling is None else arch.rope_scaling.attention_factor
    assert ours == theirs.attention_scaling and type(ours) is float
    assert Architecture.from_hf(arch.to_hf()) == arch, "a record says all of it"
    return arch


# ---- frequencies

SETTINGS = [
    {},
    {"factor": 1},
    {"factor": 1.0, "truncate": False},
    {"factor": 3.7, "beta_fast": 17, "beta_slow": 0.3},
    {"factor": 40, "truncate": False},
    {"factor": 40.0, "beta_fast": 2.5, "beta_slow": 2.5},
    {"attention_factor": 0.7},
    {"attention_factor": 1, "mscale": 0.7, "mscale_all_dim": 1.1},
    {"mscale": 0.707, "mscale_all_dim": 1.3},
    {"mscale": 2},
    {"mscale": 0, "mscale_all_dim": 1.0},
    {"attention_factor": None, "beta_fast": None, "beta_slow": None, "mscale": None, "mscale_all_dim": None},
    {"truncate": True, "mrope_section": [11, 11, 10], "mrope_interleaved": True},
]
# (head dim, partial rotary factor, base): 64 of 256 dims as in Qwen3.5-35B-A3B, and odd ones
HEADS = [(256, 0.25, 10_000_000), (24, 0.5, 5000.0), (80, 0.25, 1e4), (44, 0.1, 123.4), (96, 1.0, 1.5), (34, 0.55, 1e6)]


@pytest.mark.parametrize(("dim", "partial", "theta"), HEADS)
@pytest.mark.parametrize("original", [1, 7, 4096, 262_144])
def test_frequencies_and_attention_factor_are_those_of_transformers(tmp_path, dim, partial, theta, original):
    plain = {"rope_theta": theta, "partial_rotary_factor": partial}
    shapes = BARE | {"head_dim": dim, "max_position_embeddings": 262_144}
    assert read_alike(model_of(tmp_path, shapes | {"rope_parameters": plain})).rope_scaling is None
    for setting in SETTINGS:
        rope = plain | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original} | setting
        yarn = read_alike(model_of(tmp_path, shapes | {"rope_parameters": rope})).rope_scaling
        assert yarn.original_max_position_embeddings == original and yarn.context == round(yarn.factor * original)


def test_yarn_changes_frequencies_and_factor(tmp_path):
    """Of the published shape: the fast dims stay, the slow ones turn four times slower."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7, "original_max_position_embeddings": 262_144}
    yarn = BARE | {"head_dim": 256, "rope_parameters": rope}
    stretched = inverse_frequencies(read_alike(model_of(tmp_path / "yarn", yarn)))[0]
    plain = BARE | {"head_dim": 256, "rope_parameters": {"rope_theta": 1e7}}
    ratio = inverse_frequencies(read_alike(model_of(tmp_path / "plain", plain)))[0] / stretched
    assert ratio[0] == 1 and ratio[-1] == 4 and 1 < ratio[16] < 4 and (ratio.diff() >= -1e-6).all()


# ---- which of several settings counts


OTHER = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25}
NO_BASE = {"rope_type": "yarn", "factor": 4.0}
READ = {
    "rope_parameters": ({"rope_parameters": YARN}, 5000.0, 0.5, 256),
    "rope_scaling": ({"rope_scaling": YARN}, 5000.0, 0.5, 256),
    "rope_scaling wins, whole": ({"rope_parameters": OTHER, "rope_scaling": YARN}, 5000.0, 0.5, 256),
    "and leaves no base behind": ({"rope_parameters": OTHER, "rope_scaling": NO_BASE}, 10000.0, 0.25, 256),
    "one that is empty does not": ({"rope_parameters": YARN, "rope_scaling": {}}, 5000.0, 0.5, 256),
    "or null": ({"rope_parameters": YARN, "rope_scaling": None}, 5000.0, 0.5, 256),
    "a plain one wins too": ({"rope_parameters": YARN, "rope_scaling": OTHER}, 77.0, 0.25, None),
    "the base beside it": ({"rope_scaling": NO_BASE, "rope_theta": 88, "partial_rotary_factor": 0.75}, 88.0, 0.75, 256),
    "the base within it": ({"rope_scaling": YARN, "rope_theta": 88.0, "partial_rotary_factor": 0.75}, 5000.0, 0.5, 256),
    "the original name": ({"rope_scaling": {"type": "yarn", "factor": 4}}, 10000.0, 0.25, 256),
    "the new name wins": ({"rope_scaling": YARN | {"type": "mrope"}}, 5000.0, 0.5, 256),
    "and over yarn": ({"rope_scaling": OTHER | {"type": "yarn"}}, 77.0, 0.25, None),
    "the context within": ({"rope_parameters": YARN | {"original_max_position_embeddings": 64}}, 5000.0, 0.5, 64),
    "the context beside it wins": (
        {"rope_parameters": YARN | {"original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
        5000.0, 0.5, 32,
    ),
    "a context without yarn": ({"rope_parameters": OTHER, "original_max_position_embeddings": 32}, 77.0, 0.25, None),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("nested", [False, True])
def test_precedence_is_that_of_transformers(tmp_path, name, nested):
    change, theta, partial, original = READ[name]
    config = BARE | change
    arch = read_alike(model_of(tmp_path, {"model_type": "qwen3_5_moe", "text_config": config} if nested else config))
    assert (arch.rope_theta, arch.partial_rotary_factor) == (theta, partial)
    assert (arch.rope_scaling and arch.rope_scaling.original_max_position_embeddings) == original


def test_what_is_left_out_is_filled_in(tmp_path):
    arch = read_alike(model_of(tmp_path, BARE | {"rope_parameters": YARN}))
    assert arch.rope_scaling == Yarn("yarn", 4.0, 256, 1.1386294361119891, 32.0, 1.0, True)
    assert arch.to_hf()["rope_parameters"] == YARN | {
        "original_max_position_embeddings": 256, "attention_factor": 1.1386294361119891, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": True,
    }  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Yarn) if field.name != "rope_type"])
def test_every_setting_is_compared(tmp_path, field):
    model = model_of(tmp_path, BARE | {"rope_parameters": YARN})
    arch = Architecture.from_folder(tmp_path)
    value = getattr(arch.rope_scaling, field)
    other = not value if field == "truncate" else value + 1
    misread = dataclasses.replace(arch, rope_scaling=dataclasses.replace(arch.rope_scaling, **{field: other}))
    assert next(differences(misread, text_config(model)))[0] == field
    plain = dataclasses.replace(arch, rope_scaling=None)
    assert [key for key, *_ in differences(plain, text_config(model))] == ["rope_type"]


def test_another_formula_is_seen(tmp_path, monkeypatch):
    """Of a transformers that computes it otherwise."""
    from transformers import modeling_rope_utils

    model, real = model_of(tmp_path, BARE | {"rope_parameters": YARN}), modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    monkeypatch.setitem(modeling_rope_utils.ROPE_INIT_FUNCTIONS, "yarn", lambda config: (real(config)[0] * 1.01, real(config)[1]))
    with pytest.raises(ValueError, match=r"inv_freq\[0\] in the model config: moeexp reads"):
        check_agreement(model)


# ---- refused

BY_LAYER = {"full_attention": YARN, "linear_attention": None}
REFUSED = [
    ({"rope_type": kind, "factor": 2.0}, [f".rope_type='{kind[:70]}", "allowed: default, yarn"])
    for kind in ("linear", "dynamic", "longrope", "llama3", "proportional", "axial", "mrope", "YARN", "", "x" * 900)
]
REFUSED += [
    ({"type": "linear", "factor": 2.0}, [".type='linear'", "allowed: default, yarn"]),
    ({"type": None, "factor": 2.0}, [".type=null", "must be a text"]),
    ({"rope_type": None, "factor": 2.0}, [".rope_type=null", "must be a text"]),
    ({"rope_type": "yarn"}, ["rope_type=yarn and no factor", "finite number of at least 1"]),
    (BY_LAYER, [".full_attention={", "by layer type"]),
    ({"full_attention": OTHER}, [".full_attention={", "by layer type"]),
    ({"linear_attention": None}, [".linear_attention=null", "no key of rope_type=default"]),
    ({"rope_theta": 1e4, "factor": 2.0}, [".factor=2.0", "no key of rope_type=default", "allowed: rope_type, rope_theta"]),
    (YARN | {"low_freq_factor": 1.0}, [".low_freq_factor=1.0", "no key of rope_type=yarn", "attention_factor, beta_fast"]),
    (YARN | {"finetuned": None}, [".finetuned=null", "no key"]),
    (YARN | {"y" * 900: "z" * 900}, ["no key of rope_type=yarn"]),
    (YARN | {"beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast=1.0", "at least beta_slow=2.0"]),
    (YARN | {"beta_slow": 33}, ["beta_fast=32", "at least beta_slow=33"]),
    (YARN | {"rope_theta": 1.0}, ["rope_theta=1.0", "above 1"]),
    (YARN | {"factor": 0.99}, [".factor=0.99", "at least 1"]),
    (YARN | {"mrope_section": [1, 2]}, [".mrope_section=[1, 2]", "three whole numbers"]),
    (OTHER | {"mrope_section": [1, 2, -3]}, [".mrope_section=[1, 2, -3]", "three whole numbers"]),
    (YARN | {"mrope_section": None}, [".mrope_section=null", "three whole numbers"]),
    (OTHER | {"mrope_interleaved": 1}, [".mrope_interleaved=1", "true or false"]),
]
NO_NUMBER = ["4", [], True, float("nan"), float("inf"), -float("inf"), -1, -0.5, 1e40, 10**30]
KEYS = ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta", "partial_rotary_factor"]
NEEDED = ("factor", "rope_theta", "original_max_position_embeddings")
REFUSED += [(YARN | {key: value}, [f".{key}=", "finite number"]) for key in KEYS for value in NO_NUMBER]
REFUSED += [(YARN | {key: 0}, [f".{key}=0", "finite number"]) for key in KEYS if "mscale" not in key]
REFUSED += [(YARN | {key: None}, [f".{key}=null", "number"]) for key in NEEDED]
REFUSED += [(YARN | {"truncate": value}, [".truncate=", "true or false"]) for value in (None, 0, 1, "false", [])]
REFUSED += [
    (YARN | {"original_max_position_embeddings": value}, [".original_max_position_embeddings=", "whole number of at least 1"])
    for value in (0, -1, 64.0, "64", True, float("nan"), 10**30)
]


@pytest.mark.parametrize(("rope", "said"), REFUSED, ids=lambda value: str(value)[:60] if isinstance(value, dict) else "")
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_not_supported_is_refused_by_file_key_and_value(tmp_path, rope, said, name, nested):
    config = BARE | {name: rope}
    model_of(tmp_path, {"model_type": "qwen3_5_moe", "text_config": config} if nested else config)
    with pytest.raises(ValueError) as caught:
        Architecture.from_folder(tmp_path)
    line = str(caught.value)
    assert str(tmp_path / "config.json") in line and "in the model config" in line and "\n" not in line
    assert len(line.replace(str(tmp_path), "")) <= 400
    for part in said:
        assert part in line


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", [YARN, OTHER])
def test_a_setting_that_transformers_does_not_read_is_refused(tmp_path, name, rope):
    """Beside a text_config, where it stands in the flat configs."""
    model = model_of(tmp_path, {"model_type": "qwen3_5_moe", "text_config": ODD_CONFIG, name: rope})
    with pytest.raises(ValueError, match=f"{name}=.* beside text_config .* in text_config only; move it there"):
        Architecture.from_folder(tmp_path)
    for harmless in (None, {}, ODD_CONFIG.get(name)):
        model_of(tmp_path, {"model_type": "qwen3_5_moe", "text_config": ODD_CONFIG, name: harmless})
        read_alike(model)


@pytest.mark.parametrize("value", [None, 0, "64", 64.5, True])
def test_the_original_context_beside_it_is_checked(tmp_path, value):
    model_of(tmp_path, BARE | {"rope_parameters": YARN, "original_max_position_embeddings": value})
    with pytest.raises(ValueError, match=r"original_max_position_embeddings=.* must be a whole number of at least 1"):
        Architecture.from_folder(tmp_path)


# ---- runs

SHORT = YARN | {"rope_theta": 1e4, "original_max_position_embeddings": 16}
RUN = [
    "model=tiny", "model.heldout=null", "device=cpu", "export=eager", "dtype=float32", "quant=none", "tracker=jsonl",
    "repeats=1", "min_samples=1", "min_time_s=0", "eval_bytes=0",
]  # fmt: skip
PROMPT = [1 + i * 7 % 50 for i in range(40)]  # 2.5 times the original context; what is generated goes up to four times


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yarn") / "s"
    config = {"max_position_embeddings": 64, "rope_parameters": SHORT, "layer_types": ["full_attention"] * 2}
    build_snapshot(folder, Architecture.from_hf(ODD_CONFIG | config), seed=3)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"rope_parameters": SHORT}))  # as a person writes it
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(folder, *overrides):
    code = main([*RUN, f'model.weights="{folder}"', *overrides, "hydra.run.dir=out"])
    return code, read_record(Path("out") / "record.json")


def plain_copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    (to / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    return to


@pytest.mark.parametrize(("op", "length", "new"), [("reference", 40, 24), pytest.param("triton", 18, 3, marks=pytest.mark.slow)])
def test_a_run_beyond_the_original_context_is_what_transformers_generates(snapshot, tmp_path, op, length, new):
    prompt = torch.tensor([PROMPT[:length]])
    given = [f"prompt_ids={prompt[0].tolist()}".replace(" ", ""), f"new_tokens={new}", f"ops.qk_norm_rope={op}"]
    code, record = run(snapshot, *given, "max_seq_len=64")
    assert code == 0 and record["status"] == "ok", record["check"]["failures"]
    parts = {part["name"]: part for part in record["check"]["parts"]}
    assert parts["float32"]["passed"] and parts["transformers.generate"]["passed"]
    expected = generate_reference(snapshot, prompt, new)
    assert record["generated_ids"] == expected.tolist()
    plain = generate_reference(plain_copy(snapshot, tmp_path / "plain"), prompt, new)
    assert new < 24 or plain.tolist() != expected.tolist(), "or this test could not see that yarn is left out"
    rope = record["config"]["model"]["architecture"]["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4.0 and rope["attention_factor"] == 1.1386294361119891
    assert not [note for note in record["notes"] if "max_position" in note], "4 times 16 positions are enough"


def test_logits_are_those_of_transformers(snapshot):
    """Of 64 positions in one pass; without yarn they are others."""
    from transformers import Qwen3_5MoeForCausalLM

    arch, ids = Architecture.from_folder(snapshot), random_tokens(1, 64, seed=4)
    model = Qwen3_5MoeForCausalLM.from_pretrained(snapshot, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(ids).logits

    def off(reading):
        ours = build_session(load_model(Snapshot(snapshot, reading))).prefill(ids, torch.arange(64))
        return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()

    assert off(arch) < 1e-5 and off(dataclasses.replace(arch, rope_scaling=None)) > 1e-2


@pytest.mark.parametrize("field", ["factor", "attention_factor"])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_a_fault_of_one_percent_is_seen(snapshot, field, share):
    ids = ",".join(map(str, PROMPT))
    cfg = configured([f"model.weights={snapshot}", "dtype=float32", "device=cpu", f"prompt_ids=[{ids}]", "new_tokens=4"])
    with _phases(cfg) as phases:
        clean = build_model(cfg, phases)
    assert seen_by(Fault("none"), cfg, clean) == []
    yarn = clean.arch.rope_scaling
    wrong = dataclasses.replace(yarn, **{field: getattr(yarn, field) * share})
    assert {"config", "float32"} <= set(seen_by(Fault("x", reading={"rope_scaling": wrong}), cfg, clean))


def test_a_refusal_is_one_line_before_weights_are_read(snapshot, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Identities, "of", lambda *_, **__: pytest.fail("weights were read"))
    folder = plain_copy(snapshot, tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    for rope, said in (({"rope_type": "linear", "factor": 2.0}, "allowed: default, yarn"), (BY_LAYER, "by layer type")):
        (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
        assert main([*RUN, f'model.weights="{folder}"', "prompt_ids=[1]", "new_tokens=2"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: rope_scaling.") and said in line and len(line) <= 400
        assert str(folder / "config.json") in line


def test_a_context_beyond_the_stretched_one_is_noted(snapshot, tmp_path):
    def note(length, rope):
        model_of(tmp_path / "s", ODD_CONFIG | {"max_position_embeddings": 32, "rope_parameters": rope})
        overrides = [f"model.weights={tmp_path / 's'}", f"max_seq_len={length}", "prompt_ids=[1]", "new_tokens=2", "quant=none"]
        return note_of_context(resolved(compose.compose(["model=tiny", *overrides]), cuda_available=False))

    plain = {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert note(32, plain) is None and "max_position_embeddings=32" in note(33, plain) and "no yarn" in note(33, plain)
    assert note(128, YARN) is None and "the 128 positions that the model's yarn reaches" in note(129, YARN)
    short = YARN | {"original_max_position_embeddings": 10, "factor": 2.5}
    assert note(25, short) is None and "factor=2.5 times original_max_position_embeddings=10" in note(26, short)


# ---- shapes given for random weights

STRETCH = "model.architecture.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:16}"
NANO = ["model=nano", "device=cpu", "export=eager", "tracker=jsonl", "repeats=1", "min_samples=1", "min_time_s=0"]


def test_random_weights_with_yarn():
    assert main([*NANO, STRETCH, "prompt_len=40", "new_tokens=8", "hydra.run.dir=out"]) == 0
    record = read_record(Path("out") / "record.json")
    assert record["status"] == "ok"
    arch = Architecture.from_hf(record["config"]["model"]["architecture"])
    assert arch.rope_scaling == Yarn("yarn", 4.0, 16, 1.1386294361119891, 32.0, 1.0, True)
    assert (arch.rope_theta, arch.partial_rotary_factor) == (10000.0, 0.25), "those beside it"
    arguments = command_line.arguments_of(record)
    assert Architecture.from_hf(compose.compose(arguments).model.architecture) == arch


@pytest.mark.parametrize("given", ["{rope_type:linear,factor:2.0}", "{rope_type:yarn}", "{rope_type:yarn,factor:-1}", "yarn"])
def test_random_weights_with_what_is_not_supported(capsys, given):
    assert main([*NANO, f"model.architecture.rope_scaling={given}", "prompt_len=4", "new_tokens=2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "rope_scaling" in line and len(line) <= 400


def test_the_identity_of_a_run_has_every_setting(tmp_path):
    """Of a folder's config.json, which is no override."""
    found = set()
    for change in ({}, {"factor": 8.0}, {"attention_factor": 1.2}, {"beta_fast": 16}, {"beta_slow": 2}, {"truncate": False},
                   {"original_max_position_embeddings": 32}):  # fmt: skip
        model_of(tmp_path / "s", ODD_CONFIG | {"rope_parameters": YARN | change})
        overrides = ["model=tiny", f"model.weights={tmp_path / 's'}", "prompt_ids=[1]", "new_tokens=2", "quant=none"]
        found.add(config_hash(resolved(compose.compose(overrides), cuda_available=False), {}))
    assert len(found) == 7
