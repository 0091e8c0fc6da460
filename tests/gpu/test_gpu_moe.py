"""Router and experts on the device at the shapes of Qwen3.5-35B-A3B."""

from __future__ import annotations

import pytest
import torch
from kernels_common import TOLERANCE, assert_bitwise_equal, assert_close_ratio, poisoned_empty, randn
from moeexp_kernels.bench import candidates
from moeexp_kernels.ops.moe import decode_formats, moe_decode, moe_decode_tile
from moeexp_kernels.ops.moe_packed import packing
from moeexp_kernels.ops.moe_prefill import moe_prefill
from moeexp_kernels.ops.moe_reference import reference_moe_decode
from moeexp_kernels.ops.moe_sort import sort_by_expert
from moeexp_kernels.ops.router import reference_router, router, router_packed
from moeexp_kernels.parts import tuning
from test_kernels_moe import choices, experts, route
from tolerances import tolerance

pytestmark = pytest.mark.usefixtures("exact_reference")
BIG = {"D": 2048, "E": 256, "width": 512, "shared": 512, "group": 128}
SMALL = {"D": 1152, "E": 12, "width": 192, "shared": 384, "group": 96}
PREFILL_TOLERANCE = tolerance("moe prefill")


def reference(x, arguments):
    """`reference_moe_decode` in slices of tokens: it gathers every token's experts in float32."""
    parts = []
    for start in range(0, x.shape[1], 4):
        here = {name: arguments[name][:, start : start + 4] for name in ("ids", "weights")}
        parts.append(reference_moe_decode(x=x[:, start : start + 4].float(), **(arguments | here)))
    return torch.cat(parts, dim=1)


def check(op, *, tokens, shapes, bits, dtype, k, routing=None, runs=20):
    seed = torch.randint(0, 2**31, ()).item()
    x = randn(1, tokens, shapes["D"], seed=seed, dtype=dtype)
    arguments = experts(**shapes, bits=bits, dtype=dtype)
    arguments |= choices(1, tokens, k=k, E=shapes["E"], seed=seed) if routing is None else routing
    with poisoned_empty():
        y = op(x=x, **arguments)
    expected = reference(x, arguments)
    assert_close_ratio(y.float(), expected, (TOLERANCE if op is moe_decode else PREFILL_TOLERANCE)[dtype], f"seed {seed}")
    # The residual hides the experts' own error: here without it. Rounding x + experts to bfloat16 costs up to 2^-8 of x,
    # which is ten times the experts' output: 4 % of it.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert_close_ratio(y.float() - x.float(), expected - x.float(), tolerance, f"experts alone, seed {seed}")
    for run in range(runs):
        assert_bitwise_equal(op(x=x, **arguments), y, f"run {run}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, (4, 8)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_decode(tokens, bits, dtype):
    check(moe_decode, tokens=tokens, shapes=BIG, bits=bits, dtype=dtype, k=8)


def on_packed_rows(*, x, norm_weight, eps, ids, weights, **stored):
    """`moe_decode` of few tokens, on rows that a router packed."""
    form = packing(decode_formats(stored, features=x.shape[-1]), rows=x.shape[1])
    trace = torch.zeros(*ids.shape, dtype=torch.int32, device=x.device)
    _, _, packed = router_packed(
        x=x, norm_weight=norm_weight, weight=x.new_zeros(ids.shape[-1], x.shape[-1]), eps=eps, top_k=ids.shape[-1],
        positions=torch.zeros(1, dtype=torch.int64, device=x.device), expert_ids=trace, shared_gate=stored["shared_gate"], **form,
    )  # fmt: skip
    return moe_decode(x=x, norm_weight=norm_weight, eps=eps, ids=ids, weights=weights, packed=packed, **stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "shapes"), [(4, BIG), (8, BIG), (4, SMALL | {"group": 64}), (8, SMALL | {"group": 64})])
@pytest.mark.parametrize("tokens", [1, 2, 16, 32])
def test_decode_on_packed_rows(tokens, bits, shapes, dtype):
    """Also rows that are no power of 2 of words, and a shared expert wider than the others."""
    check(on_packed_rows, tokens=tokens, shapes=shapes, bits=bits, dtype=dtype, k=8)


@pytest.mark.parametrize("tokens", [2, 24])
def test_launch_parameters_of_packed_rows_change_no_bit(tokens):
    arguments = many_tokens(torch.bfloat16, tokens=tokens)
    row, expected = tuning.lookup("moe_gate_up_packed", "int4/2048x512"), on_packed_rows(**arguments)
    for change in candidates.GATE_UP_PACKED:
        with tuning.override("moe_gate_up_packed", "int4", row | change), poisoned_empty():
            assert_bitwise_equal(on_packed_rows(**arguments), expected, f"{change}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 9, 32])
def test_the_tile(tokens, bits, dtype):
    check(moe_decode_tile, tokens=tokens, shapes=BIG, bits=bits, dtype=dtype, k=8)


def test_all_tokens_to_the_same_experts_on_the_tile():
    ids = torch.tensor([255, 0, 7], dtype=torch.int32, device="cuda").expand(1, 29, 3).contiguous()
    routing = {"ids": ids, "weights": torch.full((1, 29, 3), 0.3, device="cuda")}
    check(moe_decode_tile, tokens=29, shapes=BIG, bits=4, dtype=torch.bfloat16, k=3, routing=routing)


PER_TOKEN = ("x", "ids", "weights")


def many_tokens(dtype, bits=4, tokens=32):
    x = randn(1, tokens, BIG["D"], seed=1, dtype=dtype)
    x[0, tokens // 4] *= 300.0
    return {"x": x, **experts(**BIG, bits=bits, dtype=dtype), **choices(1, tokens, k=8, E=BIG["E"], seed=2)}


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (4, torch.float32), (8, torch.bfloat16)])
def test_a_row_of_the_experts_is_the_same_to_the_bit_among_1_to_32_rows(bits, dtype):
    arguments = many_tokens(dtype, bits)
    arguments["ids"][0, 9:21] = arguments["ids"][0, 9]  # twelve tokens of the same experts: more than one program takes

    def some(rows):
        return moe_decode_tile(**(arguments | {name: arguments[name][:, rows].contiguous() for name in PER_TOKEN}))

    whole = some(slice(0, 32))
    for count in range(1, 33):
        for first in {0, 32 - count}:
            rows = slice(first, first + count)
            assert_bitwise_equal(some(rows), whole[:, rows], f"rows {first} to {first + count}")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).cuda()
    assert_bitwise_equal(some(order), whole[:, order], "in another order")


def test_launch_parameters_of_the_experts_tile_change_no_bit():
    arguments = many_tokens(torch.bfloat16, tokens=19)
    row, expected = tuning.lookup("moe_tile", "int4/2048x512/24"), moe_decode_tile(**arguments)
    for change in candidates.MOE_TILE:
        with tuning.override("moe_tile", "int4", row | change), poisoned_empty():
            assert_bitwise_equal(moe_decode_tile(**arguments), expected, f"{change}")


def test_the_experts_tile_computes_what_the_interpreted_one_does_bitwise(monkeypatch):
    """Without PTX and with the groups' sums in an order that is written out, instead of the one in which warps are joined."""
    from moeexp_kernels.ops import moe_tile as module

    arguments, outputs, wrap = many_tokens(torch.bfloat16, tokens=11), [], module.wrap_triton
    for changes in ({}, {"INTERPRETED": True, "SPLIT": 1}):

        class Launch:
            def __init__(self, kernel):
                self.kernel = wrap(kernel)

            def __getitem__(self, grid, changes=changes):
                return lambda *arguments, **constants: self.kernel[grid](
                    *arguments, **{k: changes.get(k, v) for k, v in constants.items()}
                )

        monkeypatch.setattr(module, "wrap_triton", Launch)
        outputs.append(moe_decode_tile(**arguments))
    assert_bitwise_equal(outputs[0], outputs[1])


def test_a_row_of_the_router_is_the_same_to_the_bit_among_1_to_32_rows():
    x = randn(32, 1, 2048, seed=1, dtype=torch.bfloat16)
    ids, weights, _ = route(router, x, E=256, k=8, S=512)
    for count in (1, 2, 8, 9, 31):
        some = route(router, x[:count], E=256, k=8, S=512)
        assert_bitwise_equal(some[0], ids[:count], f"{count} rows")
        assert_bitwise_equal(some[1], weights[:count], f"{count} rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("op", [moe_decode, moe_prefill])
@pytest.mark.parametrize("k", [1, 5])
def test_odd_shapes(k, op, bits, dtype):
    """E and k no powers of 2, another width for the shared expert."""
    check(op, tokens=2 if op is moe_decode else 75, shapes=SMALL, bits=bits, dtype=dtype, k=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [9, 65, 512])
def test_prefill(tokens, bits, dtype):
    check(moe_prefill, tokens=tokens, shapes=BIG, bits=bits, dtype=dtype, k=8, runs=20 if tokens < 512 else 3)


def test_prefill_plain():
    check(moe_prefill, tokens=64, shapes=BIG | {"E": 32}, bits=16, dtype=torch.bfloat16, k=8)


@pytest.mark.parametrize("expert", [0, 255])
def test_all_tokens_to_one_expert(expert):
    ids = torch.full((1, 130, 1), expert, dtype=torch.int32, device="cuda")
    routing = {"ids": ids, "weights": torch.ones(1, 130, 1, device="cuda")}
    check(moe_prefill, tokens=130, shapes=BIG, bits=4, dtype=torch.bfloat16, k=1, routing=routing)


def test_expert_offsets_beyond_2_to_the_31():
    """Only the last two of 1,100 plain experts are used: they begin 2.3e9 elements into gate_up."""
    shapes = BIG | {"E": 2}
    few = experts(**shapes, bits=16, dtype=torch.bfloat16)
    big = dict(few)
    count = 1100  # x 2,097,152 elements of gate_up = 2.3e9
    for name in ("gate_up", "down"):
        big[name] = torch.zeros(count, *few[name].shape[1:], dtype=torch.bfloat16, device="cuda")
        big[name][-2:] = few[name]
    for op, tokens in ((moe_decode, 1), (moe_prefill, 33)):
        x = randn(1, tokens, BIG["D"], seed=1, dtype=torch.bfloat16)
        picked = choices(1, tokens, k=2, E=2)
        moved = {"ids": picked["ids"] + (count - 2), "weights": picked["weights"]}
        assert_bitwise_equal(op(x=x, **(big | moved)), op(x=x, **(few | picked)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("E", "k"), [(256, 8), (200, 10), (60, 1), (512, 16)])
@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 300])
def test_router(tokens, E, k, dtype):
    x = randn(1, tokens, 2048, seed=torch.randint(0, 2**31, ()).item(), dtype=dtype)
    with poisoned_empty():
        ids, weights, trace = route(router, x, E=E, k=k, S=512)
    # Of all experts in their order: a near-tie may fall either way in the last bits, and nothing else.
    order, shares, _ = route(reference_router, x, E=E, k=E, S=512)
    logits = torch.empty_like(shares).scatter_(-1, order.long(), shares.log())
    assert (logits.gather(-1, ids.long()) - shares[..., :k].log()).abs().max() < 1e-4
    assert all(row.unique().numel() == k for row in ids.flatten(0, 1))
    same = (ids == order[..., :k]).all(-1)
    expected = shares[..., :k] / shares[..., :k].sum(-1, keepdim=True)
    assert same.any() and (weights[same] - expected[same]).abs().max() < 1e-5
    assert torch.equal(trace[:, :tokens], ids)
    assert_close_ratio(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-6)
    for run in range(20):
        again = route(router, x, E=E, k=k, S=512)
        assert_bitwise_equal(again[0], ids, f"run {run}")
        assert_bitwise_equal(again[1], weights, f"run {run}")


@pytest.mark.parametrize("tokens", [1, 40])
def test_router_chooses_as_float32_would_on_the_same_bfloat16_weights(tokens):
    x = randn(1, tokens, 2048, seed=3, dtype=torch.bfloat16)
    weight = randn(256, 2048, seed=4, scale=2048**-0.5, dtype=torch.bfloat16)
    ids, weights, _ = route(router, x, E=256, k=8, S=64, weight=weight)
    expected, shares, _ = route(reference_router, x, E=256, k=8, S=64, weight=weight)
    assert (ids != expected).float().mean() < 5e-3
    same = (ids == expected).all(-1)
    assert_close_ratio(weights[same], shares[same], 1e-4, "weights")


def test_sort_at_size():
    ids = choices(4, 1024, k=8, E=256)["ids"]
    order, lists = sort_by_expert(ids=ids, experts=256, heights=(128, 64, 32))
    flat = ids.flatten()
    assert torch.equal(order.long(), flat.argsort(stable=True))
    rows = torch.cat([blocks[blocks[:, 2] > 0] for blocks in lists])
    assert rows[:, 2].sum() == flat.numel() and all(blocks[:, 2].max() > 0 for blocks in lists)
    for expert, first, pairs in rows.tolist():
        assert (flat[order[first : first + pairs].long()] == expert).all()


def test_in_a_cuda_graph():
    for op, tokens in ((moe_decode, 1), (moe_decode_tile, 12), (moe_prefill, 33)):
        x = randn(1, tokens, 1152, seed=1, dtype=torch.bfloat16)
        shapes = SMALL | ({"width": 384, "group": 128} if op is moe_decode_tile else {})
        arguments = experts(**shapes, bits=4, dtype=torch.bfloat16) | choices(1, tokens, k=3, E=12)
        eager = op(x=x, **arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(x=x, **arguments)
        y.fill_(float("nan"))
        graph.replay()
        assert_bitwise_equal(y, eager)
