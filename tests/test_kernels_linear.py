"""`linear` against `reference_linear`, in Triton's interpreter or on the device. Real shapes: gpu/."""

from __future__ import annotations

import pytest
import torch
from kernels_common import (
    DEVICE,
    Guarded,
    assert_bitwise_equal,
    assert_close_ratio,
    expect_value_error,
    poisoned_empty,
    randn,
)
from moeexp_kernels.ops.linear import (
    GEMV_ROWS,
    MIDDLE_CODE,
    few_rows,
    flat_rows,
    gemv_config,
    launch_gemv,
    linear,
    reference_linear,
)
from moeexp_kernels.parts.prefetch import AHEAD_BYTES, ahead_lengths
from tolerances import tolerance
from torch import Tensor

TOLERANCE = tolerance("one rounding")


def quantised(*shape: int, bits: int, group: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Random weight [..., N, K] of standard deviation ~1/sqrt(K) in a stored format (16 bits: plain, in dtype)."""
    features = shape[-1]
    if bits == 16:
        return randn(*shape, seed=seed, dtype=dtype, scale=features**-0.5), None
    generator = torch.Generator().manual_seed(seed)
    stored = features // 2 if bits == 4 else features
    weight = torch.randint(0, 256, (*shape[:-1], stored), generator=generator, dtype=torch.uint8)
    scales = torch.rand(*shape[:-1], features // group, 2, generator=generator)
    scales[..., 0] = (0.5 + scales[..., 0]) * features**-0.5 / MIDDLE_CODE[bits]
    scales[..., 1] = (scales[..., 1] - 0.5) * 0.2 * features**-0.5
    return weight.to(DEVICE), scales.to(device=DEVICE, dtype=torch.float16)


def check(*, rows: tuple[int, ...], out: int, features: int, bits: int, group: int, dtype, norm=True, residual=True):
    x = Guarded(randn(*rows, features, seed=1, dtype=dtype))
    weight, scales = quantised(out, features, bits=bits, group=group, seed=2, dtype=dtype)
    stored, pairs = Guarded(weight), None if scales is None else Guarded(scales)
    arguments = {
        "weight": stored.tensor,
        "scales": None if pairs is None else pairs.tensor,
        "norm_weight": randn(features, seed=3, scale=0.2) if norm else None,
        "eps": 1e-6,
        "residual": randn(*rows, out, seed=4, dtype=dtype) if residual else None,
    }
    with poisoned_empty():
        y = linear(x=x.tensor, **arguments)
    assert y.dtype == dtype
    wide = {k: v.float() if k == "residual" and v is not None else v for k, v in arguments.items()}
    assert_close_ratio(y.float(), reference_linear(x=x.tensor.float(), **wide), TOLERANCE[dtype], f"{bits} bits")
    x.check("x")
    stored.check("weight")


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_one_row(bits):
    check(rows=(1, 1), out=20, features=128, bits=bits, group=64, dtype=torch.float32)


@pytest.mark.parametrize("bits", [4, 16])
def test_bfloat16(bits):
    check(rows=(2,), out=12, features=64, bits=bits, group=32, dtype=torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_many_rows(bits):
    check(rows=(3, 7), out=70, features=96, bits=bits, group=32, dtype=torch.float32)


def test_many_rows_bfloat16():
    check(rows=(9,), out=24, features=96, bits=4, group=48, dtype=torch.bfloat16, norm=False)


@pytest.mark.parametrize("rows", [GEMV_ROWS, GEMV_ROWS + 1])
def test_both_kernels_at_their_border(rows):
    check(rows=(rows,), out=5, features=64, bits=4, group=32, dtype=torch.float32, norm=False, residual=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, 24), (4, 48), (8, 4), (8, 12), (8, 96), (16, 96)])
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_groups_and_odd_sizes(rows, bits, group, dtype):
    """Groups that are no power of 2, a feature count that is none, outputs that fill no tile."""
    check(rows=(rows,), out=13, features=96, bits=bits, group=group, dtype=dtype, residual=rows == 3)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [1, 3])
def test_several_tiles_a_program(tiles):
    """The prefetch of the next tile reads nothing beyond the last row, and the result does not depend on the split."""
    x, norm = randn(1, 64, seed=1), randn(64, seed=3, scale=0.2)
    weight, scales = quantised(21, 64, bits=4, group=32, seed=2, dtype=torch.float32)
    guarded, outputs = Guarded(weight), []
    for block, count in ((4, 1), (4, tiles), (8, tiles)):
        out = Guarded(torch.full((1, 21), float("nan"), device=DEVICE))
        launch_gemv(
            x=x, weight=guarded.tensor, scales=scales, norm_weight=norm, eps=1e-6, residual=None, out=out.tensor,
            bits=4, group=32, config={"BLOCK_N": block, "TILES": count, "CACHE": "", "num_warps": 4},
        )  # fmt: skip
        out.check("y")
        outputs.append(out.tensor)
    for other in outputs[1:]:
        assert_bitwise_equal(other, outputs[0])


@pytest.mark.parametrize(("bits", "places"), [(4, 8), (8, 4)])
def test_every_code_is_exact_in_every_place_of_a_word(bits, places):
    """All 256 bytes, picked out by a one-hot input: the weights' conversion loses no bit."""
    features, group = 64, 32
    weight = torch.arange(256, dtype=torch.uint8).view(-1, 1).repeat(1, features * bits // 8).to(DEVICE)
    scales = torch.tensor([1.0, 0.0]).repeat(256, 2, 1).to(device=DEVICE, dtype=torch.float16)
    for place in range(places):
        x = torch.zeros(1, features, device=DEVICE)
        x[0, place if place < 4 else group // 2 + place - 4] = 1.0
        y = torch.full((1, 256), float("nan"), device=DEVICE)
        launch_gemv(
            x=x, weight=weight, scales=scales, norm_weight=None, eps=0.0, residual=None, out=y, bits=bits, group=group,
            config={"BLOCK_N": 256, "TILES": 1, "CACHE": "", "num_warps": 4},
        )  # fmt: skip
        assert torch.equal(y, reference_linear(x=x, weight=weight, scales=scales)), f"place {place}"


def test_zero_rows_stay_zero_and_empty_is_empty():
    weight, scales = quantised(12, 64, bits=4, group=32, seed=2, dtype=torch.float32)
    norm = randn(64, seed=3)
    for rows in (1, 9):
        x = torch.zeros(rows, 64, device=DEVICE)
        y = linear(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=None)
        assert torch.equal(y, torch.zeros_like(y))
    empty = linear(x=x[:0], weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=None)
    assert empty.shape == (0, 12)


def test_a_symbolic_row_count_is_never_guarded_on():
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(5, ConstantSource("T"))
    rows = env.create_symintnode(symbol, hint=5)
    assert not few_rows(rows) and few_rows(5) and not few_rows(GEMV_ROWS + 1)
    assert not env.guards


def test_unsupported_inputs_name_what_is_supported():
    weight, scales = quantised(8, 64, bits=4, group=32, seed=2, dtype=torch.float32)
    x = randn(1, 64, seed=1)

    def call(**changes):
        arguments = {"x": x, "weight": weight, "scales": scales, "norm_weight": None, "eps": 1e-6, "residual": None}
        return lambda: linear(**(arguments | changes))

    expect_value_error(call(x=randn(1, 128, seed=1)[:, ::2]), "x", "contiguous")
    expect_value_error(call(weight=weight.t().contiguous().t()), "weight", "contiguous")
    expect_value_error(call(x=x.double()), "float64", "bfloat16")
    expect_value_error(call(weight=weight.to(torch.int8), scales=None, x=randn(1, 32, seed=1)), "int8", "supported")
    expect_value_error(call(residual=randn(1, 9, seed=1)), "residual", "8")
    small_weight, small_scales = quantised(8, 64, bits=4, group=4, seed=2, dtype=torch.float32)
    expect_value_error(call(weight=small_weight, scales=small_scales), "groups of 4", "multiples of 8")
    expect_value_error(lambda: flat_rows(randn(2, 4, 6, seed=1).transpose(0, 1), name="x", features=6), "x", "strides")


def test_weights_ahead_have_no_part_in_the_result():
    weight, scales = quantised(12, 64, bits=4, group=32, seed=2, dtype=torch.float32)
    next_weight, next_scales = quantised(40, 96, bits=4, group=32, seed=3, dtype=torch.float32)
    arguments = {"x": randn(2, 64, seed=1), "weight": weight, "scales": scales}
    told = linear(**arguments, ahead=next_weight, ahead_scales=next_scales)
    assert_bitwise_equal(told, linear(**arguments), "ahead")
    strided = next_weight.t().contiguous().t()
    expect_value_error(lambda: linear(**arguments, ahead=strided), "ahead", "contiguous")


@pytest.mark.parametrize(
    ("shape", "bits", "share"),
    [((12352, 2048), 4, 1.0), ((12352, 2048), 16, 16 * 2**20 / (12352 * 4096)), ((3, 10), 16, 0.8), ((1, 2**26), 8, 0.0)],
)
def test_what_is_brought_ahead_are_whole_rows_up_to_a_limit(shape, bits, share):
    rows, features = shape
    dtype, length = (torch.bfloat16, features) if bits == 16 else (torch.uint8, features * bits // 8)
    weight = torch.empty(rows, length, dtype=dtype, device="meta")
    scales = None if bits == 16 else torch.empty(rows, features // 128, 2, dtype=torch.float16, device="meta")
    lengths = ahead_lengths(weight, scales)
    assert sum(lengths) <= AHEAD_BYTES and all(length % 16 == 0 for length in lengths)
    assert lengths[0] == pytest.approx(share * weight.nbytes, rel=1e-3)
    assert lengths[1] == (0 if scales is None else pytest.approx(share * scales.nbytes, rel=1e-3))
    assert ahead_lengths(None, None) == (0, 0)


def test_every_tuned_shape_is_a_power_of_two_tile():
    for bits, rows, features in [(4, 12352, 2048), (4, 7, 64), (16, 256, 2048), (32, 3, 8192), (8, 2048, 512)]:
        block = gemv_config(bits=bits, rows=rows, in_features=features)["BLOCK_N"]
        assert block >= 1 and block & (block - 1) == 0
