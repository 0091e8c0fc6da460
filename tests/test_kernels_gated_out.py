"""A delta net's step joined to its output projection: as the two by themselves, and the same states to the bit."""

from __future__ import annotations

import pytest
import torch
from kernels_common import (
    DEVICE,
    assert_bitwise_equal,
    assert_close_ratio,
    expect_value_error,
    guarded_empty,
    poisoned_empty,
    randn,
)
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_out import gdn_decode_out
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.ops.mixed import gdn_out
from moeexp_kernels.parts import tuning
from test_kernels_gated_delta import set_tuned
from test_kernels_mixed import delta_net, int4, own
from tolerances import tolerance

F32, BF16 = torch.float32, torch.bfloat16
STATES = ("conv_state", "recurrent_state")
FEW = {"TILE_FROM": 4, "GEMM_FROM": 33, "MATMUL_FROM": None}


def int8(rows, features, group):
    generator = torch.Generator().manual_seed(9)
    weight = torch.randint(0, 256, (rows, features), generator=generator, dtype=torch.uint8).to(DEVICE)
    return weight, randn(rows, features // group, 2, seed=8, scale=features**-0.5 / 64).half()


def both(arguments, weight, scales, outputs):
    """(y, arguments after the step) of the two ops one after the other, and of the one."""
    rows = arguments["proj"].shape[:2]
    residual = randn(*rows, outputs, seed=10, dtype=arguments["proj"].dtype)
    apart, joined = own(arguments), own(arguments)
    expected = linear(x=gdn_decode(**apart), weight=weight, scales=scales, residual=residual)
    with poisoned_empty(), tuning.asked() as asked:
        y = gdn_decode_out(**joined, weight=weight, scales=scales, residual=residual)
    return (expected, apart), (y, joined), asked


HEADS = [((16, 64), 64, int4), ((16, 128), 64, int4), ((16, 128), 128, int8)]  # dims, group, weight
QUICK = {(F32, 1, 1, 64), (BF16, 1, 2, 128)}  # dtype, batch, tokens, group


def case(dtype, rows, heads):
    slow = () if (dtype, *rows, heads[1]) in QUICK and heads[0] != (16, 64) else pytest.mark.slow
    return pytest.param(dtype, *rows, *heads, marks=slow)


@pytest.mark.parametrize(
    ("dtype", "batch", "tokens", "dims", "group", "make"),
    [case(dtype, rows, heads) for dtype in (F32, BF16) for rows in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 5)) for heads in HEADS],
)
def test_it_is_the_delta_net_and_then_the_projection(dtype, batch, tokens, dims, group, make):
    """Heads of one group and of two; more tokens than the conv state holds; rows that are no whole blocks."""
    outputs = 36
    arguments = delta_net(batch, tokens, dims, dtype)
    (expected, apart), (y, joined), asked = both(arguments, *make(outputs, 2 * dims[1], group), outputs)
    assert [op for op, _ in asked if op == "gemv"], "the joined kernel"
    assert y.dtype == dtype
    assert_close_ratio(y, expected, tolerance("one rounding")[dtype] * (1 if dtype == F32 else 2), "y")
    for name in STATES:
        assert_bitwise_equal(joined[name], apart[name], name)
        assert not torch.equal(joined[name], arguments[name]), f"{name} moves on"


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 4, 8])
def test_every_number_of_parts_of_a_head_s_sum(monkeypatch, split):
    set_tuned(monkeypatch, split=split)
    arguments = delta_net(2, 1, (16, 64), F32)
    (expected, _), (y, _), _ = both(arguments, *int4(36, 128), 36)
    assert_close_ratio(y, expected, tolerance("one rounding")[F32], f"{split} parts")


def test_a_row_is_the_same_beside_others():
    arguments = delta_net(2, 1, (16, 64), BF16)
    weight, scales = int4(36, 128)
    _, (y, _), _ = both(arguments, weight, scales, 36)
    alone = {name: value[:1] if name in ("proj", *STATES) else value for name, value in own(arguments).items()}
    residual = randn(2, 1, 36, seed=10, dtype=BF16)[:1]
    assert_bitwise_equal(gdn_decode_out(**alone, weight=weight, scales=scales, residual=residual), y[:1], "the first row")


@pytest.mark.parametrize("dims", [(16, 32), *(pytest.param(dims, marks=pytest.mark.slow) for dims in ((16, 96), (16, 64)))])
def test_heads_that_are_no_whole_groups_have_a_kernel_for_their_norm(dims):
    """Half a group, one and a half, and one, of which the projection's kernel takes care."""
    arguments = delta_net(1, 1, dims, BF16)
    weight, scales = int4(36, 2 * dims[1], 64)
    project = {"weight": weight, "scales": scales, "residual": randn(1, 1, 36, seed=10, dtype=BF16)}
    with tuning.override("gdn_out", "", {"UP_TO": 1}), tuning.override("linear_rows", "", FEW):
        y = gdn_out(own(arguments), project)
    fits = dims[1] == 64
    kind = gdn_decode_out(**own(arguments), **project) if fits else linear(x=gdn_decode(**own(arguments)), **project)
    assert_bitwise_equal(y, kind, "y")
    if not fits:
        expect_value_error(lambda: gdn_decode_out(**own(arguments), **project), f"heads of {dims[1]}")


def test_what_is_not_finite_stays_so_and_nothing_is_written_outside():
    arguments = delta_net(2, 1, (16, 64), BF16)
    arguments["proj"][1, 0, -5] = float("nan")  # a z of the second sequence
    weight, scales = int4(36, 128)
    residual = randn(2, 1, 36, seed=10, dtype=BF16)
    with guarded_empty():
        y = gdn_decode_out(**own(arguments), weight=weight, scales=scales, residual=residual)
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()
