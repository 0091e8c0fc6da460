"""Gated delta net kernels on the device at real shapes: the interpreter's cases and what only a GPU shows."""

from __future__ import annotations

import kernels_common as common
import pytest
import torch
from moeexp_kernels.ops import gated_delta
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill
from moeexp_kernels.parts import tuning
from test_kernels_gated_delta import (
    BF16,
    DECODE_TOL,
    F32,
    FAULT_LENGTHS,
    PREFILL_TOL,
    STATE,
    check,
    correlated,
    definition,
    make_case,
    run,
    set_tuned,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("exact_reference")
REAL = ((16, 32), (128, 128))  # heads and dims of Qwen3.5-35B-A3B
RUNS = 20


def fresh(batch, tokens, heads, dims, dtype, **options):
    seed = torch.randint(0, 2**31 - 16, ()).item()
    print(f"seed {seed}")  # shown where the test fails
    return make_case(batch, tokens, heads, dims, dtype, seed=seed, **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("heads, dims", [REAL, ((4, 4), (64, 128)), ((2, 4), (128, 64)), ((1, 3), (80, 96)), ((1, 1), (16, 8))])
def test_decode(heads, dims, batch, dtype):
    case = fresh(batch, 1, heads, dims, dtype)
    check(gdn_decode, case, DECODE_TOL[dtype])
    common.assert_bitwise_stable(lambda: run(gdn_decode, case), RUNS)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("split, num_warps", [(1, 8), (2, 4), (4, 2), (4, 4), (16, 1)])
def test_every_launch_shape_of_decode(monkeypatch, split, num_warps, dtype):
    set_tuned(monkeypatch, split=split, num_warps=num_warps)
    case = fresh(2, 1, *REAL, dtype)
    check(gdn_decode, case, DECODE_TOL[dtype])
    common.assert_bitwise_stable(lambda: run(gdn_decode, case), RUNS)


@pytest.mark.parametrize("num_warps", [1, 4, 8, 16])
@pytest.mark.parametrize("dims", [(8, 8), (16, 4), (4, 16)])
def test_small_tiles_on_many_warps_do_not_race(monkeypatch, dims, num_warps):
    """Here several warps load the same element of the state: a store must not overtake the other's load."""
    set_tuned(monkeypatch, split=1, num_warps=num_warps)
    case = fresh(3, 64, (4, 8), dims, BF16)
    check(gdn_decode, case, DECODE_TOL[BF16], splits=[1] * 64)
    common.assert_bitwise_stable(lambda: run(gdn_decode, case, [1] * 64), 5)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_decode_carries_its_state(dtype):
    check(gdn_decode, fresh(1, 50, *REAL, dtype), DECODE_TOL[dtype], splits=[1] * 50)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("tokens", [2, 3, 4, 8, 32])
def test_tokens_of_one_call_are_to_the_bit_those_of_calls_of_their_own(tokens, batch, dtype):
    case = fresh(batch, tokens, *REAL, dtype)
    check(gdn_decode, case, DECODE_TOL[dtype])
    alone = run(gdn_decode, case, splits=[1] * tokens)
    for together, one, name in zip(run(gdn_decode, case), alone, ("output", *STATE), strict=True):
        common.assert_bitwise_equal(together, one, name)
    common.assert_bitwise_stable(lambda: run(gdn_decode, case), 5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens", FAULT_LENGTHS)
def test_prefill_fault_table_lengths(tokens, dtype):
    case = fresh(1, tokens, (2, 4), (128, 128), dtype)
    check(gdn_prefill, case, PREFILL_TOL[dtype])
    common.assert_bitwise_stable(lambda: run(gdn_prefill, case), 5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch, tokens", [(1, 512), (2, 513), (1, 2048)])
def test_prefill_real_heads(batch, tokens, dtype):
    case = fresh(batch, tokens, *REAL, dtype)
    check(gdn_prefill, case, PREFILL_TOL[dtype])
    common.assert_bitwise_stable(lambda: run(gdn_prefill, case), RUNS)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "heads, dims",
    [
        ((1, 1), (64, 64)), ((4, 4), (64, 128)), ((2, 4), (128, 64)), ((1, 3), (80, 96)), ((2, 4), (32, 32)),
        ((1, 2), (16, 8)),
    ],
)  # fmt: skip
def test_prefill_shapes(heads, dims, dtype):
    # Sums over so few dims average little of the rounding away: 6.06e-3 was seen at dims (16, 8), below 6e-3 elsewhere.
    few = 4 / 3 if max(dims) < 32 and dtype is BF16 else 1
    check(gdn_prefill, fresh(3, 130, heads, dims, dtype), few * PREFILL_TOL[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("splits", [[64, 64], [63, 1, 65], [1, 127, 1], [3, 61, 2, 2, 61], [1000, 1, 23]])
def test_prefill_ragged_splits(splits, dtype):
    check(gdn_prefill, fresh(1, sum(splits), (2, 4), (128, 128), dtype), PREFILL_TOL[dtype], splits=splits)


@pytest.mark.parametrize("pattern", ["equal", "alternating"])
@pytest.mark.parametrize("solve, dtype", [("ieee", F32), ("tf32x3", F32), ("fp16", BF16), ("tf32", BF16), ("tf32x3", BF16)])
def test_correlated_keys(monkeypatch, solve, dtype, pattern):
    """The worst matrix to invert, at the precisions the table may name."""
    key = tuning.activation_class(dtype)
    monkeypatch.setitem(tuning.OVERRIDES, ("gdn_prefill", key), {**tuning.lookup("gdn_prefill", key), "solve": solve})
    case = correlated(fresh(1, 128, (1, 1), (128, 128), dtype), pattern)
    check(gdn_prefill, case, 3 * PREFILL_TOL[dtype])


@pytest.mark.alone
def test_decode_offsets_past_two_to_the_31():
    """The state alone has more than 2^31 elements; the last sequences must be theirs."""
    (hk, hv), (dk, dv) = REAL
    batch = (1 << 31) // (hv * dk * dv) + 4
    case = fresh(2, 1, *REAL, BF16)
    big = {name: case[name].repeat(batch // 2, 1, 1) for name in ("proj", "conv_state")}
    big["recurrent_state"] = torch.zeros(batch, hv, dk, dv, device="cuda")
    big["recurrent_state"][-2:] = case["recurrent_state"]
    out = gdn_decode(**{**case, **big})
    expected = run(definition, case)
    common.assert_close_ratio(out[-2:], expected[0], DECODE_TOL[BF16], "output")
    common.assert_bitwise_equal(big["conv_state"][-2:], expected[1], "conv_state")
    common.assert_close_ratio(big["recurrent_state"][-2:], expected[2], DECODE_TOL[BF16], "recurrent_state")


@pytest.mark.alone
def test_prefill_offsets_past_two_to_the_31():
    case = fresh(1, 140, (1, 2), (64, 64), BF16)
    stride = 16_000_000
    buffer = torch.empty((140 - 1) * stride + case["proj"].shape[2], dtype=BF16, device="cuda")
    assert buffer.numel() > 1 << 31
    far = buffer.as_strided(case["proj"].shape, (0, stride, 1))
    far.copy_(case["proj"])
    for actual, expected in zip(run(gdn_prefill, {**case, "proj": far}), run(gdn_prefill, case), strict=True):
        common.assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("op, tokens", [(gdn_decode, 1), (gdn_prefill, 100)])
def test_graph_replay_equals_eager(op, tokens):
    case = fresh(1, tokens, *REAL, BF16)
    expected = run(op, case)
    states = {name: case[name].clone() for name in STATE}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(**{**case, **states})
    for name in STATE:
        states[name].copy_(case[name])
    graph.replay()
    for actual, wanted in zip((out, *states.values()), expected, strict=True):
        common.assert_bitwise_equal(actual, wanted)


class Layer(torch.nn.Module):
    def __init__(self, op, case):
        super().__init__()
        self.op, self.sizes = op, {name: value for name, value in case.items() if not torch.is_tensor(value)}
        for name, value in case.items():
            if torch.is_tensor(value) and name != "proj":
                self.register_buffer(name, value.clone())

    def forward(self, proj):
        return self.op(proj=proj, **dict(self.named_buffers()), **self.sizes)


@pytest.mark.parametrize("op, lengths", [(gdn_decode, (1, 1)), (gdn_prefill, (1, 7, 64, 300))])
def test_aoti_package_equals_eager(op, lengths):
    """One package; state carries over from call to call."""
    case = fresh(1, sum(lengths), (2, 4), (128, 128), BF16)
    layer = Layer(op, case)
    shapes = ({1: torch.export.Dim("T", min=1, max=4096)},) if op is gdn_prefill else None
    program = torch.export.export(layer, (case["proj"][:, : 12 if shapes else 1].contiguous(),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
    start = 0
    for length in lengths:
        proj = case["proj"][:, start : start + length].contiguous()
        common.assert_bitwise_equal(package(proj), layer(proj), f"T={length}")
        start += length


def test_few_and_many_programs_agree():
    """The table's two rows are the same function: one sequence alone, and within a batch that fills the device."""
    batch = gated_delta.FEW_PROGRAMS // REAL[0][0] + 1
    case = fresh(batch, 1, *REAL, BF16)
    alone = {k: v[:1].contiguous() if k in ("proj", *STATE) else v for k, v in case.items()}
    together = run(gdn_decode, case)
    for many, one, name in zip(together, run(gdn_decode, alone), ("output", *STATE), strict=True):
        common.assert_close_ratio(many[:1], one, DECODE_TOL[BF16], name)
