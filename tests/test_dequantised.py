"""Weights under transformers' names, and the twin of another dtype."""

import dataclasses

import pytest
import torch
from common import EVEN, ODD, build_session, build_snapshot, load_model, random_tokens
from moeexp_kernels.ops.linear import dequantise

from moeexp.config.architecture import Architecture
from moeexp.model.checkpoint import Snapshot
from moeexp.model.dequantise import DequantisedWeights, as_dtype
from moeexp.model.weights import Random


@pytest.mark.parametrize("arch", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize("tied", [False, True])
def test_gives_back_what_the_snapshot_held(tmp_path, arch, layout, tied):
    theirs = build_snapshot(tmp_path, arch, layout=layout, tied=tied)
    weights = DequantisedWeights(load_model(Snapshot(tmp_path, Architecture.from_folder(tmp_path))))
    for index, layer in enumerate(theirs.model.layers):
        found, expected = weights.layer(index), layer.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
    assert torch.equal(weights.embedding(), theirs.model.embed_tokens.weight)
    assert torch.equal(weights.head(), theirs.lm_head.weight)
    assert torch.equal(weights.final_norm(), theirs.model.norm.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_matrices_are_dequantised_and_the_rest_is_not_touched(bits):
    plain, model = load_model(Random(EVEN, 0)), load_model(Random(EVEN, 0), bits=bits)
    before, after = DequantisedWeights(plain).layer(0), DequantisedWeights(model).layer(0)
    own = model.layers[0].moe.down
    wide = dequantise(weight=own.weight, scales=own.scales, in_features=own.shape[-1])
    assert torch.equal(after["mlp.experts.down_proj"], wide)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight", "linear_attn.in_proj_b.weight",
        "linear_attn.in_proj_a.weight", "linear_attn.out_proj.weight", "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj", "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
    }  # fmt: skip
    for name in changed:
        error = (before[name] - after[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
        assert error < {8: 0.01, 4: 0.15}[bits], name


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_twin_has_the_same_values(bits, tied):
    arch = dataclasses.replace(EVEN, tie_word_embeddings=tied)
    model = load_model(Random(arch, 0), dtype=torch.bfloat16, bits=bits)
    twin = as_dtype(model, torch.float32)
    assert [name for name, _ in twin.named_buffers()] == [name for name, _ in model.named_buffers()]
    for name, buffer in model.named_buffers():
        other = twin.get_buffer(name)
        assert torch.equal(other.double(), buffer.double()), name
        assert other.dtype == (torch.float32 if buffer.dtype == torch.bfloat16 else buffer.dtype), name
        if buffer.dtype != torch.bfloat16:
            assert other.data_ptr() == buffer.data_ptr(), f"{name} was copied"
    if tied and bits == 16:
        assert twin.head.weight.data_ptr() == twin.embed_tokens.weight.data_ptr()


def test_a_twin_runs_beside_its_model():
    model = load_model(Random(EVEN, 0))
    first = build_session(model, max_seq_len=16)
    twin = as_dtype(model, torch.float32)
    tokens = random_tokens(1, 6)
    expected = first.prefill(tokens).clone()
    second = build_session(twin, max_seq_len=16)
    assert torch.equal(second.prefill(tokens), expected)
