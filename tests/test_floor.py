"""Bytes of a decode step, counted by hand from the shapes."""

import dataclasses

import pytest
import torch
from common import EVEN, ODD, load_model

from moeexp.floor import bytes_per_step
from moeexp.weights import NEVER_QUANTISED, Random


def by_hand(arch, *, bits=16, group=16, item=4, batch=1, head_bits=None):
    """Weights that one step reads, from the layer's formulas; vectors and the router are float32 or `item` bytes wide."""

    def matrix(rows, features, bits=bits):
        return rows * features * item if bits == 16 else rows * features * bits // 8 + rows * features // group * 4

    d, total = arch.hidden_size, 0
    used = min(batch * arch.num_experts_per_tok, arch.num_experts)
    for kind in arch.layer_types:
        if kind == "linear_attention":
            total += matrix(arch.conv_dim + arch.value_dim + 2 * arch.linear_num_value_heads, d)
            total += matrix(d, arch.value_dim) + arch.conv_dim * arch.linear_conv_kernel_dim * item
            total += (2 * arch.linear_num_value_heads + arch.linear_value_head_dim) * 4
        else:
            total += matrix(2 * (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim, d)
            total += matrix(d, arch.num_attention_heads * arch.head_dim) + 2 * arch.head_dim * 4
        wide, shared = arch.moe_intermediate_size, arch.shared_expert_intermediate_size
        total += used * (matrix(2 * wide, d) + matrix(d, wide)) + matrix(2 * shared, d) + matrix(d, shared)
        total += (arch.num_experts + 1) * d * item + 2 * d * 4
    total += matrix(arch.vocab_size, d, head_bits or bits) + d * 4 + arch.rotary_dim // 2 * 4
    return total + batch * d * item  # an embedding row per sequence


@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_plain_weights(arch, tied, batch):
    arch = dataclasses.replace(arch, tie_word_embeddings=tied)
    found = bytes_per_step(load_model(Random(arch, 0)), batch=batch, length=10)
    assert found["weights"] == by_hand(arch, batch=batch)
    assert found["total"] == found["weights"] + found["state"] + found["kv_cache"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_count_scales_and_a_head_left_out(bits):
    model = load_model(Random(EVEN, 0), bits=bits)
    assert bytes_per_step(model, batch=1, length=0)["weights"] == by_hand(EVEN, bits=bits)
    model = load_model(Random(EVEN, 0), bits=bits, skip=(*NEVER_QUANTISED, "head"))
    assert bytes_per_step(model, batch=1, length=0)["weights"] == by_hand(EVEN, bits=bits, head_bits=16)


def test_state_is_read_and_written_the_cache_read_and_appended():
    model = load_model(Random(EVEN, 0), dtype=torch.bfloat16)
    found = bytes_per_step(model, batch=2, length=10)
    conv, recurrent = EVEN.conv_dim * 3 * 2, EVEN.linear_num_value_heads * 8 * 8 * 4
    assert found["state"] == 2 * 2 * 2 * (conv + recurrent)  # batch, read + write, two such layers
    assert found["kv_cache"] == 2 * 11 * 2 * EVEN.num_key_value_heads * EVEN.head_dim * 2
    assert found["weights"] == by_hand(EVEN, item=2, batch=2)


def test_attached_state_is_not_taken_for_weights():
    from common import build_session

    model = load_model(Random(EVEN, 0))
    before = bytes_per_step(model, batch=1, length=3)
    build_session(model, max_seq_len=40)
    assert bytes_per_step(model, batch=1, length=3) == before
