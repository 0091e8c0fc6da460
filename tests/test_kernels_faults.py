"""What breaks kernels, op by op: memory beside the result, scratch nobody wrote, routing that is not uniform, lengths at
which a chunk ends, head counts that are no power of two. Small, for the interpreter; gpu/test_gpu_faults.py at size.

Here too are the two tests that the published ladder of these kernels names.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import kernels_common as common
import pytest
import torch
from moeexp_kernels import dispatch
from moeexp_kernels.hqq import quantise_rows
from moeexp_kernels.ops import attention, attention_splits, moe, moe_prefill, qk_norm_rope, router, sample
from moeexp_kernels.ops.embedding import embedding
from moeexp_kernels.ops.gated_delta import gdn_decode
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill
from moeexp_kernels.ops.gated_out import gdn_decode_out
from moeexp_kernels.ops.linear import linear, linear_tile
from moeexp_kernels.ops.mixed import gdn_out, sdpa_out
from moeexp_kernels.parts import tuning
from test_kernels_attention import make_attention_case, make_qkv, make_weights, positions_of
from test_kernels_gated_delta import BF16, DECODE_TOL, F32, PREFILL_TOL, STATE, check, definition, make_case, run
from test_kernels_linear import quantised
from test_kernels_moe import check_experts, choices, experts, route
from triton.runtime.interpreter import GridExecutor

DISPATCH_LENGTHS = (1, 2, 32, 63, 64, 65, 128, 256)  # the ladder's
NAN = float("nan")


# --- the ladder's two tests


def usual_case(batch, heads, dims, dtype, *, state, decay):
    """A step in the ranges that the delta rule's own tests use: a fresh or a running state, weak to strong decay."""
    case = make_case(batch, 1, heads, dims, dtype, seed=batch + heads[1])
    if state == "fresh":
        case["recurrent_state"].zero_()
        case["conv_state"].zero_()
    hv = heads[1]
    case["a_log"] = torch.full((hv,), {"none": -30.0, "weak": -4.0, "strong": 2.0}[decay], device=common.DEVICE)
    return case


@pytest.mark.parametrize("decay", ["none", "strong"])
@pytest.mark.parametrize("state", ["fresh", "running"])
@pytest.mark.parametrize("batch, heads, dims", [(1, (1, 1), (64, 64)), (2, (1, 2), (16, 32)), (1, (2, 2), (60, 60))])
def test_recurrent_t1_matches_naive(batch, heads, dims, state, decay):
    case = usual_case(batch, heads, dims, F32, state=state, decay=decay)
    check(gdn_decode, case, DECODE_TOL[F32])


dispatched = partial(dispatch.gdn, decode="recurrent", prefill="triton")


@pytest.mark.parametrize("tokens", [t if t in (1, 2, 65) else pytest.param(t, marks=pytest.mark.slow) for t in DISPATCH_LENGTHS])
def test_dispatch_over_t(tokens):
    """Output and both states, from a running state, and the step after it."""
    case = make_case(1, tokens + 1, (1, 2), (16, 16), seed=tokens)
    check(dispatched, case, PREFILL_TOL[F32], splits=[tokens, 1])


@pytest.mark.slow
@pytest.mark.parametrize("splits", [(1, 1, 30), (15, 17), (31, 1), (16, 16)])
def test_dispatch_pieces_equal_the_unsplit_run(splits):
    case = make_case(1, 32, (1, 2), (16, 16))
    whole, pieces = run(dispatched, case), run(dispatched, case, splits)
    common.assert_close_ratio(pieces[0], whole[0], PREFILL_TOL[F32], "output")
    common.assert_bitwise_equal(pieces[1], whole[1], "conv_state")
    common.assert_close_ratio(pieces[2], whole[2], PREFILL_TOL[F32], "recurrent_state")


# --- shapes of the delta rule


@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 2), (1, 4), (3, 3), (3, 6), (1, 5)])
@pytest.mark.parametrize("op, tokens", [(gdn_decode, 1), pytest.param(gdn_prefill, 17, marks=pytest.mark.slow)])
def test_head_counts(op, tokens, heads):
    check(op, make_case(1, tokens, heads, (16, 16)), PREFILL_TOL[F32])


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (64, 96), (128, 80)])
@pytest.mark.parametrize("op, tokens", [(gdn_decode, 1), (gdn_prefill, 65)])
def test_head_dims(op, tokens, dims):
    check(op, make_case(1, tokens, (1, 2), dims), PREFILL_TOL[F32])


@pytest.mark.parametrize("op", [gdn_decode, gdn_prefill])
@pytest.mark.parametrize("dims", [(256, 16), (16, 256), (129, 129)])
def test_head_dims_beyond_what_is_supported_are_refused(op, dims):
    case = make_case(1, 1, (1, 1), dims)
    before = {name: case[name].clone() for name in STATE}
    common.expect_value_error(lambda: op(**case), str(dims[0]), str(dims[1]), "1..128")
    for name in STATE:
        common.assert_bitwise_equal(case[name], before[name], name)


# --- memory beside the result, and scratch that nobody wrote


def dense(rows):
    weight, scales = quantised(37, 64, bits=4, group=32, seed=2, dtype=F32)
    x, norm = common.randn(1, rows, 64, seed=1), common.randn(64, seed=3)
    return lambda: linear(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=None)


def on_the_tile(rows):
    weight, scales = quantised(37, 128, bits=4, group=64, seed=2, dtype=F32)
    x, norm = common.randn(1, rows, 128, seed=1), common.randn(128, seed=3)
    return lambda: linear_tile(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=None)


def routed(op, tokens, D=64, width=32, group=32):
    arguments = experts(D=D, E=4, width=width, shared=width, bits=4, group=group, dtype=F32) | choices(1, tokens, k=2, E=4)
    x = common.randn(1, tokens, D, seed=1)
    return lambda: op(x=x, **arguments)


def routed_by_itself(tokens, **tuned):
    """The router and experts of a decode step, with rows of the tuning table for them."""
    stored = experts(D=64, E=4, width=32, shared=32, bits=4, group=32, dtype=F32)
    x, trace = common.randn(tokens, 1, 64, seed=1), torch.zeros(tokens, 8, 2, dtype=torch.int32, device=common.DEVICE)
    choice = {"x": x, "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps"), "top_k": 2, "expert_ids": trace}
    choice |= {"weight": common.randn(4, 64, seed=5), "positions": torch.ones(tokens, dtype=torch.int64, device=common.DEVICE)}

    def call():
        with ExitStack() as stack:
            for op, changes in tuned.items():
                key = "int4" if op == "moe_gate_up_packed" else ""
                stack.enter_context(tuning.override(op, key, tuning.lookup(op, key) | changes))
            return moe.routed_experts(choice, stored)

    return call


def dequantised_in_memory(rows):
    weight, scales = quantised(37, 64, bits=4, group=32, seed=2, dtype=torch.bfloat16)
    x, norm = common.randn(1, rows, 64, seed=1, dtype=torch.bfloat16), common.randn(64, seed=3)

    def call():
        with tuning.override("linear_rows", "", {"TILE_FROM": 2, "GEMM_FROM": 3, "MATMUL_FROM": 9}):
            return linear(x=x, weight=weight, scales=scales, norm_weight=norm, eps=1e-6, residual=None)

    return call


def router_of(rows, dtype=F32):
    x = common.randn(1, rows, 64, seed=1, dtype=dtype)
    return lambda: route(router.router, x, E=7, k=3, S=64)


def attend(op, tokens, position):
    case = make_attention_case(1, tokens, 4, 2, 32, F32, [position], 40)
    return lambda: op(**case)


def delta(op, tokens):
    case = make_case(1, tokens, (1, 2), (20, 12))
    return lambda: op(**{k: v.clone() if k in STATE else v for k, v in case.items()})


def with_projection(op):
    """A mixer and its output projection, of as many rows as go to the tile, or few; the delta net's heads are groups of it."""
    fused = op is gdn_decode_out
    rows = 2 if fused else 5
    case = make_case(rows, 1, (1, 2), (20, 64))
    if op is sdpa_out:
        case = make_attention_case(rows, 1, 4, 2, 32, F32, [36, 5, 0, 9, 20], 40)
    weight, scales = quantised(37, 128, bits=4, group=32 if fused else 64, seed=2, dtype=F32)
    project = {"weight": weight, "scales": scales, "residual": common.randn(rows, 1, 37, seed=3)}

    def call():
        own = {k: v.clone() if k in STATE else v for k, v in case.items()}
        return op(**own, **project) if fused else op(own, project)

    return call


def quantised_by_hqq(bits):
    weight = common.randn(37, 96, seed=1, dtype=torch.bfloat16)
    options = {"group_size": 48, "slice_rows": 16, "flat": 1e-4, "round_zero": bits == 4}
    return lambda: quantise_rows(weight, bits=bits, **options)


def rope():
    caches = {name: torch.zeros(1, 2, 40, 32, device=common.DEVICE) for name in ("k_cache", "v_cache")}
    arguments = {"qkv": make_qkv(1, 3, 4, 2, 32), **make_weights(32, 8), "positions": positions_of(5), **caches}
    return lambda: qk_norm_rope.qk_norm_rope(num_heads=4, eps=1e-6, **arguments)


def draw(**filters):
    logits, seed = common.randn(2, 1, 300, seed=4), torch.tensor([1, 0], device=common.DEVICE)
    return lambda: sample.sample(logits=logits, seed_state=seed.clone(), **filters)


def fed(**filters):
    logits, seed = common.randn(2, 1, 300, seed=4), torch.tensor([1, 0], device=common.DEVICE)
    shapes = {"token": (2, 1), "positions": (2,), "index": (1,), "ids": (3, 2)}

    def call():
        into = {name: torch.zeros(shape, dtype=torch.int64, device=common.DEVICE) for name, shape in shapes.items()}
        sample.feed_sample(logits=logits, seed_state=seed.clone(), **filters, **into)
        return tuple(into.values())

    return call


def embedded():
    """The first row of the table, the last, and none."""
    table, ids = common.randn(7, 40, seed=1), torch.tensor([[0, 6], [3, 7]], device=common.DEVICE)
    return lambda: embedding(ids, table).nan_to_num(nan=-1.0)


# Every op, and what quantises: what makes one call of it, on arguments that it leaves as they are or gets afresh.
CALLS = {
    "embedding": embedded,
    "linear, one row": lambda: dense(1),
    "linear, many rows": lambda: dense(11),
    "linear, on the tile": lambda: on_the_tile(3),
    "linear, dequantised in memory": lambda: dequantised_in_memory(11),
    "moe decode": lambda: routed(moe.moe_decode, 2),
    "moe decode, on packed rows": lambda: routed_by_itself(3, moe_routed={"UP_TO": 0}, moe_gate_up_packed={"BY_EXPERT": 1}),
    "moe decode, the choice fused": lambda: routed_by_itself(2, moe_routed={"UP_TO": 2}),
    "moe decode, told by gate/up": lambda: routed_by_itself(2, moe_routed={"UP_TO": 2, "TELLS": True}),
    "moe decode, on the tile": lambda: routed(moe.moe_decode_tile, 3, D=128, width=64, group=64),
    "moe prefill": lambda: routed(moe_prefill.moe_prefill, 9),
    "router, few rows": lambda: router_of(2),
    "router, many rows": lambda: router_of(35),
    "router, many rows in limbs": lambda: router_of(35, torch.bfloat16),
    "gdn decode": lambda: delta(gdn_decode, 1),
    "gdn decode, with limbs": lambda: with_projection(gdn_out),
    "gdn decode, the gated norm fused": lambda: with_projection(gdn_decode_out),
    "gdn prefill": lambda: delta(gdn_prefill, 19),
    "attention, splitk": lambda: attend(attention_splits.sdpa_decode_splitk, 1, 36),
    "attention, splitk, with limbs": lambda: with_projection(sdpa_out),
    "attention, tiled": lambda: attend(attention.sdpa_decode_tiled, 1, 36),
    "attention, prefill": lambda: attend(attention.sdpa_prefill, 5, 20),
    "quantise to int4": lambda: quantised_by_hqq(4),
    "quantise to int8": lambda: quantised_by_hqq(8),
    "rope": rope,
    "greedy": lambda: draw(temperature=0.0, top_k=0, top_p=1.0),
    "sample": lambda: draw(temperature=0.8, top_k=20, top_p=0.9),
    "greedy, fed": lambda: fed(temperature=0.0, top_k=0, top_p=1.0),
    "sample, fed": lambda: fed(temperature=0.8, top_k=20, top_p=0.9),
}


def test_every_kernel_has_a_call(monkeypatch):
    """As the sanitizer would find, on a GPU. None of them runs."""
    names = set()
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **options: names.add(self.fn.__name__))
    for make in CALLS.values():
        make()()
    sources = [Path(moe.__file__).parent, Path(quantise_rows.__code__.co_filename)]
    found = [text for source in sources for text in (source.glob("*.py") if source.is_dir() else (source,))]
    kernels = {line.split("(")[0].removeprefix("def ") for text in found for line in text.read_text().split("@triton.jit\n")[1:]}
    assert {name for name in kernels if name.endswith("_kernel")} - names == set()


# Of the joined kernel, whose two rows take as long as ten other calls, test_kernels_gated_out.py has poisoned and guarded ones.
SLOW = [name for name in CALLS if name.startswith("moe") or "with limbs" in name or "norm fused" in name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CALLS])
def test_results_and_scratch_are_written_inside_and_in_full(name):
    """NaN in everything that the op allocates and round it: what it returns is finite, what lies beside it is untouched,
    and it is bitwise what the op returns without poison."""
    call = CALLS[name]()
    plain = call()
    with common.guarded_empty():
        poisoned = call()
    plain, poisoned = (out if isinstance(out, tuple) else (out,) for out in (plain, poisoned))
    for expected, actual in zip(plain, poisoned, strict=True):
        assert torch.isfinite(actual.double()).all()
        common.assert_bitwise_equal(actual, expected, name)


def test_the_guard_sees_a_write_beside_an_allocation():
    with pytest.raises(AssertionError, match=r"allocation 1 of shape \(2, 8\)"), common.guarded_empty():
        torch.empty(4)
        inside = torch.empty(2, 8)
        inside.as_strided((17,), (1,))[16] = 0.0


def test_the_guard_sees_an_element_that_nobody_wrote():
    with common.guarded_empty():
        out = torch.empty(4)
        out[:3] = 1.0
    assert out[3].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_same_inputs_give_the_same_bits(name):
    common.assert_bitwise_stable(CALLS[name](), 20 if common.DEVICE == "cuda" else 3, name)


# --- arguments that the kernels would read wrongly


def strided(tensor):
    """The same values, every second element of wider rows."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7, dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("op, tokens", [(moe.moe_decode, 2), (moe_prefill.moe_prefill, 9)])
def test_experts_refuse_vectors_of_another_layout(op, tokens):
    arguments = experts(D=64, E=4, width=32, shared=32, bits=4, group=32, dtype=F32) | choices(1, tokens, k=2, E=4)
    arguments["x"] = common.randn(1, tokens, 64, seed=1)

    def refused(name, value, *words):
        common.expect_value_error(lambda: op(**{**arguments, name: value}), name, *words)

    for name in ("norm_weight", "shared_gate", "ids", "weights"):
        refused(name, strided(arguments[name]), "strides", "contiguous")
    refused("norm_weight", arguments["norm_weight"][:-1].contiguous(), "63", "64")
    refused("ids", arguments["ids"].long(), "int64", "int32")
    refused("ids", arguments["ids"][:, :-1].contiguous(), str(tokens - 1), str(tokens))
    refused("weights", arguments["weights"][..., :-1].contiguous(), "(1, ")
    refused("weights", arguments["weights"].double(), "float64", "float32")
    for name in ("gate_up", "down", "shared_gate_up", "shared_down"):
        key = f"{name}_scales"
        short = arguments[key][..., :1].contiguous()
        common.expect_value_error(lambda key=key, short=short: op(**{**arguments, key: short}), name, str(short.shape[-3]))


@pytest.mark.parametrize("rows", [1, 11])
def test_linear_refuses_a_norm_or_scales_of_another_layout(rows):
    weight, scales = quantised(37, 64, bits=4, group=32, seed=2, dtype=F32)
    arguments = {"x": common.randn(1, rows, 64, seed=1), "weight": weight, "scales": scales}
    norm = common.randn(64, seed=3)

    def refused(*words, **changes):
        common.expect_value_error(lambda: linear(**{**arguments, **changes}), *words)

    refused("norm_weight", "strides", norm_weight=strided(norm))
    refused("norm_weight", "63", norm_weight=norm[:-1].contiguous())
    refused("norm_weight", "int32", norm_weight=norm.int())
    refused("scales", "(37, 2, 1)", "(37, 2, 2)", scales=scales[..., :1].contiguous())


def test_positions_and_frequencies_of_another_layout_are_refused():
    positions = torch.tensor([3, 5], device=common.DEVICE)
    case = make_attention_case(2, 1, 4, 2, 32, F32, [3, 5], 8)
    caches = {name: case[name] for name in ("k_cache", "v_cache")}
    rope_arguments = {"qkv": case["qkv"], **make_weights(32, 8), "positions": positions, "num_heads": 4, "eps": 1e-6, **caches}
    x = common.randn(2, 1, 64, seed=1)
    trace = torch.zeros(2, 9, 2, dtype=torch.int32, device=common.DEVICE)
    router_arguments = {
        "x": x, "norm_weight": common.randn(64, seed=2), "weight": common.randn(4, 64, seed=3), "eps": 1e-6, "top_k": 2,
        "positions": positions, "expert_ids": trace,
    }  # fmt: skip
    calls = [(op, case) for op in (attention_splits.sdpa_decode_splitk, attention.sdpa_decode_tiled, attention.sdpa_prefill)]
    calls += [(qk_norm_rope.qk_norm_rope, rope_arguments), (router.router, router_arguments)]
    for op, arguments in calls:
        for wrong, word in ((strided(positions), "strides"), (positions.int(), "int32"), (positions[:1], "(2,)")):
            common.expect_value_error(
                lambda op=op, arguments=arguments, wrong=wrong: op(**{**arguments, "positions": wrong}), "positions", word
            )
    wrong = {**rope_arguments, "inv_freq": rope_arguments["inv_freq"].double()}
    common.expect_value_error(lambda: qk_norm_rope.qk_norm_rope(**wrong), "inv_freq", "float64", "float32")
    wrong = {**router_arguments, "norm_weight": strided(router_arguments["norm_weight"])}
    common.expect_value_error(lambda: router.router(**wrong), "norm_weight", "strides")


# --- routing


@pytest.mark.slow
@pytest.mark.parametrize("op, tokens", [(moe.moe_decode, 3), (moe_prefill.moe_prefill, 20)])
def test_tokens_that_all_choose_the_same_experts(op, tokens):
    ids = torch.tensor([3, 0], dtype=torch.int32, device=common.DEVICE).expand(1, tokens, 2).contiguous()
    weights = torch.tensor([0.75, 0.25], device=common.DEVICE).expand(1, tokens, 2).contiguous()
    check_experts(op, rows=(1, tokens), routing={"ids": ids, "weights": weights})


@pytest.mark.slow
@pytest.mark.parametrize("op, tokens", [(moe.moe_decode, 1), (moe_prefill.moe_prefill, 13)])
def test_experts_that_nobody_chose_are_not_read(op, tokens):
    """Their scales are NaN: one product with them would show."""
    arguments = experts(D=64, E=5, width=32, shared=32, bits=4, group=32, dtype=F32)
    ids = torch.tensor([4, 1], dtype=torch.int32, device=common.DEVICE).expand(1, tokens, 2).contiguous()
    routing = {"ids": ids, "weights": torch.full((1, tokens, 2), 0.5, device=common.DEVICE)}
    x = common.randn(1, tokens, 64, seed=1)
    expected = op(x=x, **arguments, **routing)
    sick = {name: arguments[name].clone() for name in ("gate_up_scales", "down_scales")}
    for scales in sick.values():
        scales[[0, 2, 3]] = NAN
    common.assert_bitwise_equal(op(x=x, **{**arguments, **sick}, **routing), expected)


@pytest.mark.slow
@pytest.mark.parametrize("op, tokens", [(moe.moe_decode, 2), (moe_prefill.moe_prefill, 9)])
def test_an_expert_with_a_share_of_zero_adds_nothing(op, tokens):
    arguments = experts(D=64, E=4, width=32, shared=32, bits=4, group=32, dtype=F32)
    x = common.randn(1, tokens, 64, seed=1)
    shape = (1, tokens, 2)
    pair = torch.tensor([2, 1], dtype=torch.int32, device=common.DEVICE).expand(shape).contiguous()
    shares = torch.tensor([1.0, 0.0], device=common.DEVICE).expand(shape).contiguous()
    alone = op(x=x, ids=pair[..., :1].contiguous(), weights=shares[..., :1].contiguous(), **arguments)
    common.assert_close_ratio(op(x=x, ids=pair, weights=shares, **arguments), alone, 1e-6)


# --- KV cache


@pytest.mark.parametrize("op", [attention_splits.sdpa_decode_splitk, attention.sdpa_decode_tiled])
@pytest.mark.parametrize("position", [0, 1, 30, 31, 32, 62])
def test_a_poisoned_tail_has_no_effect(op, position):
    """NaN and infinity beyond the slots in use: bitwise what zeros there give."""
    case = make_attention_case(1, 1, 4, 2, 32, F32, [position], 64)
    clean = {k: torch.nan_to_num(v) if k.endswith("cache") else v for k, v in case.items()}
    expected = op(**clean)
    common.assert_bitwise_equal(op(**case), expected)
    for name in ("k_cache", "v_cache"):
        case[name][:, :, position + 1 :] = float("inf")
    common.assert_bitwise_equal(op(**case), expected)


def test_a_poisoned_tail_has_no_effect_on_a_prompt():
    case = make_attention_case(1, 7, 4, 2, 32, F32, [20], 64)
    clean = {k: torch.nan_to_num(v) if k.endswith("cache") else v for k, v in case.items()}
    common.assert_bitwise_equal(attention.sdpa_prefill(**case), attention.sdpa_prefill(**clean))


def test_a_bfloat16_step_is_the_definition_within_its_own_rounding():
    """Against the definition on the same bfloat16 inputs, carried in float32: the state must not be rounded on the way."""
    case = make_case(1, 6, (1, 2), (16, 16), BF16)
    wide = {k: v.float() if torch.is_tensor(v) else v for k, v in case.items()}
    actual, expected = run(gdn_decode, case, [1] * 6), run(definition, wide)
    common.assert_close_ratio(actual[0].float(), expected[0], DECODE_TOL[BF16], "output")
    common.assert_close_ratio(actual[2], expected[2], 1e-5, "recurrent_state")
