"""The model's weights are the snapshot's own under transformers' rules, and every kind of mix-up is seen and named."""

import dataclasses
import json

import pytest
import torch
from common import EVEN, ODD, build_snapshot, load_model
from reference_model import config_of
from safetensors.torch import load_file, save_file

from moeexp.check.faults import FAULTS, copy_of, swapped_in_experts
from moeexp.check.snapshot_reader import SnapshotReader
from moeexp.check.weight_agreement import check_weights
from moeexp.config.architecture import Architecture
from moeexp.config.schema import ModelConfig
from moeexp.model import checkpoint, dequantise
from moeexp.model.checkpoint import Snapshot
from moeexp.model.config_agreement import text_config

CPU = torch.device("cpu")


def loaded(folder, **options):
    return load_model(Snapshot(folder, Architecture.from_folder(folder)), **options)


def check(model, folder):
    return check_weights(model, folder, config_of(model.arch))


def failed(part) -> set[str]:
    return {row["tolerance"] for row in part.tolerances if not row["passed"]}


LAYOUTS = [
    {"layout": "fused"},
    {"layout": "per_expert"},
    {"layout": "per_expert", "prefix": "model.language_model.", "vision": True},
    {"layout": "fused", "prefix": "model.language_model.", "vision": True, "tied": True},
    {"layout": "per_expert", "shards": 3, "tied": True},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: ",".join(map(str, options.values())))
@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
def test_reads_what_transformers_loads(tmp_path, arch, options):
    theirs = build_snapshot(tmp_path, arch, **options).state_dict()
    arch = dataclasses.replace(arch, tie_word_embeddings=options.get("tied", False))
    reader = SnapshotReader(tmp_path, config_of(arch))
    assert not reader.missing and not reader.unused
    found = dict(reader.read(list(reader.shapes), CPU))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    part = check(loaded(tmp_path), tmp_path)
    assert part.passed and part.report == {"tensors": len(theirs), "quantised": 0}


@pytest.fixture(scope="module", params=[(16, torch.float32), (16, torch.bfloat16), (8, torch.float32), (4, torch.bfloat16)],
                ids=["float32", "bfloat16", "int8", "int4"])  # fmt: skip
def snapshot(request, tmp_path_factory):
    bits, dtype = request.param
    folder = tmp_path_factory.mktemp("snapshot")
    build_snapshot(folder, EVEN, layout="per_expert")
    return folder, {"bits": bits, "dtype": dtype}, loaded(folder, bits=bits, dtype=dtype)


def test_right_weights_pass(snapshot):
    folder, options, model = snapshot
    part = check(model, folder)
    assert part.passed, part.failures()
    names = {row["tolerance"] for row in part.tolerances}
    assert names == {"weights.names", "weights.exact"} | ({"weights.step", "weights.clipped"} if options["bits"] < 16 else set())
    assert (part.report["quantised"] > 0) == (options["bits"] < 16)


def test_gate_and_up_swapped_in_our_map_fail(snapshot, monkeypatch):
    """The loader and what the reference is given share the map: only the snapshot's own names tell."""
    folder, options, _ = snapshot
    real = checkpoint.pieces
    for module in (checkpoint, dequantise):
        monkeypatch.setattr(module, "pieces", lambda *args, **kwargs: swapped_in_experts(real(*args, **kwargs)))
    part = check(loaded(folder, **options), folder)
    assert failed(part) and all("mlp.experts.gate_up_proj" in line for line in part.failures())
    assert sum("gate_up_proj" in row["where"] for row in part.tolerances if not row["passed"]) >= EVEN.num_hidden_layers


LOADED = [fault for fault in FAULTS if fault.model]


@pytest.mark.parametrize("fault", LOADED, ids=lambda fault: fault.name.removeprefix("loaded: "))
def test_a_tensor_that_was_loaded_wrongly_fails(snapshot, fault):
    folder, _, model = snapshot
    changed = copy_of(model)
    fault.model(changed)
    assert failed(check(changed, folder)) & {"weights.exact", "weights.step", "weights.clipped"}
    assert check(model, folder).passed, "the fault was left in the shared model"


def test_one_code_off_by_one_is_seen_and_named(tmp_path):
    build_snapshot(tmp_path, EVEN)
    for bits, other in ((8, 1), (4, 1)):
        model = loaded(tmp_path, bits=bits)
        stored = model.layers[2].moe.down.weight
        stored[3, 2, 1] = stored[3, 2, 1] ^ other
        part = check(model, tmp_path)
        assert failed(part) == {"weights.step"} and "layers.2.mlp.experts.down_proj" in part.failures()[0]


def test_one_element_of_a_plain_tensor_is_seen_and_named(tmp_path):
    build_snapshot(tmp_path, EVEN)
    for value in (0.25, float("nan")):
        model = loaded(tmp_path)
        model.layers[1].mixer.q_norm[3] = value
        part = check(model, tmp_path)
        assert failed(part) == {"weights.exact"} and "layers.1.self_attn.q_norm.weight: 1 " in part.failures()[0]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_tie_that_we_ignore_is_seen(tmp_path, bits):
    build_snapshot(tmp_path, EVEN, tied=True)
    model = loaded(tmp_path, bits=bits)
    assert check(model, tmp_path).passed
    model.head.weight = model.head.weight.roll(1, 0)
    assert any("lm_head.weight" in line for line in check(model, tmp_path).failures())


def test_tensors_that_only_one_side_places_are_named(tmp_path):
    build_snapshot(tmp_path, EVEN)
    model, path = loaded(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2, 2)
    tensors.pop("model.layers.1.self_attn.k_norm.weight")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    part = check(model, tmp_path)
    assert failed(part) == {"weights.names"}
    text = "\n".join(part.failures())
    for name in ("layers.0.mlp.extra.weight", "layers.1.self_attn.k_norm.weight", "model.norm.weight: shape (32,) here"):
        assert name in text


def test_an_attention_kernel_that_the_snapshot_names_is_not_loaded(tmp_path):
    build_snapshot(tmp_path, EVEN)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "someone/kernel"}))
    config = text_config(ModelConfig("test", str(tmp_path), None, 0, None, "none"))
    assert config._attn_implementation == "someone/kernel"
    assert check_weights(loaded(tmp_path), tmp_path, config).passed
