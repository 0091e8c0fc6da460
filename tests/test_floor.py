"""Bytes of a decode step, counted by hand from the shapes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from common import EVEN, ODD, load_model

from moeexp.config.architecture import Architecture
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.model.weights import Random
from moeexp.run.cache_size import cache_bytes, of_cores
from moeexp.run.roofline import bandwidth_share, bytes_per_step, distinct_experts, expected_experts


def by_hand(arch, *, used, bits=16, group=16, item=4, batch=1, head_bits=None):
    """Weights that one step reads, from the layer's formulas; vectors and the router are float32 or `item` bytes wide.
    used: distinct experts of each layer."""

    def matrix(rows, features, bits=bits):
        return rows * features * item if bits == 16 else rows * features * bits // 8 + rows * features // group * 4

    d, total = arch.hidden_size, 0
    for kind, chosen in zip(arch.layer_types, used, strict=True):
        if kind == "linear_attention":
            total += matrix(arch.conv_dim + arch.value_dim + 2 * arch.linear_num_value_heads, d)
            total += matrix(d, arch.value_dim) + arch.conv_dim * arch.linear_conv_kernel_dim * item
            total += (2 * arch.linear_num_value_heads + arch.linear_value_head_dim) * 4
        else:
            total += matrix(2 * (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim, d)
            total += matrix(d, arch.num_attention_heads * arch.head_dim) + 2 * arch.head_dim * 4
        wide, shared = arch.moe_intermediate_size, arch.shared_expert_intermediate_size
        total += chosen * (matrix(2 * wide, d) + matrix(d, wide)) + matrix(2 * shared, d) + matrix(d, shared)
        total += (arch.num_experts + 1) * d * item + 2 * d * 4
    total += matrix(arch.vocab_size, d, head_bits or bits) + d * 4 + arch.rotary_dim // 2 * 4
    return total + batch * d * item  # an embedding row per sequence


def choices(arch, batch, *, steps, seed=0, same=False):
    """[L, B, N, k]: distinct experts for each token, of each sequence the same where `same`."""
    shape = (arch.num_hidden_layers, 1 if same else batch, steps, arch.num_experts)
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[..., : arch.num_experts_per_tok].expand(-1, batch, -1, -1).int()


@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_plain_weights(arch, tied, batch):
    arch = dataclasses.replace(arch, tie_word_embeddings=tied)
    ids = choices(arch, batch, steps=6)
    used = [sum(len(set(layer[:, step].flatten().tolist())) for step in range(6)) / 6 for layer in ids]
    found = bytes_per_step(load_model(Random(arch, 0)), batch=batch, length=10, ids=ids)
    # Each expert matrix is rounded to a byte.
    assert found["weights"] == pytest.approx(by_hand(arch, used=used, batch=batch), abs=2 * len(used))
    assert found["distinct_experts"] == pytest.approx(sum(used) / len(used), abs=1e-4)
    assert (found["counted"], found["counted_steps"]) == (True, 6)
    assert found["total"] == found["weights"] + found["state"] + found["kv_cache"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_count_scales_and_a_head_left_out(bits):
    model, used = load_model(Random(EVEN, 0), bits=bits), [EVEN.num_experts_per_tok] * 3
    assert bytes_per_step(model, batch=1, length=0)["weights"] == by_hand(EVEN, used=used, bits=bits)
    model = load_model(Random(EVEN, 0), bits=bits, skip=(*NEVER_QUANTISED, "head"))
    assert bytes_per_step(model, batch=1, length=0)["weights"] == by_hand(EVEN, used=used, bits=bits, head_bits=16)


def test_state_is_read_and_written_the_cache_read_and_appended():
    model = load_model(Random(EVEN, 0), dtype=torch.bfloat16)
    found = bytes_per_step(model, batch=2, length=10, ids=choices(EVEN, 2, steps=1, same=True))
    conv, recurrent = EVEN.conv_dim * 3 * 2, EVEN.linear_num_value_heads * 8 * 8 * 4
    assert found["state"] == 2 * 2 * 2 * (conv + recurrent)  # batch, read + write, two such layers
    assert found["kv_cache"] == 2 * 11 * 2 * EVEN.num_key_value_heads * EVEN.head_dim * 2
    assert found["weights"] == by_hand(EVEN, used=[EVEN.num_experts_per_tok] * 3, item=2, batch=2)


LARGE = dataclasses.replace(EVEN, num_experts=256, num_experts_per_tok=8)


def test_one_sequence_reads_exactly_its_experts():
    for seed in range(5):
        assert distinct_experts(choices(LARGE, 1, steps=9, seed=seed)) == [8.0] * LARGE.num_hidden_layers
    assert expected_experts(LARGE, 1) == pytest.approx(8)
    assert distinct_experts(choices(LARGE, 32, steps=9, same=True)) == [8.0] * LARGE.num_hidden_layers


def test_32_sequences_of_near_uniform_choice_read_163_of_256_experts():
    """Not min(32 * 8, 256)."""
    found = distinct_experts(choices(LARGE, 32, steps=200))
    assert all(value == pytest.approx(163.3, abs=1.5) for value in found)
    assert expected_experts(LARGE, 32) == pytest.approx(163.3, abs=0.1)
    model = Qwen35MoE(LARGE, dtype=torch.bfloat16, device="meta")
    counted = bytes_per_step(model, batch=32, length=5, ids=choices(LARGE, 32, steps=200))
    expected = bytes_per_step(model, batch=32, length=5)
    assert counted["total"] == pytest.approx(expected["total"], rel=0.01)
    assert (expected["counted"], expected["counted_steps"]) == (False, 0)


def test_a_layer_counts_with_its_own_experts():
    model = Qwen35MoE(LARGE, dtype=torch.bfloat16, device="meta")
    ids = choices(LARGE, 4, steps=3)
    ids[1] = ids[1, :1]  # all sequences choose alike there
    found = bytes_per_step(model, batch=4, length=5, ids=ids)
    assert found["weights"] == pytest.approx(by_hand(LARGE, used=distinct_experts(ids), item=2, batch=4), abs=6)
    assert distinct_experts(ids)[1] == 8.0 < distinct_experts(ids)[0]


@pytest.mark.parametrize("arch", [EVEN, dataclasses.replace(ODD, tie_word_embeddings=True)], ids=["even", "tied"])
def test_shapes_alone_are_read(arch: Architecture):
    """engine=transformers has given its weights away by then."""
    loaded, shapes = load_model(Random(arch, 0)), Qwen35MoE(arch, dtype=torch.float32, device="meta")
    assert bytes_per_step(loaded, batch=3, length=7) == bytes_per_step(shapes, batch=3, length=7)


@pytest.mark.parametrize(("total", "cache", "share"), [
    (6e9, 5e9, 0.5), (5e9, 5e9, None), (4e9, 5e9, None), (6e9, None, None), (6e9, 0, 0.5),
])  # fmt: skip
def test_no_share_of_the_bandwidth_where_a_cache_may_hold_the_bytes(total, cache, share):
    floor = {"total": total, "cache_bytes": cache, "read_bandwidth_gb_s": 120.0}
    assert bandwidth_share(floor, step_s=0.1) == (None if share is None else pytest.approx(share))


def write_cache(folder, core, index, level, kind, size, shared):
    path = folder / f"cpu{core}" / "cache" / f"index{index}"
    path.mkdir(parents=True)
    for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        (path / name).write_text(f"{value}\n")


def test_the_last_caches_of_the_cores_that_may_be_used(tmp_path):
    for core in range(4):
        write_cache(tmp_path, core, 0, 1, "Data", "32K", core)
        write_cache(tmp_path, core, 1, 1, "Instruction", "64M", core)
        write_cache(tmp_path, core, 2, 2, "Unified", "1024K", core)
        write_cache(tmp_path, core, 3, 3, "Unified", "32M", "0-1" if core < 2 else "2-3")
    assert of_cores({0}, tmp_path) == of_cores({0, 1}, tmp_path) == 32 * 2**20
    assert of_cores({0, 1, 2, 3}, tmp_path) == of_cores({1, 2}, tmp_path) == 64 * 2**20
    (tmp_path / "cpu2" / "cache" / "index3" / "size").unlink()
    assert of_cores({2}, tmp_path) == 2**20, "the level below is the last that is known"
    assert of_cores({7}, tmp_path) is None


def test_a_gpu_s_cache_is_its_l2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 * 2**20))
    assert cache_bytes(torch.device("cuda", 0)) == 50 * 2**20
    here = cache_bytes(torch.device("cpu"))
    assert here is None or 2**15 <= here < 2**40
