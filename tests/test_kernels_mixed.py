"""Mixers that write limbs for the output projection: as a kernel of their own would write them, and the same product of them."""

from __future__ import annotations

import pytest
import torch
from kernels_common import DEVICE, assert_bitwise_equal, expect_value_error, poisoned_empty, randn
from moeexp_kernels import registry
from moeexp_kernels.ops import mixed
from moeexp_kernels.ops.attention_splits import sdpa_decode_limbs, sdpa_decode_splitk
from moeexp_kernels.ops.gated_delta import gdn_decode, gdn_decode_limbs
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.ops.linear_tile import launch_limbs
from moeexp_kernels.parts import tuning

F32, BF16 = torch.float32, torch.bfloat16


def delta_net(batch, tokens, dims, dtype):
    heads, channels = 2, (2 * 1 * dims[0] + 2 * dims[1])
    return {
        "proj": randn(batch, tokens, channels + heads * dims[1] + 2 * heads, seed=1, dtype=dtype),
        "conv_weight": randn(channels, 4, seed=2, dtype=dtype, scale=0.5), "a_log": randn(heads, seed=3) - 1.0,
        "dt_bias": randn(heads, seed=4) - 1.0, "norm_weight": 1 + randn(dims[1], seed=5, dtype=dtype, scale=0.1),
        "conv_state": randn(batch, channels, 3, seed=6, dtype=dtype),
        "recurrent_state": randn(batch, heads, *dims, seed=7, scale=0.3),
        "num_k_heads": 1, "num_v_heads": heads, "head_k_dim": dims[0], "head_v_dim": dims[1], "eps": 1e-6,
    }  # fmt: skip


def attention(batch, tokens, head_dim, dtype, slots=64):
    heads, kv_heads = 4, 2
    return {
        "q": randn(batch, tokens, heads, head_dim, seed=1, dtype=dtype),
        "qkv": randn(batch, tokens, (2 * heads + 2 * kv_heads) * head_dim, seed=2, dtype=dtype),
        "k_cache": randn(batch, kv_heads, slots, head_dim, seed=3, dtype=dtype),
        "v_cache": randn(batch, kv_heads, slots, head_dim, seed=4, dtype=dtype),
        "positions": torch.full((batch,), slots - 8, dtype=torch.int64, device=DEVICE),
    }


def int4(rows, features, group=64):
    """weight and scales, as `linear` takes them."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.randint(0, 256, (rows, features // 2), generator=generator, dtype=torch.uint8).to(DEVICE)
    return weight, randn(rows, features // group, 2, seed=8, scale=features**-0.5 / 8).half()


def own(arguments):
    """State of its own for each call."""
    return {name: value.clone() if name in ("conv_state", "recurrent_state") else value for name, value in arguments.items()}


def limbs_of(out, group):
    return launch_limbs(x=out.view(-1, out.shape[-1]), norm_weight=None, eps=0.0, group=group)


@pytest.mark.parametrize(
    ("dtype", "dims", "group"),
    [
        (F32, (16, 64), 64), pytest.param(BF16, (16, 128), 64, marks=pytest.mark.slow),
        pytest.param(BF16, (16, 96), 64, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_delta_net_writes_the_limbs_that_a_kernel_of_their_own_would(dtype, dims, group):
    """A head of one group, of two, and of no whole number, for which that kernel runs."""
    arguments = delta_net(2, 2, dims, dtype)
    with poisoned_empty():
        expected = gdn_decode(**own(arguments))
        out, limbs, units = gdn_decode_limbs(**own(arguments), group=group)
    assert_bitwise_equal(out, expected, "out")
    for found, wanted, what in zip((limbs, units), limbs_of(expected, group), ("limbs", "units"), strict=True):
        assert_bitwise_equal(found, wanted, what)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "slots", "group"), [(F32, 64, 64, 64), (BF16, 128, 64, 64), (BF16, 96, 64, 64), (BF16, 64, 16, 64)]
)
def test_attention_writes_the_limbs_that_a_kernel_of_their_own_would(dtype, head_dim, slots, group):
    """Also where a program has no whole groups, and where nothing is split and merged."""
    arguments = attention(2, 2, head_dim, dtype, slots)
    with poisoned_empty():
        expected = sdpa_decode_splitk(**arguments)
        out, limbs, units = sdpa_decode_limbs(**arguments, group=group)
    assert_bitwise_equal(out, expected, "out")
    for found, wanted, what in zip((limbs, units), limbs_of(expected, group), ("limbs", "units"), strict=True):
        assert_bitwise_equal(found, wanted, what)


@pytest.mark.parametrize("kind", ["gdn", "sdpa"])
@pytest.mark.parametrize(("batch", "joined"), [(1, False), (5, True)])
def test_the_projection_of_limbs_is_that_of_the_result(kind, batch, joined):
    """Five rows go to the tile, which takes limbs; one goes to the GEMV, for which none are made."""
    arguments = delta_net(batch, 1, (16, 64), BF16) if kind == "gdn" else attention(batch, 1, 64, BF16)
    plain, together = {"gdn": (gdn_decode, mixed.gdn_out), "sdpa": (sdpa_decode_splitk, mixed.sdpa_out)}[kind]
    features = 128 if kind == "gdn" else 256
    weight, scales = int4(32, features)
    project = {"weight": weight, "scales": scales, "residual": randn(batch, 1, 32, seed=10, dtype=BF16)}
    expected = linear(x=plain(**own(arguments)), **project)
    with tuning.asked() as asked:
        y = together(own(arguments), project)
    assert ("linear_tile" in {op for op, _ in asked}) == joined
    assert not [key for op, key in asked if op == "limbs"], "no kernel of their own"
    assert_bitwise_equal(y, expected, kind)


def test_which_implementations_are_joined():
    default = {"linear": "triton", "gdn_decode": "triton", "sdpa_decode": "triton", "router": "triton", "moe_decode": "triton"}
    assert set(registry.joined(default)) == {"embedding", "routed_experts", "gdn_out", "sdpa_out"}
    assert set(registry.joined(default | {"linear": "tile"})) == {"embedding", "routed_experts"}
    assert set(registry.joined(default | {"gdn_decode": "einsum", "router": "reference"})) == {"embedding", "sdpa_out"}
    other = registry.joined(default | {"sdpa_decode": "tiled", "gdn_decode": "recurrent"})
    assert set(other) == {"embedding", "routed_experts", "gdn_out"}
    assert set(registry.joined(dict.fromkeys(default, "reference"))) == set()


def test_limbs_of_another_x_are_refused():
    weight, scales = int4(32, 128)
    x = randn(5, 128, seed=1, dtype=BF16)
    limbs, units = launch_limbs(x=x, norm_weight=None, eps=0.0, group=64)
    common = {"x": x, "weight": weight, "scales": scales}
    expect_value_error(lambda: linear(**common, limbs=limbs[:4], units=units), "limbs")
    expect_value_error(lambda: linear(**common, limbs=limbs, units=units[:, :1]), "units")
    expect_value_error(lambda: linear(**common, norm_weight=randn(128, seed=3), limbs=limbs, units=units), "norm_weight")
