"""Attention joined to its output projection: as the two by themselves, each row as it is alone."""

from __future__ import annotations

import pytest
import torch
from kernels_common import (
    assert_bitwise_equal,
    assert_close_ratio,
    expect_value_error,
    guarded_empty,
    poisoned_empty,
    randn,
)
from moeexp_kernels.ops.attention_out import sdpa_decode_out
from moeexp_kernels.ops.attention_reference import reference_sdpa
from moeexp_kernels.ops.attention_splits import packs, sdpa_decode_splitk
from moeexp_kernels.ops.linear import linear, reference_linear
from moeexp_kernels.ops.mixed import sdpa_out
from moeexp_kernels.parts import tuning
from test_kernels_gated_out import int8
from test_kernels_mixed import attention, int4
from tolerances import tolerance

F32, BF16 = torch.float32, torch.bfloat16
OUTPUTS = 36


def case(batch, tokens, head_dim, dtype, make, group):
    """(arguments of attention, those of its projection)."""
    arguments = attention(batch, tokens, head_dim, dtype)
    weight, scales = make(OUTPUTS, 4 * head_dim, group)
    return arguments, {"weight": weight, "scales": scales, "residual": randn(batch, tokens, OUTPUTS, seed=10, dtype=dtype)}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize(("head_dim", "group", "make"), [(64, 64, int4), (128, 64, int4), (128, 128, int8)])
def test_it_is_attention_and_then_the_projection(head_dim, group, make, rows, dtype):
    arguments, project = case(*rows, head_dim, dtype, make, group)
    with poisoned_empty():
        y = sdpa_decode_out(**arguments, **project)
    assert y.dtype == dtype
    expected = linear(x=sdpa_decode_splitk(**arguments), **project)
    assert_close_ratio(y, expected, tolerance("one rounding")[dtype] * (1 if dtype == F32 else 2), "y")
    wide = {name: value.float() if value.is_floating_point() else value for name, value in arguments.items()}
    exact = reference_linear(x=reference_sdpa(**wide), **project | {"residual": project["residual"].float()})
    assert_close_ratio(y, exact, tolerance("one rounding")[dtype], "y, which is rounded once")


def test_a_row_is_the_same_beside_others():
    arguments, project = case(2, 1, 64, BF16, int4, 64)
    y = sdpa_decode_out(**arguments, **project)
    for row in (0, 1):
        alone = {name: value[row : row + 1].contiguous() for name, value in arguments.items()}
        own = project | {"residual": project["residual"][row : row + 1].contiguous()}
        assert_bitwise_equal(sdpa_decode_out(**alone, **own), y[row : row + 1], f"row {row}")


@pytest.mark.parametrize(("batch", "head_dim", "joined"), [(1, 64, True), (1, 32, False), (5, 64, False)])
def test_where_a_head_is_whole_groups_and_rows_are_few(batch, head_dim, joined):
    arguments, project = case(batch, 1, head_dim, BF16, int4, 64)
    assert packs(arguments["q"], arguments["k_cache"], bits=4, group=64) == (head_dim == 64)
    with tuning.asked() as asked:
        y = sdpa_out(arguments, project)
    assert any("/packed" in key for op, key in asked if op == "gemv") == joined
    expected = sdpa_decode_out(**arguments, **project) if joined else linear(x=sdpa_decode_splitk(**arguments), **project)
    assert_bitwise_equal(y, expected)


def test_what_it_does_not_take_is_said():
    arguments, project = case(1, 1, 32, BF16, int4, 64)
    expect_value_error(lambda: sdpa_decode_out(**arguments, **project), "heads of 32", "groups of 64", "whole groups")
    arguments, project = case(1, 1, 64, BF16, int4, 64)
    expect_value_error(
        lambda: sdpa_decode_out(**arguments, **project | {"residual": randn(2, 1, OUTPUTS, seed=1, dtype=BF16)}), "(2, 1, 36)"
    )


def test_what_is_not_finite_stays_so_and_nothing_is_written_outside():
    arguments, project = case(2, 1, 64, BF16, int4, 64)
    arguments["qkv"][1, 0, 64:128] = float("nan")  # the gate of the second sequence's first head
    with guarded_empty():
        y = sdpa_decode_out(**arguments, **project)
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()
