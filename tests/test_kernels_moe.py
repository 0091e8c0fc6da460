"""Router and experts against their references, interpreted or on the device. Real shapes: gpu/test_gpu_moe.py."""

from __future__ import annotations

import pytest
import torch
import triton
from kernels_common import (
    DEVICE,
    Guarded,
    assert_bitwise_equal,
    assert_close_ratio,
    expect_value_error,
    poison,
    poisoned_empty,
    randn,
)
from moeexp_kernels.ops import moe_packed
from moeexp_kernels.ops.moe import moe_decode, route_decode
from moeexp_kernels.ops.moe_packed import order_pairs, order_pairs_kernel
from moeexp_kernels.ops.moe_prefill import HEIGHTS, has_order, moe_prefill, scales_after, served_heights, shared_ranges
from moeexp_kernels.ops.moe_reference import reference_moe_decode
from moeexp_kernels.ops.moe_sort import block_bounds, sort_by_expert
from moeexp_kernels.ops.router import reference_router, router, router_packed
from moeexp_kernels.parts import tuning
from test_kernels_linear import quantised
from tolerances import tolerance

TOLERANCE = tolerance("moe decode")


def experts(*, D, E, width, shared, bits, group, dtype) -> dict:
    stored = {}
    for seed, (name, shape) in enumerate(
        {
            "gate_up": (E, 2 * width, D),
            "down": (E, D, width),
            "shared_gate_up": (2 * shared, D),
            "shared_down": (D, shared),
        }.items()
    ):
        kind = bits if isinstance(bits, int) else bits[0 if seed < 2 else 1]
        stored[name], stored[f"{name}_scales"] = quantised(*shape, bits=kind, group=group, seed=seed, dtype=dtype)
    return stored | {
        "shared_gate": randn(1, D, seed=9, dtype=dtype),
        "norm_weight": randn(D, seed=8, scale=0.2),
        "eps": 1e-6,
    }


def choices(*shape: int, k: int, E: int, seed: int = 0):
    """Distinct random experts and shares that sum to 1, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*shape, E, generator=generator)
    weights, ids = scores.topk(k, dim=-1)
    return {
        "ids": ids.to(device=DEVICE, dtype=torch.int32),
        "weights": (weights / weights.sum(-1, keepdim=True)).to(DEVICE),
    }


def check_experts(op, *, rows, D=64, E=4, k=2, width=32, shared=32, bits=4, group=32, dtype=torch.float32, routing=None):
    x = Guarded(randn(*rows, D, seed=1, dtype=dtype))
    arguments = experts(D=D, E=E, width=width, shared=shared, bits=bits, group=group, dtype=dtype)
    arguments |= choices(*rows, k=k, E=E) if routing is None else routing
    guarded = Guarded(arguments["down"])
    with poisoned_empty():
        y = op(x=x.tensor, **(arguments | {"down": guarded.tensor}))
    reference = reference_moe_decode(x=x.tensor.float(), **arguments)
    assert y.dtype == dtype
    assert_close_ratio(y.float(), reference, TOLERANCE[dtype], "experts")
    x.check("x")
    guarded.check("down")


# --- router ---


def route(op, x, *, E, k, S=12, positions=None, weight=None, calls=1):
    """(ids, weights, trace [B, S, k]) of the last of `calls` calls in a row on one trace."""
    D = x.shape[-1]
    weight = randn(E, D, seed=5, scale=D**-0.5, dtype=x.dtype) if weight is None else weight
    positions = torch.arange(x.shape[0], device=DEVICE) * 3 if positions is None else positions
    trace = Guarded(poison(x.shape[0], S, k, dtype=torch.int32))
    norm = randn(D, seed=6, scale=0.2)
    for _ in range(calls):
        ids, weights = op(x=x, norm_weight=norm, weight=weight, eps=1e-6, top_k=k, positions=positions, expert_ids=trace.tensor)
    trace.check("expert_ids")
    return ids, weights, trace.tensor


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
)
@pytest.mark.parametrize(
    ("shape", "E", "k"),
    [
        ((1, 1), 16, 4),
        ((2, 3), 5, 3),
        ((1, 9), 6, 1),
        ((2, 5), 8, 8),
        pytest.param((8, 1), 11, 2, marks=pytest.mark.slow),
        ((1, 8), 1, 1),
        pytest.param((3, 1), 40, 16, marks=pytest.mark.slow),
        ((1, 33), 6, 2),
    ],
)
def test_router(shape, E, k, dtype):
    """Ids, shares and the trace; E that is no power of 2, k = 1 and k = E, few tokens and many; a second call after the
    first. In a 2-byte dtype on values that it holds, whose products then are the reference's to rounding."""
    x = randn(*shape, 64, seed=1).to(dtype)
    with poisoned_empty():
        ids, weights, trace = route(router, x, E=E, k=k, S=40, calls=2)
    expected_ids, expected_weights, expected_trace = route(reference_router, x, E=E, k=k, S=40)
    assert torch.equal(ids, expected_ids) and ids.dtype == torch.int32
    assert torch.equal(trace, expected_trace)
    assert_close_ratio(weights, expected_weights, 1e-5, "weights")


def test_a_trace_within_a_larger_one():
    """Strides are the trace's own."""
    x, E, k = randn(2, 1, 32, seed=1), 6, 3
    whole = poison(4, 10, 8, dtype=torch.int32)
    trace = whole[::2, 2:8, 4:7]
    before = whole.clone()
    arguments = {"norm_weight": randn(32, seed=6), "weight": randn(E, 32, seed=5), "eps": 1e-6, "top_k": k}
    positions = torch.tensor([0, 4], device=DEVICE)
    ids, _ = router(x=x, **arguments, positions=positions, expert_ids=trace)
    before[0, 2, 4:7], before[2, 6, 4:7] = ids[0, 0], ids[1, 0]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("tokens", [1, 9])
def test_equal_logits_choose_the_lowest_indices(tokens):
    ids, weights, _ = route(router, randn(1, tokens, 32, seed=1), E=7, k=3, weight=torch.zeros(7, 32, device=DEVICE))
    assert torch.equal(ids, torch.arange(3, dtype=torch.int32, device=DEVICE).expand(1, tokens, 3))
    assert_close_ratio(weights, torch.full_like(weights, 1 / 3), 1e-6, "weights")


def test_large_logits_do_not_overflow_and_a_nan_stays_seen():
    x = randn(1, 1, 32, seed=1)
    weight = randn(6, 32, seed=2) * 1e4
    ids, weights, _ = route(router, x, E=6, k=2, weight=weight)
    expected, shares, _ = route(reference_router, x, E=6, k=2, weight=weight)
    assert torch.equal(ids, expected) and torch.allclose(weights, shares, atol=1e-5)
    weight[3, 0] = float("nan")
    ids, weights, _ = route(router, x, E=6, k=2, weight=weight)
    assert weights.isnan().any() and bool(((ids >= 0) & (ids < 6)).all())


@pytest.mark.parametrize("position", [-1, 12, 2**40])
def test_positions_outside_the_trace_write_nothing(position):
    _, _, trace = route(router, randn(1, 1, 32, seed=1), E=4, k=2, positions=torch.tensor([position], device=DEVICE))
    assert torch.equal(trace, poison(1, 12, 2, dtype=torch.int32))


def test_tokens_beyond_the_trace_write_nothing():
    """Of three tokens at the last position but one, two have a slot; the third's would be another's memory."""
    ids, _, trace = route(router, randn(1, 3, 32, seed=1), E=4, k=2, positions=torch.tensor([10], device=DEVICE))
    assert torch.equal(trace[:, 10:], ids[:, :2])
    assert torch.equal(trace[:, :10], poison(1, 10, 2, dtype=torch.int32))


@pytest.mark.parametrize("position", [-1, 11, 12])
def test_the_reference_refuses_positions_outside_the_trace(position):
    """On the CPU: on a GPU an index that is none ends the process. Two tokens, the slots 0 to 11."""
    trace = torch.zeros(1, 12, 2, dtype=torch.int32)
    arguments = {"norm_weight": torch.zeros(32), "weight": randn(4, 32, seed=5, device="cpu"), "eps": 1e-6, "top_k": 2}
    with pytest.raises(IndexError):
        reference_router(
            x=randn(1, 2, 32, seed=1, device="cpu"), **arguments, positions=torch.tensor([position]), expert_ids=trace
        )


def test_router_refusals():
    x = randn(1, 1, 32, seed=1)
    arguments = {"x": x, "norm_weight": randn(32, seed=6), "weight": randn(4, 32, seed=5), "eps": 1e-6, "top_k": 2}
    arguments["positions"] = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def refused(*shape, words, dtype=torch.int32):
        trace = torch.zeros(shape, dtype=dtype, device=DEVICE)
        expect_value_error(lambda: router(**arguments, expert_ids=trace), "expert_ids", *words)

    refused(12, 2, words=["(12, 2)", "[1, S, 2]"])
    expect_value_error(lambda: route(router, x, E=4, k=5), "top_k=5", "1..4")
    refused(1, 12, 2, words=["int64", "int32"], dtype=torch.int64)
    refused(1, 12, 3, words=["(1, 12, 3)", "[1, S, 2]"])
    refused(2, 12, 2, words=["(2, 12, 2)", "[1, S, 2]"])


# --- experts ---


@pytest.mark.parametrize("bits", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_decode(bits):
    check_experts(moe_decode, rows=(1, 1), bits=bits)


@pytest.mark.slow
def test_decode_shared_expert_of_another_width():
    check_experts(moe_decode, rows=(1, 1), D=32, k=3, E=5, width=32, shared=16, group=16)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_prefill(bits):
    check_experts(moe_prefill, rows=(2, 5), bits=bits)


def test_prefill_bfloat16_and_odd_sizes():
    check_experts(moe_prefill, rows=(1, 11), D=48, E=5, k=3, width=24, shared=16, group=8, dtype=torch.bfloat16)


def heights_row(heights, blocks, *, after):
    both = {"gate_up": blocks | {"AFTER": after}, "down": blocks}
    return {name: {"height": height, **both} for name, height in zip((*HEIGHTS, "least"), (*heights, heights[-1]), strict=True)}


@pytest.mark.parametrize("tokens", [15, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (100, 130))])
def test_prefill_where_blocks_of_each_height_serve(tokens):
    """Heights of 8, 4 and 2: whole blocks, what is left of each size, and the shared expert in each height's launch."""
    blocks = {"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    row = heights_row((8, 4, 2), blocks, after=False)
    served = [least <= tokens < beyond for least, beyond in shared_ranges((8, 4, 2))]
    assert served == {15: [False, False, True], 100: [False, True, False], 130: [True, False, False]}[tokens]
    with tuning.override("moe_prefill", "single", row):
        check_experts(moe_prefill, rows=(1, tokens))


def test_prefill_scales_after_the_product():
    """int4 in bfloat16 whose tile is one group; the same row serves float32 and int8, which are scaled before."""
    blocks = {"BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    row = heights_row((16, 16, 16), blocks, after=True)
    assert scales_after(row["low"]["gate_up"], bits=4, group=32, dtype=torch.bfloat16)
    assert not scales_after(row["low"]["gate_up"], bits=4, group=32, dtype=torch.float32)
    with tuning.override("moe_prefill", "", row):
        check_experts(moe_prefill, rows=(1, 21), dtype=torch.bfloat16)
        check_experts(moe_prefill, rows=(1, 21))
        check_experts(moe_prefill, rows=(1, 21), dtype=torch.bfloat16, bits=8)


def test_few_pairs_run_in_low_blocks_alone():
    config = {name: {"height": height} for name, height in zip((*HEIGHTS, "least"), (128, 64, 32, 16), strict=True)}

    def heights(pairs):
        return [row["height"] for row in served_heights(pairs=pairs, experts=256, config=config)]

    assert heights(8) == heights(4096) == [32, 16] and heights(4097) == [128, 64, 32]


@pytest.mark.parametrize("mixed", ["groups of 32", "groups of 16", "int8", "int8 and int4", "a shared expert of other groups"])
def test_prefill_of_weights_in_the_order_of_the_product(mixed):
    """Groups of whole 32 weights in 2 bytes, of which the activations stand in another order, and groups that allow none; gate
    and up whose down, or a shared expert, is of the other kind."""
    assert has_order(bits=4, group=32, dtype=torch.bfloat16) and not has_order(bits=4, group=16, dtype=torch.bfloat16)
    shapes = {"D": 64, "E": 4, "width": 32, "shared": 32, "dtype": torch.bfloat16}
    arguments = experts(**shapes, bits=8 if "int8" in mixed else 4, group=16 if mixed == "groups of 16" else 32)
    other = experts(**shapes, bits=4, group=16)
    replaced = {"int8 and int4": ("down", "down_scales"), "a shared expert of other groups": [n for n in other if "shared" in n]}
    arguments |= {name: other[name] for name in replaced.get(mixed, ()) if name != "shared_gate"}
    x = randn(1, 21, 64, seed=1, dtype=torch.bfloat16)
    arguments |= choices(1, 21, k=2, E=4)
    with poisoned_empty():
        y = moe_prefill(x=x, **arguments)
    assert_close_ratio(y.float(), reference_moe_decode(x=x.float(), **arguments), TOLERANCE[torch.bfloat16], "experts")


def test_each_number_of_tokens_has_one_height_for_the_shared_expert():
    for heights in ((128, 64, 32), (32, 32, 16), (16, 16, 16)):
        ranges = shared_ranges(heights)
        assert all(sum(least <= tokens < beyond for least, beyond in ranges) == 1 for tokens in range(1, 5000, 7))


@pytest.mark.parametrize("op", [moe_decode, moe_prefill])
def test_all_tokens_to_one_expert(op):
    rows = (1, 1) if op is moe_decode else (1, 40)
    ids = torch.full((*rows, 1), 2, dtype=torch.int32, device=DEVICE)
    check_experts(op, rows=rows, k=1, routing={"ids": ids, "weights": torch.ones(*rows, 1, device=DEVICE)})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16, (4, 8), (8, 16), (16, 4)])
@pytest.mark.parametrize(("op", "rows"), [(moe_decode, (2, 2)), (moe_prefill, (1, 17))])
def test_formats_of_routed_and_shared_may_differ(op, rows, bits, dtype):
    check_experts(op, rows=rows, D=48, E=5, k=3, width=32, shared=16, bits=bits, group=16, dtype=dtype)


@pytest.mark.parametrize("bits", [4, 16, (4, 16), (8, 16), (16, 4)])
def test_prefill_hands_a_kernel_weights_of_one_type(bits, monkeypatch):
    """The compiled kernel takes one of two pointers; the interpreter would take any two."""
    from moeexp_kernels.ops import moe_prefill as module

    pairs, wrap = [], module.wrap_triton

    class Launch:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                named = dict(zip(self.kernel.arg_names, arguments, strict=False))
                if "shared_w_ptr" in named:
                    pairs.extend((named[name], named[f"shared_{name}"]) for name in ("w_ptr", "s_ptr"))
                wrap(self.kernel)[grid](*arguments, **constants)

            return launch

    monkeypatch.setattr(module, "wrap_triton", Launch)
    check_experts(moe_prefill, rows=(1, 5), bits=bits, dtype=torch.bfloat16)
    assert pairs and all(one.dtype == other.dtype for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4])
def test_decode_one_and_all_experts(k):
    check_experts(moe_decode, rows=(1, 3), k=k, D=32, width=16, shared=32, group=16)


def test_an_overflowing_expert_that_nobody_chose_has_no_effect():
    arguments = experts(D=32, E=3, width=16, shared=16, bits=16, group=16, dtype=torch.float32)
    arguments["gate_up"][1] = float("inf")
    ids = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE).expand(1, 9, 2).contiguous()
    weights = torch.full((1, 9, 2), 0.5, device=DEVICE)
    x = randn(1, 9, 32, seed=1)
    prefill = moe_prefill(x=x, ids=ids, weights=weights, **arguments)
    few = {"x": x[:, :1].contiguous(), "ids": ids[:, :1].contiguous(), "weights": weights[:, :1].contiguous()}
    assert prefill.isfinite().all()
    assert_close_ratio(moe_decode(**few, **arguments), prefill[:, :1], 1e-5, "decode against prefill")


def test_experts_refusals():
    arguments = experts(D=32, E=3, width=16, shared=16, bits=16, group=16, dtype=torch.float32) | choices(1, 1, k=2, E=3)
    x = randn(1, 1, 32, seed=1)
    narrow = arguments | {"down": arguments["down"][:, :16].contiguous()}
    strided = arguments | {"down": arguments["down"].transpose(0, 1).contiguous().transpose(0, 1)}
    for op in (moe_decode, moe_prefill):
        expect_value_error(lambda op=op: op(x=x, **narrow), "down", "16", "32")
        expect_value_error(lambda op=op: op(x=x, **strided), "down", "contiguous")


@pytest.mark.slow
def test_decode_repeats_bitwise():
    arguments = experts(D=32, E=3, width=16, shared=16, bits=4, group=16, dtype=torch.float32) | choices(1, 1, k=2, E=3)
    x = randn(1, 1, 32, seed=1)
    assert_bitwise_equal(moe_decode(x=x, **arguments), moe_decode(x=x, **arguments))


# --- the sort by expert ---


@pytest.mark.parametrize("heights", [(8, 4, 2), (4, 4, 4), (16, 4, 4), (8, 2), (4,)])
@pytest.mark.parametrize("case", ["random", "one expert", "last expert", "each once", "none of most"])
def test_sort_by_expert(case, heights):
    """Every pair once, its expert's together and in token order; tallest blocks first, then the lowest that holds the rest."""
    E = 6
    ids = {
        "random": torch.randint(0, E, (17, 2), generator=torch.Generator().manual_seed(1)),
        "one expert": torch.zeros(33, 1),
        "last expert": torch.full((8, 1), E - 1),
        "each once": torch.arange(E).view(-1, 1),
        "none of most": torch.tensor([[3], [1], [3], [3], [3], [3]]),
    }[case].to(device=DEVICE, dtype=torch.int32)
    total = ids.numel()
    with poisoned_empty():
        order, lists = sort_by_expert(ids=ids, experts=E, heights=heights)
    assert order.tolist() == ids.flatten().argsort(stable=True).tolist()
    expected, first = [[] for _ in heights], 0
    for e in range(E):
        count = (ids == e).sum().item()
        whole = count // heights[0] * heights[0]
        expected[0] += [[e, first + start, heights[0]] for start in range(0, whole, heights[0])]
        if left := count - whole:
            height = max(which for which in range(len(heights)) if heights[which] >= left)
            expected[height].append([e, first + whole, left])
        first += count
    bounds = block_bounds(pairs=total, experts=E, heights=heights)
    for found, wanted, bound in zip(lists, expected, bounds, strict=True):
        assert found.tolist() == wanted + [[0, 0, 0]] * (bound - len(wanted))


# --- rows that the router packs for the experts ---


@pytest.mark.parametrize(
    ("tokens", "D", "bits", "group", "shared", "dtype"),
    [
        (1, 64, 8, 32, 32, torch.bfloat16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            (1, 96, 4, 32, 64, torch.float32), (1, 192, 4, 64, 64, torch.bfloat16), (1, 64, (8, 4), 32, 96, torch.float32),
            (2, 96, 4, 32, 64, torch.float32), (2, 64, (4, 8), 32, 96, torch.bfloat16),
            (1, 96, 8, 32, 32, torch.float32), (2, 64, 4, 32, 32, torch.bfloat16))),
    ],
)  # fmt: skip
def test_experts_on_rows_that_the_router_packed(tokens, D, bits, group, shared, dtype):
    """Ids, shares and trace are the router's to the bit; the experts' result is as near to the reference as without. Rows that
    are no power of 2 of words, a shared expert wider than the others, both storages, one limb and two, and gate/up stored
    otherwise than down."""
    E, k, width = 4, 3, max(32, group)
    x = randn(tokens, 1, D, seed=1, dtype=dtype)
    stored = experts(D=D, E=E, width=width, shared=shared, bits=bits, group=group, dtype=dtype)
    if isinstance(bits, tuple):
        one, other = (experts(D=D, E=E, width=width, shared=shared, bits=kind, group=group, dtype=dtype) for kind in bits)
        stored |= {name: (other if "down" in name else one)[name] for name in stored if "gate_up" in name or "down" in name}
    common = {"x": x, "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps")}
    trace, plain = (torch.zeros(tokens, 4, k, dtype=torch.int32, device=DEVICE) for _ in range(2))
    choice = common | {"weight": randn(E, D, seed=5, scale=D**-0.5, dtype=dtype), "top_k": k}
    choice["positions"] = torch.ones(tokens, dtype=torch.int64, device=DEVICE)
    with poisoned_empty():
        chosen = route_decode(choice | {"expert_ids": trace}, stored)
        y = moe_decode(**common, **chosen, **stored)
        ids, weights = router(**choice, expert_ids=plain)
    assert chosen["packed"].dtype == torch.int32
    assert torch.equal(chosen["ids"], ids) and torch.equal(chosen["weights"], weights) and torch.equal(trace, plain)
    reference = reference_moe_decode(**(common | {"x": x.float()}), ids=ids, weights=weights, **stored)
    assert_close_ratio(y.float(), reference, TOLERANCE[dtype], "experts on packed rows")
    without = moe_decode(**common, ids=ids, weights=weights, **stored)
    assert_close_ratio(y.float(), without.float(), TOLERANCE[dtype], "packed rows and none")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_program_that_packs_more_vectors_than_are_left_writes_none_of_its_neighbours(bits):
    """64 rows a program, of which an expert has 96 and the shared one, whose piece of a token's row comes last, 32."""
    D, width, shared = 32, 96, 32
    stored = experts(D=D, E=4, width=width, shared=shared, bits=bits, group=32, dtype=torch.float32)
    common = {"x": randn(2, 1, D, seed=1), "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps")}
    choice = common | {"weight": randn(4, D, seed=5, scale=D**-0.5), "top_k": 2}
    choice |= {"positions": torch.zeros(2, dtype=torch.int64, device=DEVICE)}
    choice |= {"expert_ids": torch.zeros(2, 1, 2, dtype=torch.int32, device=DEVICE)}
    results = []
    for row in ({}, {"EACH": 4, "num_warps": 16}):
        found = tuning.lookup("moe_gate_up_packed", f"int{bits}")
        with tuning.override("moe_gate_up_packed", f"int{bits}", found | row), poisoned_empty():
            results.append(moe_decode(**common, **route_decode(choice, stored), **stored))
    assert results[0].isfinite().all()
    assert_bitwise_equal(results[1], results[0], "programs of other sizes")


@pytest.mark.slow
def test_programs_in_the_order_of_experts_change_no_bit(monkeypatch):
    """Of three tokens, some of whose experts are the same, and six pairs, which fill no block."""
    stored = experts(D=32, E=3, width=32, shared=32, bits=4, group=32, dtype=torch.bfloat16)
    common = {
        "x": randn(3, 1, 32, seed=1, dtype=torch.bfloat16),
        "norm_weight": stored.pop("norm_weight"),
        "eps": stored.pop("eps"),
    }
    choice = common | {"weight": randn(3, 32, seed=5), "top_k": 2}
    choice |= {"positions": torch.zeros(3, dtype=torch.int64, device=DEVICE)}
    chosen = route_decode(choice | {"expert_ids": torch.zeros(3, 1, 2, dtype=torch.int32, device=DEVICE)}, stored)
    row, results, ordered = tuning.lookup("moe_gate_up_packed", "int4"), [], []
    monkeypatch.setattr(moe_packed, "order_pairs", lambda ids: ordered.append(len(results)) or order_pairs(ids))
    for tokens in (None, 4, 3):  # the last from so many on, as there are
        with tuning.override("moe_gate_up_packed", "int4", row | {"BY_EXPERT": tokens}), poisoned_empty():
            results.append(moe_decode(**common, **chosen, **stored))
    assert results[0].isfinite().all() and ordered == [2]
    for result in results[1:]:
        assert_bitwise_equal(result, results[0], "expert by expert")


@pytest.mark.parametrize("pairs", [1, 15, 33])
def test_pairs_are_ordered_by_expert_and_then_by_token(pairs):
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(0, 7, (pairs,), generator=generator, dtype=torch.int32)
    order = Guarded(torch.full((pairs,), -1, dtype=torch.int32, device=DEVICE))
    order_pairs_kernel[(triton.cdiv(pairs, 8),)](
        ids.to(DEVICE), order.tensor, pairs, PADDED=triton.next_power_of_2(pairs), BLOCK_P=8, PDL=False
    )
    order.check("order")
    assert order.tensor.tolist() == sorted(expert << 16 | pair for pair, expert in enumerate(ids.tolist()))


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_packed_feature_that_is_not_finite_stays_seen(value):
    x = randn(2, 1, 64, seed=1)
    x[1, 0, 40] = value
    stored = experts(D=64, E=4, width=32, shared=32, bits=4, group=32, dtype=torch.float32)
    common = {"x": x, "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps")}
    arguments = common | {
        "weight": randn(4, 64, seed=5),
        "top_k": 2,
        "positions": torch.zeros(2, dtype=torch.int64, device=DEVICE),
    }
    chosen = route_decode(arguments | {"expert_ids": torch.zeros(2, 1, 2, dtype=torch.int32, device=DEVICE)}, stored)
    chosen["ids"] = chosen["ids"] % 4  # of NaN logits no id means anything
    y = moe_decode(**common, **chosen, **stored)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_where_nothing_is_packed():
    """Plain weights, a shared expert stored differently, more tokens than the kernels take, and as many as the tile serves."""
    for tokens, bits, group in ((1, 16, 32), (1, (4, 8), 32), (33, 4, 32), (9, 4, 64)):
        stored = experts(D=64, E=4, width=64, shared=64, bits=bits, group=group, dtype=torch.float32)
        common = {"x": randn(tokens, 1, 64, seed=1), "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps")}
        trace = torch.zeros(tokens, 1, 2, dtype=torch.int32, device=DEVICE)
        positions = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
        choice = common | {"weight": randn(4, 64, seed=5), "top_k": 2, "positions": positions, "expert_ids": trace}
        assert set(route_decode(choice, stored)) == {"ids", "weights"}, (tokens, bits)


def test_rows_that_cannot_be_packed_are_refused():
    arguments = {
        "x": randn(1, 1, 96, seed=1),
        "norm_weight": randn(96, seed=6),
        "weight": randn(4, 96, seed=5),
        "eps": 1e-6,
        "top_k": 2,
    }
    arguments |= {"positions": torch.zeros(1, dtype=torch.int64, device=DEVICE)}
    arguments |= {"expert_ids": torch.zeros(1, 1, 2, dtype=torch.int32, device=DEVICE), "shared_gate": randn(1, 96, seed=7)}
    for bits, group in ((4, 64), (4, 48), (16, 96), (8, 16)):
        expect_value_error(
            lambda bits=bits, group=group: router_packed(**arguments, pack_bits=bits, pack_group=group), f"groups of {group}"
        )
    stored = experts(D=96, E=4, width=32, shared=32, bits=4, group=32, dtype=torch.float32)
    wrong = torch.zeros(1, 7, dtype=torch.int32, device=DEVICE)
    chosen = choices(1, 1, k=2, E=4)
    expect_value_error(lambda: moe_decode(x=arguments["x"], packed=wrong, **chosen, **stored), "packed")
