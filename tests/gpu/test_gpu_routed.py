"""The choice fused into the experts' kernels, on the device at full shapes: what experts that are told it by the router do."""

from __future__ import annotations

import pytest
import torch
from kernels_common import assert_bitwise_equal, assert_close_ratio, poisoned_empty, randn
from moeexp_kernels.bench import candidates
from moeexp_kernels.ops.moe import routed_experts
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.graph_edges import add_pdl_edges
from test_kernels_moe import experts

BIG = {"D": 2048, "E": 256, "width": 512, "shared": 512, "group": 128}
MANY = {"D": 1024, "E": 512, "width": 512, "shared": 512, "group": 128}
SMALL = {"D": 1152, "E": 12, "width": 192, "shared": 384, "group": 64}
SLOTS = 16
LAYERS = 6


def run(shapes, *, tokens, each=1, bits=4, dtype=torch.bfloat16, k=8, seed=1, alike=False):
    """A function of the number of tokens up to which experts choose, and of whether gate/up tells `down`: (result, trace)."""
    stored = experts(**shapes, bits=bits, dtype=dtype)
    choice = {"x": randn(tokens // each, each, shapes["D"], seed=seed, dtype=dtype), "top_k": k}
    choice |= {name: stored.pop(name) for name in ("norm_weight", "eps")}
    choice["weight"] = randn(shapes["E"], shapes["D"], seed=seed + 1, scale=shapes["D"] ** -0.5, dtype=dtype)
    if alike:
        choice["weight"][:] = choice["weight"][0]
    choice["positions"] = torch.arange(3, 3 + tokens // each, dtype=torch.int64, device="cuda")

    def call(most, tells=False, x=None):
        trace = torch.full((tokens // each, SLOTS, k), -1, dtype=torch.int32, device="cuda")
        given = {"expert_ids": trace} | ({} if x is None else {"x": x})
        with tuning.override("moe_routed", "", {"UP_TO": most, "TELLS": tells}), poisoned_empty():
            return routed_experts(choice | given, stored), trace

    call.x = choice["x"]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "shapes", "k"), [(4, BIG, 8), (8, BIG, 8), (4, SMALL, 5), (8, SMALL, 5), (4, MANY, 10)])
@pytest.mark.parametrize(("tokens", "each"), [(1, 1), (2, 1), (3, 3), (8, 1)])
@pytest.mark.parametrize("tells", [False, True], ids=["chosen twice", "told"])
def test_experts_choose_what_the_router_would_have_told_them(tells, tokens, each, bits, shapes, k, dtype):
    for seed in range(2):
        call = run(shapes, tokens=tokens, each=each, bits=bits, dtype=dtype, k=k, seed=seed)
        (y, trace), (own, own_trace) = call(0), call(32, tells)
        assert y.isfinite().all() and (trace >= 0).sum() == tokens * k
        assert torch.equal(own_trace, trace), f"seed {seed}"
        assert_close_ratio(own, y, 1e-6 if dtype == torch.float32 else 2**-8, f"seed {seed}")
        for again in range(3):
            assert_bitwise_equal(call(32, tells)[0], own, f"run {again}")


@pytest.mark.parametrize("tells", [False, True], ids=["chosen twice", "told"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_layers_that_start_before_the_previous_kernel_ends(tokens, tells):
    """`down` that is told waits for gate/up, which runs beside it: of one token always, as both find room at once."""
    call = run(BIG, tokens=tokens)

    def layers():
        found, x = [], call.x
        for _ in range(LAYERS):
            y, trace = call(32, tells, x)
            x = (y.float() / y.float().std()).to(y.dtype)
            found += [y, trace]
        return found

    expected = layers()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        found = layers()
    assert add_pdl_edges(graph.raw_cuda_graph()) >= 2 * LAYERS
    graph.instantiate()
    for replay in range(20):
        for tensor in found:
            tensor.fill_(-2)
        graph.replay()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"replay {replay}"


@pytest.mark.parametrize("tokens", [1, 3])
def test_launch_parameters_change_no_bit(tokens):
    call = run(BIG, tokens=tokens)
    row, (expected, trace) = tuning.lookup("moe_gate_up_packed", "int4/2048x512"), call(32)
    for change in candidates.GATE_UP_PACKED:
        with tuning.override("moe_gate_up_packed", "int4", row | change):
            assert_bitwise_equal(call(32)[0], expected, f"{change}")
    row = tuning.lookup("moe_down_packed", "int4/2048x512/1")
    for block, warps in ((4, 2), (8, 8), (32, 8)):
        with tuning.override("moe_down_packed", "int4", row | {"BLOCK_D": block, "num_warps": warps}):
            y, found = call(32)
        assert torch.equal(found, trace) and y.isfinite().all()


def test_equal_logits_are_chosen_by_their_indices_among_512():
    call = run(MANY | {"D": 256, "width": 128, "shared": 128}, tokens=2, k=10, alike=True)
    for most in (0, 32):
        _, trace = call(most)
        assert trace[0, 3].tolist() == trace[1, 4].tolist() == list(range(10))
