"""The choice fused into the experts' kernels, against the router's choice and the experts that are told it."""

from __future__ import annotations

import pytest
import torch
from kernels_common import DEVICE, assert_bitwise_equal, expect_value_error, poisoned_empty, randn
from moeexp_kernels.ops.moe import moe_decode_routed, route_decode, routed_experts
from moeexp_kernels.ops.router_logits import launch_logits
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


WAYS = {"told by the router": (0, False), "chosen twice": (3, False), "told by gate/up": (3, True)}


def every(choice, stored, *, slots=4):
    """{way: (result, trace)} of WAYS."""
    found = {}
    for way, (most, tells) in WAYS.items():
        trace = torch.full((choice["x"].shape[0], slots, choice["top_k"]), -1, dtype=torch.int32, device=DEVICE)
        row = {"UP_TO": most, "TELLS": tells}
        with tuning.override("moe_routed", "", row), poisoned_empty(), tuning.asked() as asked:
            y = routed_experts(choice | {"expert_ids": trace}, stored)
        assert ("router_rows" not in {op for op, _ in asked}) == bool(most), "another router was asked"
        found[way] = y, trace
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
    (y, trace), *others = every(choice, stored).values()
    assert y.isfinite().all() and (trace >= 0).sum() == tokens * choice["top_k"]
    for own, own_trace in others:
        assert torch.equal(own_trace, trace)
        assert_bitwise_equal(own, y, "experts that choose")


def test_equal_logits_are_chosen_by_their_indices():
    choice, stored = layer(tokens=1, E=6, D=32, shared=32)
    choice["weight"] = choice["weight"][:1].repeat(6, 1)
    choice["weight"][4] *= -1  # as far from the others as they are from nought
    (y, trace), *others = every(choice, stored).values()
    expected = [4, 0, 1] if trace[0, 1, 0] == 4 else [0, 1, 2]
    assert trace[0, 1].tolist() == expected
    for own, own_trace in others:
        assert own_trace[0, 1].tolist() == expected
        assert_bitwise_equal(own, y, "equal logits")


@pytest.mark.slow
def test_a_row_that_is_not_finite_stays_its_own():
    choice, stored = layer(tokens=2, D=32, shared=32, E=2, top_k=1)
    (clean, _), *_ = every(choice, stored).values()
    choice["x"][1, 0, 3] = float("nan")
    for own, _ in every(choice, stored).values():
        assert_bitwise_equal(own[0], clean[0], "the other row")
        assert own[1].isnan().all()


@pytest.mark.parametrize("position", [pytest.param(-1, marks=pytest.mark.slow), 4])
def test_a_position_outside_the_trace_is_traced_nowhere(position):
    choice, stored = layer(tokens=1, D=32, shared=32)
    choice["positions"][:] = position
    for own, trace in every(choice, stored).values():
        assert own.isfinite().all() and (trace == -1).all()


def test_tokens_that_do_not_count_are_left_to_the_router():
    choice, stored = layer(tokens=2, each=2, D=32, shared=32)
    choice["valid_len"] = torch.ones(1, dtype=torch.int64, device=DEVICE)
    trace = torch.full((1, 4, 3), -1, dtype=torch.int32, device=DEVICE)
    with tuning.override("moe_routed", "", {"UP_TO": 3, "TELLS": False}):
        routed_experts(choice | {"expert_ids": trace}, stored)
    assert (trace >= 0).sum() == 3, "one token's"


def test_bad_arguments_are_refused():
    choice, stored = layer(tokens=1, D=32, shared=32)
    common = {name: choice[name] for name in ("x", "norm_weight", "eps", "weight", "positions")}
    call = common | stored | {"expert_ids": torch.zeros(1, 4, 3, dtype=torch.int32, device=DEVICE)}
    gate = stored["shared_gate"]
    expect_value_error(lambda: moe_decode_routed(**(call | {"shared_gate": gate[0]})), "shared_gate")
    expect_value_error(lambda: moe_decode_routed(**(call | {"weight": call["weight"][:4]})), "weight")
    expect_value_error(lambda: moe_decode_routed(**(call | {"weight": call["weight"].long()})), "weight")
    expect_value_error(lambda: moe_decode_routed(**(call | {"norm_weight": call["norm_weight"][:8]})), "norm_weight")
    expect_value_error(lambda: moe_decode_routed(**(call | {"expert_ids": call["expert_ids"].long()})), "expert_ids")
    expect_value_error(lambda: moe_decode_routed(**(call | {"positions": call["positions"].int()})), "positions")


def packed_rows(choice, stored):
    """(logits, packed rows, chosen experts) that `launch_logits` leaves."""
    common = {name: choice[name] for name in ("x", "norm_weight", "eps", "weight", "top_k")}
    return launch_logits(**common, shared_gate=stored["shared_gate"], pack_bits=4, pack_group=32)


def test_the_router_packs_the_same_rows_either_way():
    choice, stored = layer(tokens=2, D=64, shared=64)
    _, packed, _ = packed_rows(choice, stored)
    trace = torch.zeros(2, 4, 3, dtype=torch.int32, device=DEVICE)
    expected = route_decode(choice | {"expert_ids": trace}, stored)["packed"]
    # But for the two words of padding, which nobody writes.
    assert torch.equal(packed[:, :-2], expected[:, :-2])


def test_no_expert_is_known_before_one_is_chosen():
    """`down` waits until none is NOT_CHOSEN: what an older step left in that memory must not pass for its experts."""
    choice, stored = layer(tokens=2, D=64, shared=64)
    assert packed_rows(choice, stored)[2].tolist() == [[-1] * 3] * 2
