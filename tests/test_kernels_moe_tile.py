"""Experts on int8 tensor cores against the reference, interpreted or on the device. Real shapes: gpu/test_gpu_moe.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernels_common import DEVICE, assert_bitwise_equal, poisoned_empty, randn
from moeexp_kernels.ops import moe
from moeexp_kernels.ops.moe import moe_decode, moe_decode_tile
from moeexp_kernels.parts import tuning
from test_kernels_moe import check_experts, choices, experts

TILE_SHAPE = {"D": 128, "E": 7, "width": 128, "shared": 128, "group": 64}
TILE_ROW = {
    "FROM": 1, "gate_up": {"BLOCK_I": 64, "PASSES": 1, "CACHE": "", "num_warps": 4},
    "down": {"BLOCK_D": 128, "PASSES": 1, "CACHE": "", "num_warps": 4},
    "combine": {"BLOCK_D": 256, "num_warps": 4},
}  # fmt: skip


@pytest.fixture
def few_programs():
    """The interpreter's time is that of the programs: few large ones."""
    with tuning.override("moe_tile", "", TILE_ROW):
        yield


def tile_arguments(rows, *, k=3, bits=4, dtype=torch.float32, seed=0, **shape):
    shape = TILE_SHAPE | shape
    x = randn(1, rows, shape["D"], seed=1, dtype=dtype)
    return {"x": x, **experts(**shape, bits=bits, dtype=dtype), **choices(1, rows, k=k, E=shape["E"], seed=seed)}


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("rows", "bits", "k", "dtype"),
    [
        (1, 4, 1, torch.float32),
        (3, 8, 3, torch.bfloat16),
        pytest.param(9, 4, 7, torch.float32, marks=pytest.mark.slow),
        pytest.param(20, 4, 3, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_tile_computes_the_experts(rows, bits, k, dtype):
    """One token to three blocks of tokens, an expert with more than 8 of them (k = 7: all have all), k that is no power of 2."""
    check_experts(moe_decode_tile, rows=(1, rows), k=k, bits=bits, dtype=dtype, **TILE_SHAPE)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_experts_of_another_width_in_odd_sizes_on_the_tile():
    """Rows that fill no tile, three groups."""
    check_experts(moe_decode_tile, rows=(5, 2), D=192, E=5, k=2, width=192, shared=192, group=64)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("first", [0, 23])
def test_all_tokens_to_the_same_experts_on_the_tile(first):
    rows = 32 - first
    ids = torch.tensor([4, 0, 6], dtype=torch.int32, device=DEVICE).expand(1, rows, 3).contiguous()
    routing = {"ids": ids, "weights": torch.full((1, rows, 3), 0.3, device=DEVICE)}
    check_experts(moe_decode_tile, rows=(1, rows), k=3, routing=routing, **TILE_SHAPE)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_experts_is_the_same_to_the_bit_among_any_others(dtype):
    arguments = tile_arguments(32, dtype=dtype)
    arguments["x"][0, 5] *= 300.0
    per_token = ("x", "ids", "weights")

    def some(rows):
        return moe_decode_tile(**(arguments | {name: arguments[name][:, rows].contiguous() for name in per_token}))

    whole = some(slice(0, 32))
    for rows in (slice(5, 6), slice(0, 2), slice(3, 11), slice(3, 12), slice(20, 32)):
        assert_bitwise_equal(some(rows), whole[:, rows], f"{rows}")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert_bitwise_equal(some(order), whole[:, order], "in another order")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [("gate_up", {"BLOCK_I": 8}), ("gate_up", {"PASSES": 2}), ("down", {"BLOCK_D": 32}),
     ("down", {"PASSES": 2}), ("combine", {"BLOCK_D": 64})],
)  # fmt: skip
def test_launch_parameters_of_the_experts_tile_change_no_bit(change):
    arguments, (kernel, values) = tile_arguments(11), change
    with tuning.override("moe_tile", "", TILE_ROW), poisoned_empty():
        before = moe_decode_tile(**arguments)
    with tuning.override("moe_tile", "", TILE_ROW | {kernel: TILE_ROW[kernel] | values}), poisoned_empty():
        assert_bitwise_equal(moe_decode_tile(**arguments), before, f"{change}")


def test_the_table_says_how_many_tokens_go_to_the_experts_tile(monkeypatch):
    launched = []
    monkeypatch.setattr(moe, "launch_pairs", lambda **_: launched.append("pairs"))
    monkeypatch.setattr(moe, "launch_moe_tile", lambda **_: launched.append("tile"))

    def served(rows, op=moe_decode, **arguments):
        op(**tile_arguments(rows, **arguments))
        return launched.pop()

    with tuning.override("moe_tile", "int4/128x128", TILE_ROW | {"FROM": 3}):
        assert [served(rows) for rows in (1, 2, 3, 32, 33)] == ["pairs", "pairs", "tile", "tile", "pairs"]
        assert [served(rows, moe_decode_tile) for rows in (1, 32, 33)] == ["tile", "tile", "pairs"]
        for other in ({"shared": 64}, {"group": 32}, {"bits": (4, 8)}, {"bits": 16}):
            assert served(3, moe_decode_tile, **other) == "pairs", other


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_so_alone_on_the_tile(bad):
    arguments = tile_arguments(9)
    arguments["x"][0, 4, 70] = bad
    y = moe_decode_tile(**arguments)
    assert y[0, 4].isnan().all() and y[0, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


# In a process without Triton's interpreter, through whose kernels no trace can pass.
TRACED = """
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget
from moeexp_kernels.ops import linear_tile, moe_tile
from moeexp_kernels.ops.moe import moe_decode_tile

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Layer(torch.nn.Module):
    def forward(self, x, norm, *others):
        return (moe_decode_tile(x, norm, 1e-6, *others),)

def stored(*shape):
    scales = torch.zeros(*shape[:-1], shape[-1] // 128, 2, dtype=torch.float16)
    return torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8), scales

triton.runtime.driver.set_active(Driver())
linear_tile.has_pdl = moe_tile.has_pdl = lambda tensor: True  # as on Hopper
inputs = (
    torch.zeros(9, 1, 256, dtype=torch.bfloat16), torch.zeros(256), torch.zeros(9, 1, 2, dtype=torch.int32), torch.zeros(9, 1, 2),
    *stored(4, 256, 256), *stored(4, 256, 128), *stored(256, 256), *stored(256, 128), torch.zeros(1, 256, dtype=torch.bfloat16),
)
with torch.no_grad():
    graph, _ = aot_export_module(Layer(), inputs, trace_joint=False)
table, written = triton_kernel_wrap.kernel_side_table, []
for node in graph.graph.nodes:
    if "triton_kernel_wrapper" in str(node.target):
        written.append((table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__, *sorted(node.kwargs["tensors_to_clone"])))
assert written == [
    ("limbs_kernel", "gates_ptr", "limbs_ptr", "units_ptr"), ("gate_up_tile_kernel", "act_ptr"),
    ("limbs_kernel", "limbs_ptr", "units_ptr"), ("down_tile_kernel", "out_ptr"), ("combine_tile_kernel", "y_ptr"),
], written
"""


@pytest.mark.slow
def test_a_trace_sees_what_the_experts_kernels_write_and_nothing_else():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", TRACED], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
