"""The choice fused into the experts' kernels, against the router's choice and the experts that are told it."""

from __future__ import annotations

import pytest
import torch
from kernels_common import DEVICE, assert_bitwise_equal, expect_value_error, poisoned_empty, randn
from moeexp_kernels.ops.moe import moe_decode_routed, route_decode, routed_experts
from moeexp_kernels.ops.router_logits import router_logits
from moeexp_kernels.parts import tuning
from test_kernels_moe import experts

F32, BF16 = torch.float32, torch.bfloat16


def layer(*, tokens, D=64, E=5, top_k=3, bits=4, group=32, shared=64, dtype=BF16, slots=4, each=1):
    """(arguments of the router but for its trace, the experts' matrices) of `tokens` tokens, `each` of a sequence."""
    stored = experts(D=D, E=E, width=max(32, group), shared=shared, bits=bits, group=group, dtype=dtype)
    x = randn(tokens // each, each, D, seed=1, dtype=dtype)
    choice = {"x": x, "norm_weight": stored.pop("norm_weight"), "eps": stored.pop("eps"), "top_k": top_k}
    choice["weight"] = randn(E, D, seed=5, scale=D**-0.5, dtype=dtype)
    choice["positions"] = torch.arange(1, tokens // each + 1, dtype=torch.int64, device=DEVICE)
    return choice, stored


def both(choice, stored, *, slots=4):
    """((result, trace) of the router and of experts that are told, the same of those that choose)."""
    found = []
    for most in (0, 3):
        trace = torch.full((choice["x"].shape[0], slots, choice["top_k"]), -1, dtype=torch.int32, device=DEVICE)
        with tuning.override("moe_routed", "", {"UP_TO": most}), poisoned_empty(), tuning.asked() as asked:
            y = routed_experts(choice | {"expert_ids": trace}, stored)
        assert ("router_rows" not in {op for op, _ in asked}) == bool(most), "another router was asked"
        found.append((y, trace))
    return found


@pytest.mark.parametrize(
    ("tokens", "each", "changes"),
    [
        (2, 2, {"shared": 32, "top_k": 2, "E": 3}), pytest.param(1, 1, {"dtype": F32, "D": 32}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"bits": 8, "shared": 96, "D": 96}, marks=pytest.mark.slow),
        pytest.param(3, 1, {"E": 130, "top_k": 2, "D": 32, "shared": 32}, marks=pytest.mark.slow),
        pytest.param(1, 1, {"dtype": F32, "bits": 8, "top_k": 5}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_chosen_and_computed_is_to_the_bit_what_the_router_would_have_said(tokens, each, changes):
    """Experts of every slot, numbers of experts and of chosen ones that are no powers of 2, several tokens of a sequence."""
    choice, stored = layer(tokens=tokens, each=each, **changes)
    (y, trace), (own, own_trace) = both(choice, stored)
    assert y.isfinite().all() and (trace >= 0).sum() == tokens * choice["top_k"]
    assert torch.equal(own_trace, trace)
    assert_bitwise_equal(own, y, "experts that choose")


def test_equal_logits_are_chosen_by_their_indices():
    choice, stored = layer(tokens=1, E=6, D=32, shared=32)
    choice["weight"] = choice["weight"][:1].repeat(6, 1)
    choice["weight"][4] *= -1  # as far from the others as they are from nought
    (y, trace), (own, own_trace) = both(choice, stored)
    expected = [4, 0, 1] if trace[0, 1, 0] == 4 else [0, 1, 2]
    assert trace[0, 1].tolist() == own_trace[0, 1].tolist() == expected
    assert_bitwise_equal(own, y, "equal logits")


@pytest.mark.slow
def test_a_row_that_is_not_finite_stays_its_own():
    choice, stored = layer(tokens=2, D=32, shared=32, E=2, top_k=1)
    (clean, _), _ = both(choice, stored)
    choice["x"][1, 0, 3] = float("nan")
    _, (own, _) = both(choice, stored)
    assert_bitwise_equal(own[0], clean[0], "the other row")
    assert own[1].isnan().all()


@pytest.mark.parametrize("position", [pytest.param(-1, marks=pytest.mark.slow), 4])
def test_a_position_outside_the_trace_is_traced_nowhere(position):
    choice, stored = layer(tokens=1, D=32, shared=32)
    choice["positions"][:] = position
    _, (own, trace) = both(choice, stored)
    assert own.isfinite().all() and (trace == -1).all()


def test_tokens_that_do_not_count_are_left_to_the_router():
    choice, stored = layer(tokens=2, each=2, D=32, shared=32)
    choice["valid_len"] = torch.ones(1, dtype=torch.int64, device=DEVICE)
    trace = torch.full((1, 4, 3), -1, dtype=torch.int32, device=DEVICE)
    with tuning.override("moe_routed", "", {"UP_TO": 3}):
        routed_experts(choice | {"expert_ids": trace}, stored)
    assert (trace >= 0).sum() == 3, "one token's"


def test_bad_arguments_are_refused():
    choice, stored = layer(tokens=1, D=32, shared=32)
    gate = stored.pop("shared_gate")
    common = {name: choice[name] for name in ("x", "norm_weight", "eps", "weight")}
    packing = {"shared_gate": gate, "pack_bits": 4, "pack_group": 32}
    logits, packed = router_logits(**common, **packing)
    expect_value_error(lambda: router_logits(**common, **(packing | {"pack_group": 64})), "groups of 64")
    expect_value_error(lambda: router_logits(**common, **(packing | {"shared_gate": gate[0]})), "shared_gate")
    trace = torch.zeros(1, 4, 3, dtype=torch.int32, device=DEVICE)
    call = {"x": choice["x"], "logits": logits, "packed": packed, "positions": choice["positions"], "expert_ids": trace}
    expect_value_error(lambda: moe_decode_routed(**(call | {"logits": logits[:, :4]}), **stored), "logits")
    expect_value_error(lambda: moe_decode_routed(**(call | {"packed": packed[:, :8]}), **stored), "packed")
    expect_value_error(lambda: moe_decode_routed(**(call | {"expert_ids": trace.long()}), **stored), "expert_ids")
    expect_value_error(lambda: moe_decode_routed(**(call | {"positions": call["positions"].int()}), **stored), "positions")


def test_the_router_packs_the_same_rows_either_way():
    choice, stored = layer(tokens=2, D=64, shared=64)
    common = {name: choice[name] for name in ("x", "norm_weight", "eps", "weight")}
    _, packed = router_logits(**common, shared_gate=stored["shared_gate"], pack_bits=4, pack_group=32)
    trace = torch.zeros(2, 4, 3, dtype=torch.int32, device=DEVICE)
    expected = route_decode(choice | {"expert_ids": trace}, stored)["packed"]
    # But for the two words of padding, which nobody writes.
    assert torch.equal(packed[:, :-2], expected[:, :-2])
