"""Composing configs, refusing those that cannot run, and resolving what was left to choose."""

import dataclasses

import pytest

from moeexp.config import axes
from moeexp.config.architecture import Architecture
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.schema import Config, conf_dir
from moeexp.config.sources import load_architecture
from moeexp.config.validate import validate

MODELS = ("nano", "small", "qwen3_5_35b_a3b")


def nano(*overrides: str) -> Config:
    return compose(["model=nano", *overrides])


def refusal(*overrides: str, cuda: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        validate(nano(*overrides), cuda_available=cuda)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults():
    config = compose()
    assert (config.model.name, config.quant.name, config.export) == ("tiny", "int4", "aoti")
    assert (config.dispatch, config.state, config.cuda_graph, config.tracker.name) == ("dual", "shared", False, "wandb")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_every_model_is_valid_with_every_quantisation(model, quant):
    config = compose([f"model={model}", f"quant={quant}"])
    validate(config, cuda_available=False)
    assert resolve(config, cuda_available=False).quant.bits == {"none": 16, "int8": 8, "int4": 4}[quant]


def test_every_file_of_a_group_composes():
    for group in ("model", "quant", "ops", "sampler", "tracker", "experiment"):
        files = sorted((conf_dir() / group).glob("*.yaml"))
        assert files, group
        for file in files:
            config = compose([f"{group}={file.stem}"])
            if group != "experiment" and group != "ops":
                assert getattr(config, group).name == file.stem


def test_35b_is_the_published_shape():
    transformers = pytest.importorskip("transformers.models.qwen3_5_moe.configuration_qwen3_5_moe")
    published = transformers.Qwen3_5MoeTextConfig()
    ours = Architecture.from_hf(compose(["model=qwen3_5_35b_a3b"]).model.architecture).to_hf()
    published_dict = published.to_dict()
    differing = {key for key in ours if key in published_dict and ours[key] != published_dict[key]}
    # The class's defaults are a short context and an older base; Qwen3.5-35B-A3B's own config.json has these.
    assert differing == {"max_position_embeddings", "rope_parameters"}
    assert ours["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    "override, parts",
    [
        ("cuda_graph=banana", ["banana", "allowed: false, true, decode, loop, all"]),
        ("cuda_graph=1", ["allowed: false, true"]),
        ("cuda_graph=null", ["allowed: false, true"]),
        ("cuda_graph=true", ["cuda_graph=true", "needs CUDA", "cuda_graph=false"]),
        ("cuda_graph=decode", ["cuda_graph=decode", "needs CUDA", "cuda_graph=false"]),
        ("device=cuda", ["device=cuda", "device=cpu"]),
        ("device=tpu", ["allowed: auto, cpu, cuda"]),
        ("dtype=float16", ["allowed: auto, bfloat16, float32"]),
        ("new_tokens=0", ["new_tokens=0", "at least 1"]),
        ("batch=0", ["batch=0", "at least 1"]),
        ("repeats=0", ["repeats=0"]),
        ("prompt_len=0", ["prompt_len=0"]),
        ("seed=-1", ["seed=-1"]),
        ("eos=true", ["eos=true", "names no eos_token_id", "eos=false"]),
        ("prompt=''", ["prompt is empty"]),
        ("prompt_ids=[]", ["prompt_ids is empty"]),
        ("prompt_ids=[3,256]", ["256", "0..255"]),
        ("prompt_ids=[-1]", ["-1", "0..255"]),
        ("quant.bits=3", ["quant.bits=3", "16, 8, 4"]),
        ("quant.group_size=48", ["48", "power of two"]),
        ("quant.group_size=64", ["64", "32", "experts down"]),
        ("quant.skip=[banana,embedding,router,shared_expert_gate]", ["banana"]),
        ("quant.skip=[]", ["embedding"]),
        ("ops.router=banana", ["banana", "ops.router", "reference"]),
        ("model.weights=/nowhere", ["/nowhere", "folder"]),
        ("model.heldout=/nowhere", ["/nowhere"]),
        ("model.tokenizer=words", ["allowed: auto, bytes, none"]),
        ("model.architecture=null", ["model.architecture"]),
        ("model.architecture.hidden_size=wide", ["model.architecture.hidden_size=wide"]),
        ("tracker.name=paper", ["allowed: wandb, jsonl"]),
    ],
)
def test_refused(override, parts):
    message = refusal(override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("pair", ["prompt=a prompt_len=3", "prompt=a prompt_ids=[1]", "prompt_ids=[1] prompt_len=2"])
def test_one_prompt_at_most(pair):
    assert "at most one" in refusal(*pair.split())


@pytest.mark.parametrize("prompt, length", [("prompt='äb'", 3), ("prompt_ids=[1,2]", 2), ("prompt_len=9", 9), ("seed=0", 16)])
def test_prompt_and_new_tokens_fit_exactly(prompt, length):
    validate(nano(prompt, f"max_seq_len={length + 64}"), cuda_available=False)
    message = refusal(prompt, f"max_seq_len={length + 63}")
    assert f"max_seq_len={length + 64}" in message


def test_an_end_that_the_model_names_is_taken():
    config = nano("eos=true", "+model.architecture.eos_token_id=7")
    validate(config, cuda_available=False)
    assert load_architecture(config.model).eos_token_ids == (7,)
    assert "eos" in refusal("eos=true")


@pytest.mark.parametrize("prompt", ["prompt='äb'", "prompt_ids=[1,2,3]", "prompt_len=3"])
def test_a_prompt_that_no_prefill_graph_holds_is_refused(prompt):
    message = refusal(prompt, "cuda_graph=all", "prefill_graph_lengths=[2,1]", cuda=True)
    for part in ("prompt of 3 tokens", "prefill_graph_lengths=[2, 1]", "3 or more", "prefill_chunk=2", "cuda_graph=loop"):
        assert part in message
    for fine in (["prefill_graph_lengths=[3]"], ["cuda_graph=loop"], ["dispatch=token_by_token"], ["prefill_chunk=2"]):
        validate(nano(prompt, "cuda_graph=all", "prefill_graph_lengths=[2]", *fine), cuda_available=True)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="prompt_len"):
        validate(compose(["model=small", "prompt=a"]), cuda_available=False)
    with pytest.raises(ValueError, match="vocabulary of 256"):
        validate(nano("model.tokenizer=bytes", "model.architecture.vocab_size=255"), cuda_available=False)


def test_cuda_axes_are_valid_with_cuda():
    validate(nano("cuda_graph=true", "device=cuda"), cuda_available=True)
    assert "or device=cuda" in refusal("cuda_graph=true", "device=cpu", cuda=True)


def test_resolve_leaves_nothing_to_choose():
    on_cpu, on_gpu = (resolve(nano(), cuda_available=cuda) for cuda in (False, True))
    assert (on_cpu.device, on_cpu.dtype) == ("cpu", "float32")
    assert (on_gpu.device, on_gpu.dtype) == ("cuda", "bfloat16")
    assert on_cpu.prompt == "In the beginning" and on_cpu.prompt_len is None
    assert resolve(compose(["model=small"]), cuda_available=False).prompt_len == 32
    assert on_cpu.quant.group_size == 32
    assert resolve(nano("quant=none", "quant.group_size=7"), cuda_available=False).quant.group_size is None
    assert resolve(nano("cuda_graph=true"), cuda_available=True).cuda_graph == "decode"
    assert resolve(nano("dtype=bfloat16"), cuda_available=False).dtype == "bfloat16"


def test_resolve_twice_is_resolve_once():
    once = resolve(nano(), cuda_available=False)
    assert resolve(once, cuda_available=False) == once


@pytest.mark.parametrize("model, size", [("nano", 32), ("small", 128), ("qwen3_5_35b_a3b", 128)])
def test_default_group_size(model, size):
    assert resolve(compose([f"model={model}"]), cuda_available=False).quant.group_size == size


def test_skipped_kinds_do_not_bound_the_group_size():
    skip = "quant.skip=[embedding,router,shared_expert_gate,experts,shared_expert]"
    assert "group_size" in refusal("quant=int4", "quant.group_size=64")
    validate(nano(skip, "quant=int4", "quant.group_size=64"), cuda_available=False)


def test_not_applicable_on_cpu_only():
    on_cpu = ["shared_stream", "skip_output_copy", "pdl", "allocator"]
    assert axes.not_applicable(resolve(nano(), cuda_available=False)) == on_cpu
    assert axes.not_applicable(resolve(nano("cuda_graph=true"), cuda_available=True)) == []
    assert axes.not_applicable(resolve(nano(), cuda_available=True)) == ["pdl"]  # edges of a graph


@pytest.mark.parametrize(("capability", "idle"), [((8, 0), ["pdl"]), ((9, 0), []), ((10, 0), [])])
def test_what_needs_hopper_is_not_applicable_before_it(capability, idle):
    assert axes.not_applicable(resolve(nano("cuda_graph=true"), cuda_available=True), capability) == idle


def test_a_snapshot_gives_its_own_shapes(tmp_path):
    import json

    shapes = compose(["model=nano"]).model.architecture | {"num_experts": 6}
    (tmp_path / "config.json").write_text(json.dumps(shapes | {"model_type": "qwen3_5_moe_text"}))
    config = compose(["model=qwen3_5_35b_a3b", f"model.weights={tmp_path}"])
    assert resolve(config, cuda_available=False).model.architecture["num_experts"] == 6
    assert resolve(config, cuda_available=False).model.tokenizer == "bytes"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve(config, cuda_available=False).model.tokenizer == "auto"


def test_keys_may_not_be_added_or_removed():
    with pytest.raises(ValueError, match="no setting quant.colour"):
        compose(["+quant.colour=red"])
    with pytest.raises(ValueError, match="seed is missing"):
        compose(["~seed"])


def test_every_row_is_of_a_field():
    config = compose(["model=nano"])
    for path in axes.TABLE:
        axes.get(config, path)
    assert {field.name for field in dataclasses.fields(config.ops)} >= {"default", "linear", "sample"}


@pytest.mark.parametrize(("op", "name"), [("router", "fused"), ("router", "in_moe"), ("gdn_decode", "with_out")])
def test_an_implementation_that_was_removed_is_refused_with_what_to_use_instead(op, name):
    with pytest.raises(ValueError) as caught:
        validate(nano(f"ops.{op}={name}"), cuda_available=True)
    assert f"ops.{op}={name} was removed" in str(caught.value) and f"use ops.{op}=triton" in str(caught.value)
    validate(nano(f"ops.{op}=triton"), cuda_available=True)
