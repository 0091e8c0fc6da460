"""Gated delta net kernels against the token-by-token definition: outputs, both states, ragged splits, refusals.

Without a GPU the kernels run in Triton's interpreter, whose float32 -> bfloat16 cast truncates instead of rounding: twice
the error of a GPU, and biased. Hence the wider bfloat16 tolerances there.
"""

from __future__ import annotations

import os
import subprocess
import sys

import kernels_common as common
import pytest
import torch
from moeexp_kernels.ops import gated_delta_reference
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill
from moeexp_kernels.ops.gated_delta_reference import reference_gdn_decode, reference_gdn_prefill
from moeexp_kernels.parts import tuning
from tolerances import tolerance

F32, BF16 = torch.float32, torch.bfloat16
DECODE_TOL, PREFILL_TOL = tolerance("gdn decode"), tolerance("gdn prefill")
# Worst row of prefill's output in multiples of that (10 elsewhere). The gated norm divides a row of o by its own norm, and so
# enlarges the errors of a short one: over 24 seeds of heads (1, 1), dims (64, 64), bfloat16 on a GPU the RMSE ratio was at
# most 4.8e-3 while the worst row reached 4.05e-2, once more than 6e-2.
PREFILL_WORST = {F32: 10, BF16: 20}
STATE = ("conv_state", "recurrent_state")
FAULT_LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)


def make_case(batch, tokens, heads, dims, dtype=F32, *, width=4, seed=0):
    """Keyword arguments of both ops: `heads` (Hk, Hv), `dims` (Dk, Dv). Magnitudes as in a trained layer; decays from
    nearly 1 to nearly 0 per token."""
    (hk, hv), (dk, dv) = heads, dims
    channels = 2 * hk * dk + hv * dv
    randn = common.randn
    return {
        "proj": randn(batch, tokens, channels + hv * dv + 2 * hv, seed=seed, dtype=dtype),
        "conv_weight": randn(channels, width, seed=seed + 1, dtype=dtype, scale=0.5),
        "a_log": randn(hv, seed=seed + 2) - 1.0,
        "dt_bias": randn(hv, seed=seed + 3) - 1.0,
        "norm_weight": 1 + randn(dv, seed=seed + 4, dtype=dtype, scale=0.1),
        "conv_state": randn(batch, channels, width - 1, seed=seed + 5, dtype=dtype),
        "recurrent_state": randn(batch, hv, dk, dv, seed=seed + 6, scale=0.3),
        "num_k_heads": hk, "num_v_heads": hv, "head_k_dim": dk, "head_v_dim": dv, "eps": 1e-6,
    }  # fmt: skip


def definition(*, proj, conv_weight, norm_weight, a_log, dt_bias, conv_state, recurrent_state, eps, **heads):
    """The recurrent definition over all T, states updated in place."""
    q, k, v, z, g, beta, new_conv = gated_delta_reference.inputs_of(
        proj, conv_weight, a_log, dt_bias, conv_state, *heads.values()
    )
    o, state = gated_delta_reference.recurrent_delta_rule(q=q, k=k, v=v, g=g, beta=beta, state=recurrent_state)
    conv_state.copy_(new_conv)
    recurrent_state.copy_(state)
    return gated_delta_reference.gated_norm(o, z, norm_weight, eps).to(proj.dtype)


def run(op, case, splits=None):
    """(output, conv state, recurrent state) of `op` on copies of the states, which carry over from split to split. Scratch
    holds NaN, the states lie between sentinels."""
    guards = {name: common.Guarded(case[name]) for name in STATE}
    states = {name: guard.tensor for name, guard in guards.items()}
    parts, start = [], 0
    with common.poisoned_empty():
        for length in splits or [case["proj"].shape[1]]:
            parts.append(op(**{**case, **states, "proj": case["proj"][:, start : start + length]}))
            start += length
    for name, guard in guards.items():
        guard.check(name)
    return torch.cat(parts, dim=1), *states.values()


def check(op, case, tol, splits=None, reference=definition):
    actual, expected = run(op, case, splits), run(reference, case)
    worst = PREFILL_WORST[case["proj"].dtype] * tol if op is gdn_prefill else None
    common.assert_close_ratio(actual[0], expected[0], tol, "output", worst)
    common.assert_bitwise_equal(actual[1], expected[1], "conv_state")
    common.assert_close_ratio(actual[2], expected[2], tol, "recurrent_state")


def set_tuned(monkeypatch, **values):
    row = tuning.table("default")["gdn_decode"][""]
    monkeypatch.setitem(tuning.OVERRIDES, ("gdn_decode", ""), {**row, **values})


def set_chunk(monkeypatch, tokens, **values):
    """Chunks of `tokens` for float32 too, so that the structure of the bfloat16 path is seen at float32 accuracy."""
    row = tuning.table("default")["gdn_prefill"]["single"]
    monkeypatch.setitem(tuning.OVERRIDES, ("gdn_prefill", "single"), {**row, "chunk": tokens, **values})


def correlated(case, pattern):
    """`case` with one head, in which every key is the same but for its sign, beta is 1 and nothing decays: the matrix to
    invert has ones of either sign everywhere below the diagonal."""
    dk = case["head_k_dim"]
    sign = torch.ones(case["proj"].shape[1], 1, device=case["proj"].device, dtype=case["proj"].dtype)
    if pattern == "alternating":
        sign[1::2] = -1.0
    # A filter of one tap, so that the sign reaches the key; the l2 norm makes up for what SiLU does to negative values.
    case["conv_weight"][dk : 2 * dk] = 0.0
    case["conv_weight"][dk : 2 * dk, -1] = 1.0
    case["proj"][:, :, dk : 2 * dk] = 4.0 * sign
    case["proj"][:, :, -2] = 20.0  # b: beta = 1
    case["proj"][:, :, -1] = -20.0  # a: no decay
    return case


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "batch, heads, dims",
    [
        (1, (1, 1), (16, 16)), (2, (2, 4), (16, 8)), (1, (1, 3), (20, 12)), (3, (1, 1), (8, 24)),
        pytest.param(1, (1, 2), (128, 128), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_decode_equals_definition(batch, heads, dims, dtype):
    check(gdn_decode, make_case(batch, 1, heads, dims, dtype), DECODE_TOL[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dims", [(64, 64), (128, 64), (64, 128), (80, 96), (128, 128)])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (4, 4)])
def test_decode_equals_definition_slow(batch, heads, dims, dtype):
    check(gdn_decode, make_case(batch, 1, heads, dims, dtype), DECODE_TOL[dtype])


@pytest.mark.parametrize(
    "split, heads, dims",
    [
        (1, (1, 3), (16, 16)), (2, (1, 2), (20, 12)), (4, (1, 3), (16, 16)),
        pytest.param(16, (1, 3), (20, 12), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_launch_shape_of_decode(monkeypatch, split, heads, dims):
    """Also columns past Dv, and more programs than columns."""
    set_tuned(monkeypatch, split=split)
    check(gdn_decode, make_case(1, 1, heads, dims), DECODE_TOL[F32])


@pytest.mark.parametrize("split", [1, 2])
def test_decode_carries_its_state(monkeypatch, split):
    set_tuned(monkeypatch, split=split)
    check(gdn_decode, make_case(1, 4, (1, 2), (16, 16)), DECODE_TOL[F32], splits=[1] * 4)


@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "tokens, batch, width",
    [(2, 1, 4), (3, 2, 4), (5, 1, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 1, 2), (4, 2, 9)))],
)
def test_tokens_of_one_call_are_to_the_bit_those_of_calls_of_their_own(tokens, batch, width, dtype):
    case = make_case(batch, tokens, (1, 2), (16, 8), dtype, width=width)
    check(gdn_decode, case, DECODE_TOL[dtype])
    alone = run(gdn_decode, case, splits=[1] * tokens)
    for splits in ([tokens], [1, tokens - 1]):
        for together, one, name in zip(run(gdn_decode, case, splits), alone, ("output", *STATE), strict=True):
            common.assert_bitwise_equal(together, one, f"{name}, {splits}")


@pytest.mark.parametrize("width", [2, 3, 5, 9])
def test_other_conv_widths(width):
    case = make_case(1, 3, (1, 2), (16, 8), width=width)
    check(gdn_prefill, case, PREFILL_TOL[F32])
    check(gdn_decode, case, DECODE_TOL[F32], splits=[1] * 3)


def test_decode_alternatives_agree():
    """`einsum` (traced reference), `recurrent` and `chunked` are one function."""
    case = make_case(1, 1, (1, 2), (16, 16))
    for op in (reference_gdn_decode, gdn_decode, gdn_prefill):
        check(op, case, DECODE_TOL[F32])


@pytest.mark.parametrize(
    "chunk, tokens",
    [(16, 2), (16, 9), (16, 15), (16, 16), (16, 17), *(pytest.param(64, t, marks=pytest.mark.slow) for t in (63, 65, 129))],
)
def test_prefill_equals_definition(monkeypatch, chunk, tokens):
    set_chunk(monkeypatch, chunk)
    check(gdn_prefill, make_case(1, tokens, (1, 1), (16, 16), seed=tokens), PREFILL_TOL[F32])


def test_prefill_bfloat16_and_odd_dims():
    check(gdn_prefill, make_case(1, 65, (1, 2), (20, 12), BF16), PREFILL_TOL[BF16])


def test_prefill_batch():
    check(gdn_prefill, make_case(3, 5, (2, 2), (16, 8)), PREFILL_TOL[F32])


def test_prefill_ragged_splits():
    """A split shorter than the conv's window mixes old state and new tokens."""
    check(gdn_prefill, make_case(1, 20, (1, 1), (16, 16)), PREFILL_TOL[F32], splits=[1, 2, 17])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, chunk", [(F32, 16), (F32, 64), (BF16, 64)])
@pytest.mark.parametrize("tokens", FAULT_LENGTHS)
def test_prefill_fault_table_lengths(monkeypatch, tokens, dtype, chunk):
    if dtype is F32:
        set_chunk(monkeypatch, chunk)
    check(gdn_prefill, make_case(1, tokens, (1, 2), (16, 16), dtype, seed=tokens), PREFILL_TOL[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("splits", [[64, 64], [63, 1, 65], [1, 127, 1], [3, 61, 2, 2, 61], [128, 1]])
def test_prefill_ragged_splits_slow(monkeypatch, splits):
    set_chunk(monkeypatch, 64)
    check(gdn_prefill, make_case(1, sum(splits), (1, 2), (16, 16)), PREFILL_TOL[F32], splits=splits)


@pytest.mark.slow
@pytest.mark.parametrize("heads, dims", [((1, 1), (128, 128)), ((2, 4), (64, 128)), ((1, 4), (96, 80)), ((1, 3), (8, 24))])
def test_prefill_shapes_slow(heads, dims):
    check(gdn_prefill, make_case(1, 70, heads, dims), PREFILL_TOL[F32])


@pytest.mark.parametrize("pattern", ["equal", "alternating"])
@pytest.mark.parametrize("solve, tol", [("ieee", 1e-5), pytest.param("fp16", 1e-3, marks=pytest.mark.slow)])
def test_correlated_keys_stay_exact(monkeypatch, solve, tol, pattern):
    """The worst matrix to invert: powers of it reach 1e18, its inverse does not. A product of powers passes random inputs
    and fails here. Nothing on the way may leave float16's range or lose more than its mantissa."""
    set_chunk(monkeypatch, 64, solve=solve)
    check(gdn_prefill, correlated(make_case(1, 64, (1, 1), (16, 16)), pattern), tol)


@pytest.mark.parametrize("solve", ["ieee", "fp16"])
def test_solve_precision(monkeypatch, solve):
    """What the float16 inverse costs on ordinary inputs: less than a bfloat16 operand's rounding, 2e-3."""
    set_chunk(monkeypatch, 64, solve=solve)
    check(gdn_prefill, make_case(1, 64, (1, 1), (16, 16)), PREFILL_TOL[F32] if solve == "ieee" else 5e-4)


def test_strong_decay_stays_finite():
    """Decays whose inverse overflows: what lies above the diagonal must never be exponentiated."""
    case = make_case(1, 18, (1, 1), (16, 16))
    case["proj"][:, :, -1] = 60.0
    case["a_log"] = torch.full_like(case["a_log"], 2.0)
    check(gdn_prefill, case, PREFILL_TOL[F32])


def test_prefill_then_decode_equals_one_run():
    case = make_case(1, 19, (1, 2), (16, 16))

    def both(proj, **rest):
        return (gdn_prefill if proj.shape[1] > 1 else gdn_decode)(proj=proj, **rest)

    check(both, case, PREFILL_TOL[F32], splits=[17, 1, 1])


def test_rows_with_a_wider_stride():
    """proj may be a view into a wider buffer; what lies beside it is NaN and must not be read."""
    case = make_case(2, 2, (1, 1), (16, 8))
    wide = common.poison(2, 2, case["proj"].shape[-1] + 32)
    wide[..., 16:-16] = case["proj"]
    view = {**case, "proj": wide[..., 16:-16]}
    for op, splits in ((gdn_prefill, None), (gdn_decode, [1, 1])):
        for actual, expected in zip(run(op, view, splits), run(op, case, splits), strict=True):
            common.assert_bitwise_equal(actual, expected)


def test_sequences_do_not_see_each_other():
    """NaN in one sequence's input and state leaves the other bitwise as it is."""
    case = make_case(2, 2, (1, 1), (16, 8))
    sick = {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}
    for name in ("proj", *STATE):
        sick[name][0] = float("nan")
    for op, splits in ((gdn_prefill, None), (gdn_decode, [1, 1])):
        for actual, expected in zip(run(op, sick, splits), run(op, case, splits), strict=True):
            common.assert_bitwise_equal(actual[1], expected[1])


def test_bitwise_stable():
    for op, tokens in ((gdn_decode, 1), (gdn_prefill, 17)):
        case = make_case(1, tokens, (1, 1), (16, 16))
        common.assert_bitwise_stable(lambda op=op, case=case: run(op, case), 2)


@pytest.mark.parametrize("op", [gdn_decode, gdn_prefill])
def test_refusals(op):
    case = make_case(1, 1, (1, 2), (16, 16))

    def refused(*words, **changes):
        common.expect_value_error(lambda: op(**{**case, **changes}), *words)

    refused("256", "128", head_k_dim=256)
    refused("3 value heads", "2 key heads", num_v_heads=3, num_k_heads=2)
    refused("float16", "bfloat16", proj=case["proj"].half())
    refused("recurrent_state", "float32", recurrent_state=case["recurrent_state"].bfloat16())
    refused("recurrent_state", "strides", recurrent_state=case["recurrent_state"].mT.contiguous().mT)
    refused("conv_state", "bfloat16", conv_state=case["conv_state"].bfloat16())
    refused("conv_state", "need", conv_state=case["conv_state"][..., :2].contiguous())
    refused("proj", "stride", proj=case["proj"].repeat_interleave(2, dim=-1)[..., ::2])
    refused("conv width 1", conv_weight=case["conv_weight"][:, :1].contiguous())
    if op is gdn_prefill:
        far = case["proj"].as_strided(case["proj"].shape, (0, 1 << 25, 1))
        refused("row stride", str(1 << 25), proj=far)
        wide = make_case(1, 1, (1, 2), (16, 16), width=10)
        refused("conv width 10", "2..9", conv_weight=wide["conv_weight"], conv_state=wide["conv_state"])
    else:
        refused("1 to 32 tokens", "33", "gdn_prefill", proj=case["proj"].expand(1, 33, -1))


def test_refused_calls_leave_the_state_alone():
    case = make_case(1, 33, (1, 2), (16, 16))
    before = [case[name].clone() for name in STATE]
    common.expect_value_error(lambda: gdn_decode(**case), "1 to 32 tokens")
    for name, expected in zip(STATE, before, strict=True):
        common.assert_bitwise_equal(case[name], expected, name)


EXPORT = """
import torch
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill

SIZES = dict(num_k_heads=1, num_v_heads=2, head_k_dim=16, head_v_dim=16, eps=1e-6)
TENSORS = dict(conv_weight=(64, 4), a_log=(2,), dt_bias=(2,), norm_weight=(16,), conv_state=(2, 64, 3),
               recurrent_state=(2, 2, 16, 16))

class Layer(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op
        for name, shape in TENSORS.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, proj):
        return self.op(proj=proj, **dict(self.named_buffers()), **SIZES)

any_length = ({1: torch.export.Dim("tokens", min=1, max=4096)},)
for op, name, length, shapes in ((gdn_decode, "gdn_decode", 1, None), (gdn_prefill, "gdn_prefill", 5, any_length)):
    program = torch.export.export(Layer(op), (torch.zeros(2, length, 100),), dynamic_shapes=shapes)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [f"moeexp.{name}.default"], calls
    ranges = [(bounds.lower, bounds.upper) for bounds in program.range_constraints.values()]
    assert ranges == ([(1, 4096)] if shapes else []), ranges
"""


@pytest.mark.slow
def test_exports_as_one_node_with_symbolic_length():
    """One prefill serves every T >= 1. In a process without the interpreter, whose kernels no trace can pass through."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", EXPORT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_reference_prefill_is_the_same_function():
    check(reference_gdn_prefill, make_case(1, 67, (1, 2), (16, 16)), PREFILL_TOL[F32])


def test_tables_name_only_what_the_launch_reads():
    for name in ("default", "sm_90"):
        for row in tuning.table(name)["gdn_decode"].values():
            assert set(row) == {"split", "num_warps"}
        for key, row in tuning.table(name)["gdn_prefill"].items():
            parts = {"chunk", "precision", "solve", "conv_tokens", "conv", "local", "block_v", "scan", "output"}
            assert set(row) == parts
            assert row["block_v"] < 64, "the scan would become a warp-group product"
            assert row["chunk"] % row["conv_tokens"] == 0
            assert key.startswith("half") or row["solve"] == "ieee", "float32 is inverted in float32"
