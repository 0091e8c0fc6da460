"""The fault table on the device: what test_kernels_faults.py does in the interpreter, at real sizes, and what only fits here."""

from __future__ import annotations

import kernels_common as common
import pytest
import test_kernels_faults as faults
import torch
from moeexp_kernels.ops import attention, attention_splits, sample
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill
from moeexp_kernels.ops.linear import linear, reference_linear
from moeexp_kernels.ops.moe import moe_decode
from moeexp_kernels.ops.moe_prefill import moe_prefill
from moeexp_kernels.ops.router import router
from test_kernels_attention import make_attention_case
from test_kernels_gated_delta import BF16, DECODE_TOL, F32, FAULT_LENGTHS, PREFILL_TOL, check, make_case, run
from test_kernels_linear import quantised
from test_kernels_moe import choices, experts, route
from tolerances import tolerance

pytestmark = pytest.mark.usefixtures("exact_reference")
BIG = {"D": 2048, "E": 256, "width": 512, "shared": 512, "group": 128}
RUNS = 20


# --- the ladder's two tests


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("decay", ["none", "weak", "strong"])
@pytest.mark.parametrize("state", ["fresh", "running"])
@pytest.mark.parametrize(
    "batch, heads, dims",
    [
        (1, (1, 1), (64, 64)), (2, (2, 4), (60, 60)), (4, (4, 4), (64, 128)), (2, (3, 9), (96, 80)), (1, (16, 32), (128, 128)),
        (4, (16, 32), (128, 128)), (3, (8, 8), (128, 64)),
    ],
)  # fmt: skip
def test_recurrent_t1_matches_naive(batch, heads, dims, state, decay, dtype):
    check(gdn_decode, faults.usual_case(batch, heads, dims, dtype, state=state, decay=decay), DECODE_TOL[dtype])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", [(2, 4), (16, 32)])
@pytest.mark.parametrize("tokens", faults.DISPATCH_LENGTHS)
def test_dispatch_over_t(tokens, heads, dtype):
    case = make_case(1, tokens + 1, heads, (128, 128), dtype, seed=tokens)
    check(faults.dispatched, case, PREFILL_TOL[dtype], splits=[tokens, 1])


# --- shapes


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (64, 96), (128, 80)])
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (1, 4), (2, 2), (3, 3), (5, 15)])
def test_head_dims_and_counts(heads, dims):
    check(gdn_decode, make_case(2, 1, heads, dims, BF16), DECODE_TOL[BF16])
    check(gdn_prefill, make_case(2, 65, heads, dims, BF16), PREFILL_TOL[BF16])


@pytest.mark.parametrize("tokens", FAULT_LENGTHS)
def test_a_split_anywhere_equals_the_unsplit_run(tokens):
    """One token, then the rest: the state handed over is the one that the unsplit run has there."""
    if tokens == 1:
        splits, tokens = [1, 1], 2
    else:
        splits = [1, tokens - 1] if tokens % 2 else [tokens // 2 + 1, tokens // 2 - 1]
    splits = [length for length in splits if length]
    case = make_case(1, tokens, (2, 4), (128, 128), F32, seed=tokens)
    whole, pieces = run(gdn_prefill, case), run(gdn_prefill, case, splits)
    for name, actual, expected in zip(("output", "conv_state", "recurrent_state"), pieces, whole, strict=True):
        common.assert_close_ratio(actual, expected, PREFILL_TOL[F32], f"{name}, {splits}")


# --- memory beside the result, and the same bits every time


@pytest.mark.parametrize("name", faults.CALLS)
def test_results_and_scratch_are_written_inside_and_in_full(name):
    faults.test_results_and_scratch_are_written_inside_and_in_full(name)


@pytest.mark.parametrize("name", faults.CALLS)
def test_the_same_inputs_give_the_same_bits(name):
    common.assert_bitwise_stable(faults.CALLS[name](), RUNS, name)


@pytest.mark.parametrize("tokens, op", [(1, moe_decode), (8, moe_decode), (512, moe_prefill)])
def test_the_experts_write_inside_at_size(tokens, op):
    arguments = experts(**BIG, bits=4, dtype=BF16) | choices(1, tokens, k=8, E=256)
    x = common.Guarded(common.randn(1, tokens, 2048, seed=1, dtype=BF16))
    plain = op(x=x.tensor, **arguments)
    with common.guarded_empty():
        poisoned = op(x=x.tensor, **arguments)
    assert plain.isfinite().all()
    common.assert_bitwise_equal(poisoned, plain)
    x.check("x")


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("out, features", [(12_352, 2048), (2048, 4096)])
def test_linear_writes_inside_at_size(rows, out, features):
    weight, scales = quantised(out, features, bits=4, group=128, seed=2, dtype=BF16)
    arguments = {"x": common.randn(1, rows, features, seed=1, dtype=BF16), "weight": weight, "scales": scales}
    plain = linear(**arguments)
    with common.guarded_empty():
        poisoned = linear(**arguments)
    assert plain.isfinite().all()
    common.assert_bitwise_equal(poisoned, plain)


# --- routing


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_equal_logits_choose_the_lowest_indices(tokens):
    x = common.randn(1, tokens, 2048, seed=1, dtype=BF16)
    weight = torch.zeros(256, 2048, dtype=BF16, device="cuda")
    ids, weights, _ = route(router, x, E=256, k=8, S=512, weight=weight)
    assert torch.equal(ids, torch.arange(8, dtype=torch.int32, device="cuda").expand(1, tokens, 8))
    common.assert_close_ratio(weights, torch.full_like(weights, 1 / 8), 1e-6)


@pytest.mark.parametrize("op, tokens", [(moe_decode, 8), (moe_prefill, 130)])
def test_tokens_that_all_choose_the_same_experts(op, tokens):
    """And the 248 others, whose scales are NaN, are not read. Compared with the same tokens among eight experts."""
    chosen = torch.tensor([255, 0, 17, 128, 64, 3, 200, 99], device="cuda")
    arguments = experts(**BIG, bits=4, dtype=BF16)
    small = {k: v[chosen].contiguous() if k.startswith(("gate_up", "down")) else v for k, v in arguments.items()}
    unused = torch.ones(256, dtype=torch.bool, device="cuda")
    unused[chosen] = False
    for name in ("gate_up_scales", "down_scales"):
        arguments[name][unused] = float("nan")
    x = common.randn(1, tokens, 2048, seed=1, dtype=BF16)
    weights = torch.full((1, tokens, 8), 1 / 8, device="cuda")

    def ids(values) -> torch.Tensor:
        return values.to(torch.int32).expand(1, tokens, 8).contiguous()

    out = op(x=x, ids=ids(chosen), weights=weights, **arguments)
    expected = op(x=x, ids=ids(torch.arange(8, device="cuda")), weights=weights, **small)
    common.assert_close_ratio(out, expected, tolerance("moe prefill")[BF16])


# --- KV cache


@pytest.mark.parametrize("op", [attention_splits.sdpa_decode_splitk, attention.sdpa_decode_tiled])
@pytest.mark.parametrize("position", [0, 31, 32, 511, 4000, 4094])
def test_a_poisoned_tail_has_no_effect(op, position):
    case = make_attention_case(1, 1, 16, 2, 256, BF16, [position], 4096)
    clean = {k: torch.nan_to_num(v) if k.endswith("cache") else v for k, v in case.items()}
    common.assert_bitwise_equal(op(**case), op(**clean))


# --- offsets past 2^31


@pytest.mark.alone
def test_results_of_a_gemm_past_two_to_the_31():
    """9,000 rows of the whole vocabulary: 2.2e9 results."""
    rows, out, features = 9000, 248_320, 64
    weight, scales = quantised(out, features, bits=4, group=64, seed=1, dtype=BF16)
    x = common.randn(1, rows, features, seed=2, dtype=BF16)
    y = linear(x=x, weight=weight, scales=scales)
    for part in (slice(0, 4), slice(rows - 4, rows)):
        expected = reference_linear(x=x[:, part].float(), weight=weight, scales=scales)
        common.assert_close_ratio(y[:, part].float(), expected, tolerance("gemm")[BF16], f"rows {part}")


@pytest.mark.alone
def test_rows_of_the_experts_past_two_to_the_31():
    """131,200 tokens of eight experts: 2.15e9 values before they are combined. A token's result does not depend on how many
    there are."""
    tokens = 131_200
    arguments = experts(D=2048, E=16, width=32, shared=32, bits=4, group=32, dtype=BF16)
    x = common.randn(1, tokens, 2048, seed=1, dtype=BF16)
    routing = choices(1, tokens, k=8, E=16)
    y = moe_prefill(x=x, **arguments, **routing)
    for part in (slice(0, 40), slice(tokens - 40, tokens)):
        few = {name: value[:, part].contiguous() for name, value in routing.items()}
        expected = moe_prefill(x=x[:, part].contiguous(), **arguments, **few)
        common.assert_close_ratio(y[:, part], expected, 1e-3, f"tokens {part}")


@pytest.mark.alone
def test_logits_past_two_to_the_31():
    """The rows share one row's values, which the last ones change: their tokens must be theirs."""
    rows, vocabulary = 8700, 248_320
    logits = common.randn(1, 1, vocabulary, seed=1, dtype=BF16).repeat(rows, 1, 1)
    places = [5, 100_000, vocabulary - 1]
    for offset, place in enumerate(places):
        logits[rows - 3 + offset, 0, place] = 50.0
    out = sample.greedy(logits=logits).flatten()
    assert out[-3:].tolist() == places
    assert (out[:-3] == logits[0, 0].argmax()).all()
