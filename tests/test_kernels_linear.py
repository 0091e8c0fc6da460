"""`linear` against `reference_linear`, in Triton's interpreter or on the device. Real shapes: gpu/."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernels_common import (
    DEVICE,
    Guarded,
    assert_bitwise_equal,
    assert_close_ratio,
    expect_value_error,
    guarded_empty,
    randn,
)
from moeexp_kernels.ops.linear import (
    GEMV_ROWS,
    MIDDLE_CODE,
    dequantise,
    few_rows,
    flat_rows,
    gemv_config,
    kernel_for,
    launch_gemv,
    linear,
    linear_tile,
    reference_linear,
    rms_norm,
)
from moeexp_kernels.ops.linear_tile import launch_limbs, launch_tile
from moeexp_kernels.ops.matmul import dequantised
from moeexp_kernels.parts import tuning
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
    with guarded_empty():
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
            bits=4, group=32, config={"BLOCK_N": block, "TILES": count, "CACHE": "", "num_warps": 4, "TOGETHER": 1, "VECTOR": 4},
        )  # fmt: skip
        out.check("y")
        outputs.append(out.tensor)
    for other in outputs[1:]:
        assert_bitwise_equal(other, outputs[0])


@pytest.mark.parametrize(("bits", "together"), [pytest.param(4, 2, marks=pytest.mark.slow), (8, 3), (16, 6)])
def test_rows_that_a_program_takes_together_are_those_of_a_program_each(bits, together):
    x, extra, norm = randn(6, 64, seed=1), randn(6, 21, seed=4), randn(64, seed=3, scale=0.2)
    weight, scales = quantised(21, 64, bits=bits, group=32, seed=2, dtype=torch.float32)
    outputs = []
    for count in (1, together):
        out = Guarded(torch.full((6, 21), float("nan"), device=DEVICE))
        launch_gemv(
            x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=extra, out=out.tensor,
            bits=32 if bits == 16 else bits, group=64 if bits == 16 else 32,
            config={"BLOCK_N": 4, "TILES": 2, "CACHE": "", "num_warps": 4, "TOGETHER": count, "VECTOR": 4},
        )  # fmt: skip
        out.check("y")
        outputs.append(out.tensor)
    assert_bitwise_equal(*outputs)
    reference = reference_linear(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=extra)
    assert_close_ratio(outputs[0], reference, 1e-4, "linear")


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
            config={"BLOCK_N": 256, "TILES": 1, "CACHE": "", "num_warps": 4, "TOGETHER": 1, "VECTOR": 4},
        )  # fmt: skip
        assert torch.equal(y, reference_linear(x=x, weight=weight, scales=scales)), f"place {place}"


# --- the tile: 2 to 32 rows ---

TILE = {"BLOCK_N": 16, "COLUMNS": 8, "TILES": 1, "PASSES": 1, "CACHE": "", "num_warps": 4}


def served_by(rows, *, bits, group, shape=(27, 384), arch="cpu", **always):
    return kernel_for(rows=rows, bits=bits, group=group, out_features=shape[0], features=shape[1], arch=arch, **always)


@pytest.mark.parametrize(
    ("rows", "bits", "group", "dtype"),
    [
        (2, 4, 128, torch.bfloat16), (3, 4, 64, torch.float32), (8, 8, 128, torch.float32), (9, 8, 64, torch.bfloat16),
        (17, 4, 128, torch.float32), (32, 4, 64, torch.bfloat16), (2, 8, 128, torch.float16),
    ],
)  # fmt: skip
def test_several_rows_share_one_read_of_the_weights(rows, bits, group, dtype):
    """Three groups, which are no power of 2, and outputs that fill no tile."""
    assert served_by(rows, bits=bits, group=group) == "tile"
    check(rows=(rows,), out=27, features=3 * group, bits=bits, group=group, dtype=dtype, residual=rows % 2 == 1)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 48), (8, 16), (16, 48)])
def test_very_many_rows_multiply_a_weight_that_is_dequantised_in_memory(bits, group):
    with tuning.override("linear_rows", "", {"TILE_FROM": 2, "GEMM_FROM": 3, "MATMUL_FROM": 9}):
        assert served_by(9, bits=bits, group=group) == "matmul"
        for residual in (False, True):
            check(rows=(2, 11), out=27, features=96, bits=bits, group=group, dtype=torch.bfloat16, residual=residual)
    weight, scales = quantised(20, 96, bits=bits, group=group, seed=2, dtype=torch.bfloat16)
    wide = dequantised(weight=weight, scales=scales, features=96, bits=bits, group=group, dtype=torch.bfloat16)
    exact = dequantise(weight=weight, scales=scales, in_features=96)
    if DEVICE == "cuda":
        assert torch.equal(wide, exact.bfloat16()), "rounded once"
    assert ((wide.float() - exact).abs() <= exact.abs() * 2**-7).all(), "Triton's interpreter truncates"


@pytest.mark.parametrize("norm", [True, False])
def test_one_row_may_go_to_the_tile_too(norm):
    x, norm_weight = randn(1, 1, 256, seed=1), randn(256, seed=3, scale=0.2) if norm else None
    weight, scales = quantised(20, 256, bits=4, group=128, seed=2, dtype=torch.float32)
    y = linear_tile(x=x, weight=weight, scales=scales, norm_weight=norm_weight, residual=None)
    expected = reference_linear(x=x, weight=weight, scales=scales, norm_weight=norm_weight)
    assert_close_ratio(y, expected, TOLERANCE[torch.float32])


def test_which_kernel_serves():
    def kernels(bits, group, *rows, **always):
        return [served_by(count, bits=bits, group=group, **always) for count in rows]

    assert kernels(4, 128, 1, 2, 32, 33) == ["gemv", "tile", "tile", "gemm"]
    assert kernels(8, 64, 1, 2, 32, 33, always=True) == ["tile", "tile", "tile", "gemm"]
    for bits, group in ((4, 32), (8, 256), (16, 2048), (32, 128)):
        assert kernels(bits, group, 1, 2, GEMV_ROWS, GEMV_ROWS + 1, always=True) == ["gemv", "gemv", "gemv", "gemm"]


def test_the_table_says_which_rows_of_a_shape_go_to_the_tile():
    def kernels(*rows, arch="sm_90", shape=(12352, 2048), **always):
        return [served_by(count, bits=4, group=128, shape=shape, arch=arch, **always) for count in rows]

    assert kernels(1, 2, 3, 32, 33) == ["gemv", "gemv", "tile", "tile", "gemm"]
    assert kernels(2, 24, 25, 32, shape=(248320, 2048)) == ["tile", "tile", "gemm", "gemm"]
    assert kernels(511, 512) == ["gemm", "matmul"] and kernels(512, half=False) == ["gemm"]
    assert kernels(512, shape=(248320, 2048)) == ["gemm"], "a vocabulary is not dequantised in memory"
    assert kernels(1, 2, 32, always=True) == ["tile", "tile", "tile"], "the op linear_tile asks no table"
    with tuning.override("linear_rows", "int4/12352x2048", {"TILE_FROM": 5, "GEMM_FROM": 7, "MATMUL_FROM": 9}):
        assert kernels(4, 5, 6, 7, 8, 9) == ["gemv", "tile", "tile", "gemv", "gemv", "matmul"]


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(4, torch.bfloat16), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in [(4, torch.float32), (8, torch.bfloat16)])],
)
def test_a_row_is_the_same_to_the_bit_alone_and_among_any_others(bits, dtype):
    weight, scales = quantised(24, 192, bits=bits, group=64, seed=2, dtype=dtype)
    x, extra = randn(32, 192, seed=1, dtype=dtype), randn(32, 24, seed=4, dtype=dtype)
    x[5] *= 300.0  # a neighbour of another size
    common = {"weight": weight, "scales": scales, "norm_weight": randn(192, seed=3, scale=0.2)}
    alone = torch.cat([linear_tile(x=x[m : m + 1], residual=extra[m : m + 1], **common) for m in range(32)])
    for first, count in ((0, 32), (0, 2), (3, 8), (3, 9), (14, 17)):
        rows = slice(first, first + count)
        among = linear_tile(x=x[rows], residual=extra[rows], **common)
        assert_bitwise_equal(among, alone[rows], f"rows {first} to {first + count}")


@pytest.mark.parametrize(
    "change",
    [{"COLUMNS": 16}, {"COLUMNS": 32}, {"BLOCK_N": 32}, {"PASSES": 2}, {"COLUMNS": 16, "TILES": 3},
     {"COLUMNS": 16, "TILES": 2, "PASSES": 2}, {"num_warps": 8}],
)  # fmt: skip
@pytest.mark.parametrize("features", [pytest.param(512, marks=pytest.mark.slow), 192])
def test_launch_parameters_of_the_tile_change_no_bit(change, features):
    """Eight groups; three, which are padded to four, of which the last lies beyond the row."""
    x, extra = randn(11, features, seed=1), randn(11, 21, seed=4)
    weight, scales = quantised(21, features, bits=4, group=64, seed=2, dtype=torch.float32)
    outputs = []
    for config in (TILE, TILE | change):
        out = Guarded(torch.full((11, 21), float("nan"), device=DEVICE))
        with guarded_empty():
            launch_tile(
                x=x, weight=weight, scales=scales, norm_weight=None, eps=0.0, residual=extra, out=out.tensor, bits=4,
                group=64, config=config,
            )  # fmt: skip
        out.check("y")
        outputs.append(out.tensor)
    assert outputs[0].isfinite().all()
    assert_bitwise_equal(outputs[1], outputs[0])


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_code_is_exact_on_the_tile(bits):
    """All 256 bytes, picked out by one-hot inputs at the places of a 16-byte load and where the next thread's begins."""
    features, group = 128, 128
    weight = torch.arange(256, dtype=torch.uint8).view(-1, 1).repeat(1, features * bits // 8).to(DEVICE)
    scales = torch.tensor([1.0, 0.25]).repeat(256, 1, 1).to(device=DEVICE, dtype=torch.float16)
    places = [*range(17), 47, 63, 64, 79, 80, 127]
    x = torch.zeros(len(places), features, device=DEVICE)
    x[range(len(places)), places] = 32639.0  # so that the unit is 1
    y = linear(x=x, weight=weight, scales=scales)
    assert served_by(len(places), bits=bits, group=group) == "tile"
    assert torch.equal(y, reference_linear(x=x, weight=weight, scales=scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_limbs_hold_the_normed_activations(dtype):
    x, norm = randn(3, 192, seed=1, dtype=dtype), randn(192, seed=3, scale=0.2)
    x[0, 64:128] = 0.0  # a group without a largest
    x[1, :64] = 3.0e4 * x[1, :64].sign()  # all at a limb's end
    with guarded_empty():
        limbs, units = launch_limbs(x=x, norm_weight=norm, eps=1e-6, group=64)
    digits = limbs.double().view(3, -1, 3, 64)
    integers = 256 * digits[:, 0] + digits[:, 1]
    assert integers.abs().max() == 32639
    if dtype == torch.float32:
        integers = integers + digits[:, 2] / 254
    unit, total = units.double().unbind(-1)
    held, wanted = (integers * unit[..., None]).flatten(1), rms_norm(x=x, weight=norm, eps=1e-6).double()
    largest = wanted.view(3, 3, 64).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert ((held - wanted).view(3, 3, 64).abs() / largest).max() < (2.5e-7 if dtype == torch.float32 else 1.6e-5)
    assert_close_ratio(total.float(), held.view(3, 3, 64).sum(-1).float(), 1e-6, "totals")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_so_alone(bad):
    x = randn(4, 192, seed=1)
    x[2, 70] = bad
    weight, scales = quantised(20, 192, bits=4, group=64, seed=2, dtype=torch.float32)
    y = linear(x=x, weight=weight, scales=scales)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_the_table_serves_every_width_of_the_tile():
    for key in ("int4/12352x2048/8", "int8/64x64/32"):
        row = tuning.lookup("linear_tile", key, "sm_90")
        assert set(row) == set(TILE) and row["BLOCK_N"] % 16 == 0 and row["COLUMNS"] in (8, 16, 32)


# --- every kernel ---


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


def test_every_tuned_shape_is_a_power_of_two_tile():
    for bits, rows, features in [(4, 12352, 2048), (4, 7, 64), (16, 256, 2048), (32, 3, 8192), (8, 2048, 512)]:
        block = gemv_config(bits=bits, rows=rows, in_features=features)["BLOCK_N"]
        assert block >= 1 and block & (block - 1) == 0


# In a process without Triton's interpreter, through whose kernels no trace can pass.
TRACED = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget
from moeexp_kernels.ops import linear_tile
from moeexp_kernels.ops.linear import linear

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Layer(torch.nn.Module):
    def forward(self, x, weight, scales, norm, residual):
        return (linear(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=residual),)

triton.runtime.driver.set_active(Driver())
linear_tile.has_pdl = lambda tensor: True  # as on Hopper, where the kernels have instructions of their own
half = {"dtype": torch.bfloat16}
inputs = (
    torch.zeros(5, 1, 2048, **half), torch.zeros(64, 1024, dtype=torch.uint8), torch.zeros(64, 16, 2, dtype=torch.float16),
    torch.zeros(2048), torch.zeros(5, 1, 64, **half),
)
with torch.no_grad():
    graph, _ = aot_export_module(Layer(), inputs, trace_joint=False)
table, written = triton_kernel_wrap.kernel_side_table, {}
for node in graph.graph.nodes:
    if "triton_kernel_wrapper" in str(node.target):
        written[table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__] = sorted(node.kwargs["tensors_to_clone"])
print(written)
assert written == {"limbs_kernel": ["limbs_ptr", "units_ptr"], "linear_tile_kernel": ["y_ptr"]}, written
"""


@pytest.mark.slow
def test_a_trace_sees_what_the_tiles_kernels_write_and_nothing_else():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", TRACED], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
