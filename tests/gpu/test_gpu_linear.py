"""`linear` on the device at real shapes. The reference is float32 without TF32 on the same device."""

from __future__ import annotations

import pytest
import torch
from kernels_common import TOLERANCE, Guarded, assert_bitwise_equal, assert_close_ratio, poisoned_empty, randn
from moeexp_kernels.bench import candidates
from moeexp_kernels.ops.linear import GEMV_ROWS, kernel_for, launch_gemv, linear, linear_tile, reference_linear
from moeexp_kernels.ops.linear_tile import launch_tile
from test_kernels_linear import quantised
from tolerances import tolerance

pytestmark = pytest.mark.usefixtures("exact_reference")
SHAPES = [(12352, 2048), (9216, 2048), (2048, 4096), (2048, 512), (1000, 1536)]


GEMM_TOLERANCE = tolerance("gemm")


def check(*, rows, out, features, bits, dtype, group=128, norm=True, residual=True):
    seed = torch.randint(0, 2**31, ()).item()
    x = Guarded(randn(1, rows, features, seed=seed, dtype=dtype))
    weight, scales = quantised(out, features, bits=bits, group=group, seed=seed + 1, dtype=dtype)
    norm_weight = randn(features, seed=seed + 2, scale=0.2) if norm else None
    extra = randn(1, rows, out, seed=seed + 3, dtype=dtype) if residual else None
    arguments = {"weight": weight, "scales": scales, "norm_weight": norm_weight, "eps": 1e-6}
    with poisoned_empty():
        y = linear(x=x.tensor, residual=extra, **arguments)
    wide = reference_linear(x=x.tensor.float(), residual=None if extra is None else extra.float(), **arguments)
    assert_close_ratio(y.float(), wide, (TOLERANCE if rows <= GEMV_ROWS else GEMM_TOLERANCE)[dtype], f"seed {seed}")
    x.check("x")
    for run in range(20):
        assert_bitwise_equal(linear(x=x.tensor, residual=extra, **arguments), y, f"run {run}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("out", "features"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows(rows, out, features, bits, dtype):
    check(rows=rows, out=out, features=features, bits=bits, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("out", "features"), SHAPES)
@pytest.mark.parametrize("rows", [9, 64, 129, 512])
def test_more_rows(rows, out, features, bits, dtype):
    check(rows=rows, out=out, features=features, bits=bits, dtype=dtype)


@pytest.mark.parametrize("group", [32, 48, 64, 96, 192])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_groups(bits, rows, group):
    check(rows=rows, out=300, features=1152, bits=bits, group=group, dtype=torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_head(rows):
    check(rows=rows, out=248320, features=2048, bits=4, dtype=torch.bfloat16, residual=False)


@pytest.mark.parametrize("rows", [1, 16])
def test_offsets_beyond_2_to_the_31(rows):
    """The last outputs of a weight of 2.3e9 stored bytes: an int32 offset would have wrapped."""
    out, features = 1_150_000, 4096
    weight = torch.zeros(out, features // 2, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(out, features // 128, 2, dtype=torch.float16, device="cuda")
    tail, tail_scales = quantised(64, features, bits=4, group=128, seed=1, dtype=torch.bfloat16)
    weight[-64:], scales[-64:] = tail, tail_scales
    x = randn(rows, features, seed=2, dtype=torch.bfloat16)
    y = linear(x=x, weight=weight, scales=scales, norm_weight=None, eps=1e-6, residual=None)
    reference = reference_linear(x=x.float(), weight=tail, scales=tail_scales)
    assert_close_ratio(y[:, -64:].float(), reference, 4e-3)
    assert not y[:, :-64].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gemv_computes_what_the_interpreted_one_does_bitwise(bits, monkeypatch):
    """The PTX path and the one that CI interprets: the same launch, with that one constant changed."""
    from moeexp_kernels.ops import linear as module

    x = randn(1, 2048, seed=1, dtype=torch.bfloat16)
    weight, scales = quantised(512, 2048, bits=bits, group=128, seed=2, dtype=torch.bfloat16)
    outputs = []
    for interpreted in (False, True):

        class Launch:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid, interpreted=interpreted):
                return lambda *arguments, **constants: self.kernel[grid](*arguments, **(constants | {"INTERPRETED": interpreted}))

        monkeypatch.setattr(module, "wrap_triton", Launch)
        y = torch.full((1, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
        launch_gemv(
            x=x, weight=weight, scales=scales, norm_weight=None, eps=1e-6, residual=None, out=y, bits=bits, group=128
        )  # fmt: skip
        outputs.append(y)
    assert_bitwise_equal(outputs[0], outputs[1])


FULL_SHAPES = [*SHAPES[:4], (1024, 2048), (8192, 3072)]  # groups: 16, 32, 4; 24, which is no power of 2


def one_by_one(x, extra, common):
    return torch.cat([linear_tile(x=x[m : m + 1], residual=extra[m : m + 1], **common) for m in range(x.shape[0])])


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (4, torch.float32), (8, torch.bfloat16)])
@pytest.mark.parametrize(("out", "features"), FULL_SHAPES)
def test_a_row_is_the_same_to_the_bit_among_1_to_32_rows(out, features, bits, dtype):
    x, extra = randn(32, features, seed=1, dtype=dtype), randn(32, out, seed=2, dtype=dtype)
    x[5] *= 300.0
    weight, scales = quantised(out, features, bits=bits, group=128, seed=3, dtype=dtype)
    common = {"weight": weight, "scales": scales, "norm_weight": randn(features, seed=4, scale=0.2)}
    alone = one_by_one(x, extra, common)
    for count in range(1, 33):
        for first in {0, 32 - count}:
            rows = slice(first, first + count)
            among = linear_tile(x=x[rows], residual=extra[rows], **common)
            assert_bitwise_equal(among, alone[rows], f"rows {first} to {first + count}")
            served = kernel_for(rows=count, bits=bits, group=128, out_features=out, features=features)
            if served == "tile":
                assert_bitwise_equal(linear(x=x[rows], residual=extra[rows], **common), among, f"linear, {count} rows")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).cuda()
    assert_bitwise_equal(linear_tile(x=x[order], residual=extra[order], **common), alone[order], "in another order")


def test_a_row_of_the_head_is_the_same_to_the_bit_among_1_to_32_rows():
    weight, scales = quantised(248320, 2048, bits=4, group=128, seed=3, dtype=torch.bfloat16)
    x, common = randn(32, 2048, seed=1, dtype=torch.bfloat16), {"weight": weight, "scales": scales}
    alone = torch.cat([linear_tile(x=x[m : m + 1], **common) for m in range(32)])
    for count in (2, 3, 7, 8, 9, 16, 17, 32):
        assert_bitwise_equal(linear_tile(x=x[:count], **common), alone[:count], f"{count} rows")


@pytest.mark.parametrize(("out", "features"), [(12352, 2048), (2048, 4096)])
def test_launch_parameters_of_the_tile_change_no_bit(out, features):
    """Above all the number of warps, over which the groups' sums are joined."""
    x, extra = (randn(19, size, seed=size, dtype=torch.bfloat16) for size in (features, out))
    weight, scales = quantised(out, features, bits=4, group=128, seed=3, dtype=torch.bfloat16)
    outputs = []
    for config in candidates.TILE:
        y = Guarded(torch.full((19, out), float("nan"), dtype=torch.bfloat16, device="cuda"))
        launch_tile(
            x=x, weight=weight, scales=scales, norm_weight=None, eps=0.0, residual=extra, out=y.tensor, bits=4, group=128,
            config=config,
        )  # fmt: skip
        y.check("y")
        outputs.append(y.tensor)
        assert_bitwise_equal(y.tensor, outputs[0], f"{config}")
    wide = reference_linear(x=x.float(), weight=weight, scales=scales, residual=extra.float())
    assert_close_ratio(outputs[0].float(), wide, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_tile_computes_what_the_interpreted_one_does_bitwise(bits, monkeypatch):
    """Without PTX and with the groups' sums in an order that is written out, instead of the one in which warps are joined."""
    from moeexp_kernels.ops import linear_tile as module

    x = randn(5, 2048, seed=1, dtype=torch.bfloat16)
    weight, scales = quantised(512, 2048, bits=bits, group=128, seed=2, dtype=torch.bfloat16)
    outputs, wrap = [], module.wrap_triton
    for changes in ({}, {"INTERPRETED": True, "SPLIT": 1}):

        class Launch:
            def __init__(self, kernel):
                self.kernel = wrap(kernel)

            def __getitem__(self, grid, changes=changes):
                return lambda *arguments, **constants: self.kernel[grid](
                    *arguments, **{k: changes.get(k, v) for k, v in constants.items()}
                )

        monkeypatch.setattr(module, "wrap_triton", Launch)
        y = torch.full((5, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
        launch_tile(
            x=x, weight=weight, scales=scales, norm_weight=None, eps=1e-6, residual=None, out=y, bits=bits, group=128
        )  # fmt: skip
        outputs.append(y)
    assert_bitwise_equal(outputs[0], outputs[1])


@pytest.mark.parametrize("tiles", [2, 8])
def test_tiles_do_not_change_the_result(tiles):
    x = randn(1, 2048, seed=1, dtype=torch.bfloat16)
    weight, scales = quantised(1003, 2048, bits=4, group=128, seed=2, dtype=torch.bfloat16)
    expected = linear(x=x, weight=weight, scales=scales, norm_weight=None, eps=1e-6, residual=None)
    out = Guarded(torch.full((1, 1003), float("nan"), dtype=torch.bfloat16, device="cuda"))
    config = {"BLOCK_N": 16, "TILES": tiles, "CACHE": ".cg", "num_warps": 4, "TOGETHER": 1, "VECTOR": 4}
    launch_gemv(
        x=x, weight=weight, scales=scales, norm_weight=None, eps=1e-6, residual=None, out=out.tensor, bits=4, group=128,
        config=config,
    )  # fmt: skip
    out.check("y")
    assert_close_ratio(out.tensor.float(), expected.float(), 3e-3)


@pytest.mark.parametrize("features, out, together", [(2048, 12352, 2), (4096, 2048, 2), (2048, 1003, 3)])
def test_rows_that_a_program_takes_together_are_those_of_a_program_each(features, out, together):
    x = randn(6, features, seed=1, dtype=torch.bfloat16)
    weight, scales = quantised(out, features, bits=4, group=128, seed=2, dtype=torch.bfloat16)
    arguments = {
        "x": x, "weight": weight, "scales": scales, "norm_weight": randn(features, seed=3), "eps": 1e-6, "bits": 4, "group": 128,
        "residual": randn(6, out, seed=4, dtype=torch.bfloat16),
    }  # fmt: skip
    outputs = []
    for count in (1, together):
        y = Guarded(torch.full((6, out), float("nan"), dtype=torch.bfloat16, device="cuda"))
        config = {"BLOCK_N": 16, "TILES": 3, "CACHE": ".cg", "num_warps": 8, "TOGETHER": count, "VECTOR": 4}
        launch_gemv(**arguments, out=y.tensor, config=config)
        y.check("y")
        outputs.append(y.tensor)
    assert_bitwise_equal(*outputs)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_in_a_cuda_graph(rows):
    x = randn(rows, 2048, seed=1, dtype=torch.bfloat16)
    weight, scales = quantised(512, 2048, bits=4, group=128, seed=2, dtype=torch.bfloat16)
    arguments = {"weight": weight, "scales": scales, "norm_weight": randn(2048, seed=3), "eps": 1e-6, "residual": None}
    eager = linear(x=x, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x=x, **arguments)
    y.fill_(float("nan"))
    graph.replay()
    assert_bitwise_equal(y, eager)


def test_export_keeps_the_row_count_symbolic_and_compiles():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, scales = quantised(256, 512, bits=4, group=128, seed=2, dtype=torch.bfloat16)
            self.register_buffer("weight", weight)
            self.register_buffer("scales", scales)
            self.register_buffer("norm", randn(512, seed=3))

        def forward(self, x):
            return linear(x=x, weight=self.weight, scales=self.scales, norm_weight=self.norm, eps=1e-6, residual=None)

    model = Model()
    shapes = ({1: torch.export.Dim("T", min=1, max=2048)},)
    program = torch.export.export(model, (randn(1, 12, 512, seed=1, dtype=torch.bfloat16),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
    for tokens in (1, 7, 300):
        x = randn(1, tokens, 512, seed=tokens, dtype=torch.bfloat16)
        assert_close_ratio(package(x).float(), model(x).float(), 4e-3, f"T={tokens}")
