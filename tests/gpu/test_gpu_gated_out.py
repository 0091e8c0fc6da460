"""A delta net's step joined to its output projection, on the device at the shapes of Qwen3.5-35B-A3B and 122B-A10B."""

from __future__ import annotations

import pytest
import torch
from kernels_common import assert_bitwise_equal, assert_close_ratio, poisoned_empty, randn
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_out import gdn_decode_out
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.parts import tuning
from test_kernels_gated_out import STATES, own
from test_kernels_linear import quantised

pytestmark = pytest.mark.usefixtures("exact_reference")
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {"35b": (2048, 16, 32), "122b": (3072, 16, 64)}  # outputs, key heads, value heads
DIM = 128


def step(shape, *, batch, tokens=1, bits=4, dtype=BF16, seed=1):
    """(arguments of the delta net, weight, scales and residual of the projection)."""
    outputs, k_heads, v_heads = SHAPES[shape]
    channels = (2 * k_heads + v_heads) * DIM
    delta = {
        "proj": randn(batch, tokens, channels + v_heads * DIM + 2 * v_heads, seed=seed, dtype=dtype),
        "conv_weight": randn(channels, 4, seed=2, dtype=dtype, scale=0.5), "a_log": randn(v_heads, seed=3) - 1.0,
        "dt_bias": randn(v_heads, seed=4) - 1.0, "norm_weight": 1 + randn(DIM, seed=5, dtype=dtype, scale=0.1),
        "conv_state": randn(batch, channels, 3, seed=6, dtype=dtype),
        "recurrent_state": randn(batch, v_heads, DIM, DIM, seed=seed + 7, scale=0.3),
        "num_k_heads": k_heads, "num_v_heads": v_heads, "head_k_dim": DIM, "head_v_dim": DIM, "eps": 1e-6,
    }  # fmt: skip
    weight, scales = quantised(outputs, v_heads * DIM, bits=bits, group=128, seed=8, dtype=dtype)
    return delta, {"weight": weight, "scales": scales, "residual": randn(batch, tokens, outputs, seed=9, dtype=dtype)}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (1, 3)])
def test_it_is_the_delta_net_and_then_the_projection(batch, tokens, shape, bits, dtype):
    delta, project = step(shape, batch=batch, tokens=tokens, bits=bits, dtype=dtype)
    apart = own(delta)
    rounded = gdn_decode(**apart)
    expected = linear(x=rounded.float(), weight=project["weight"], scales=project["scales"])
    results = []
    for run in range(5):
        joined = own(delta)
        with poisoned_empty():
            results.append(gdn_decode_out(**joined, **project))
        for name in STATES:
            assert_bitwise_equal(joined[name], apart[name], f"{name}, run {run}")
        assert_bitwise_equal(results[run], results[0], f"run {run}")
    alone = results[0].float() - project["residual"].float()
    assert_close_ratio(alone, expected, 1e-5 if dtype == F32 else 2e-2, "the projection alone")


@pytest.mark.parametrize("rows", [2, 3])
def test_a_row_is_to_the_bit_what_it_is_alone(rows):
    delta, project = step("35b", batch=rows)
    config = tuning.lookup("gemv", "int4/2048x4096")
    with tuning.override("gemv", "int4/2048x4096", config):
        y = gdn_decode_out(**own(delta), **project)
        for row in range(rows):
            alone = own(delta) | {name: delta[name][row : row + 1].clone() for name in ("proj", *STATES)}
            own_residual = project | {"residual": project["residual"][row : row + 1].contiguous()}
            assert_bitwise_equal(gdn_decode_out(**alone, **own_residual), y[row : row + 1], f"row {row}")
