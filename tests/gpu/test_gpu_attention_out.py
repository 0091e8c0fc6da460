"""Attention joined to its output projection, on the device at the shapes of Qwen3.5-35B-A3B and 122B-A10B."""

from __future__ import annotations

import pytest
import torch
from kernels_common import assert_bitwise_equal, assert_close_ratio, poisoned_empty, randn
from moeexp_kernels.ops.attention_out import sdpa_decode_out
from moeexp_kernels.ops.attention_splits import sdpa_decode_splitk
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.parts import tuning
from test_kernels_linear import quantised

pytestmark = pytest.mark.usefixtures("exact_reference")
F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {"35b": (2048, 16), "122b": (3072, 32)}  # outputs, query heads
DIM, KV_HEADS, SLOTS = 256, 2, 1024


def step(shape, positions, *, tokens=1, bits=4, dtype=BF16):
    """(arguments of attention, weight, scales and residual of the projection)."""
    (outputs, heads), batch = SHAPES[shape], len(positions)
    attention = {
        "q": randn(batch, tokens, heads, DIM, seed=1, dtype=dtype),
        "qkv": randn(batch, tokens, (2 * heads + 2 * KV_HEADS) * DIM, seed=2, dtype=dtype),
        "k_cache": randn(batch, KV_HEADS, SLOTS, DIM, seed=3, dtype=dtype),
        "v_cache": randn(batch, KV_HEADS, SLOTS, DIM, seed=4, dtype=dtype),
        "positions": torch.tensor(positions, device="cuda"),
    }
    weight, scales = quantised(outputs, heads * DIM, bits=bits, group=128, seed=8, dtype=dtype)
    # Small, as attention's own result is that far from the first token: else rounding the sum is all that shows.
    residual = randn(batch, tokens, outputs, seed=9, dtype=dtype, scale=1e-3)
    return attention, {"weight": weight, "scales": scales, "residual": residual}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("positions", "tokens"), [([0], 1), ([640, 17], 1), ([1000], 3)])
def test_it_is_attention_and_then_the_projection(positions, tokens, shape, bits, dtype):
    attention, project = step(shape, positions, tokens=tokens, bits=bits, dtype=dtype)
    rounded = sdpa_decode_splitk(**attention)
    expected = linear(x=rounded.float(), weight=project["weight"], scales=project["scales"])
    results = []
    for run in range(5):
        with poisoned_empty():
            results.append(sdpa_decode_out(**attention, **project))
        assert_bitwise_equal(results[run], results[0], f"run {run}")
    alone = results[0].float() - project["residual"].float()
    assert_close_ratio(alone, expected, 1e-5 if dtype == F32 else 2e-2, "the projection alone")


@pytest.mark.parametrize("positions", [[640, 17], [5, 1000, 512]])
def test_a_row_is_to_the_bit_what_it_is_alone(positions):
    attention, project = step("35b", positions)
    config = tuning.lookup("gemv", "int4/2048x4096/packed")
    programs = tuning.lookup("attention_splits", "half/256")["programs"]
    with tuning.override("gemv", "int4/2048x4096", config):
        y = sdpa_decode_out(**attention, **project)
        for row in range(len(positions)):
            alone = {name: value[row : row + 1].clone() for name, value in attention.items()}
            own = project | {"residual": project["residual"][row : row + 1].contiguous()}
            # As many splits as beside the others: their number is a call's.
            with tuning.override("attention_splits", "half/256", {"programs": programs // len(positions)}):
                assert_bitwise_equal(sdpa_decode_out(**alone, **own), y[row : row + 1], f"row {row}")
