"""Padding: the state, and what valid tokens get, are bitwise those of the unpadded call.

On both implementations of each op. Where a reference is a product whose order of summation torch chooses from the number
of tokens, it is held to rounding instead.
"""

from __future__ import annotations

import kernels_common as common
import pytest
import torch
from moeexp_kernels.ops import attention, attention_reference, qk_norm_rope, router
from moeexp_kernels.ops.gated_delta_prefill import gdn_prefill
from moeexp_kernels.ops.gated_delta_reference import reference_gdn_prefill
from test_kernels_attention import make_qkv, make_weights, positions_of
from test_kernels_gated_delta import STATE, make_case

NAN = float("nan")
SHARED = {"batch": 2, "heads": (1, 2), "dims": (16, 16)}


def padded(tensor, length, seed=99):
    """[B, T, ...] with noise after `length` tokens, as large as what is valid."""
    result = common.randn(*tensor.shape, seed=seed).to(tensor.dtype)
    result[:, :length] = tensor[:, :length]
    return result


def valid_len(batch, count):
    return torch.full((batch,), count, dtype=torch.int64, device=common.DEVICE)


@pytest.mark.parametrize("op", [reference_gdn_prefill, gdn_prefill], ids=["reference", "triton"])
@pytest.mark.parametrize(
    ("count", "total"),
    [(1, 3), (16, 17), *(pytest.param(*lengths, marks=pytest.mark.slow) for lengths in [(2, 65), (17, 64), (31, 80)])],
)
def test_gated_delta(op, count, total):
    case = make_case(SHARED["batch"], total, SHARED["heads"], SHARED["dims"])
    kept = {name: case[name].clone() for name in STATE}
    short = case | {"proj": case["proj"][:, :count].contiguous()} | {name: kept[name].clone() for name in STATE}
    long = case | {"proj": padded(case["proj"], count)} | {name: kept[name].clone() for name in STATE}
    expected, actual = op(**short), op(**long, valid_len=valid_len(SHARED["batch"], count))
    common.assert_bitwise_equal(long["conv_state"], short["conv_state"])
    for name, found, wanted in (
        ("output", actual[:, :count], expected),
        ("state", long["recurrent_state"], short["recurrent_state"]),
    ):
        if op is gdn_prefill:
            common.assert_bitwise_equal(found, wanted, name)
        else:
            common.assert_close_ratio(found, wanted, 1e-6, name)
    for name in STATE:
        assert not torch.equal(long[name], kept[name]), f"{name} did not move: the test sees nothing"


@pytest.mark.parametrize("op", [qk_norm_rope.reference_qk_norm_rope, qk_norm_rope.qk_norm_rope], ids=["reference", "triton"])
@pytest.mark.parametrize(
    ("count", "total", "start"),
    [(1, 4, 0), (3, 8, 5), pytest.param(8, 8, 2, marks=pytest.mark.slow), pytest.param(4, 9, 6, marks=pytest.mark.slow)],
)
def test_keys_and_values_beyond_valid_len_are_not_written(op, count, total, start):
    """The last case has padding beyond the cache's last slot."""
    slots = 10
    qkv = make_qkv(2, total, 2, 1, 16)
    caches = {name: common.Guarded(torch.full((2, 1, slots, 16), NAN, device=common.DEVICE)) for name in ("k_cache", "v_cache")}
    shared = {**make_weights(16, 8), "positions": positions_of(start, start), "num_heads": 2, "eps": 1e-6}
    tensors = {name: guard.tensor for name, guard in caches.items()}
    q = op(qkv=padded(qkv, count), **shared, **tensors, valid_len=valid_len(2, count))
    unpadded = {name: torch.full((2, 1, slots, 16), NAN, device=common.DEVICE) for name in caches}
    expected = op(qkv=qkv[:, :count].contiguous(), **shared, **unpadded)
    common.assert_bitwise_equal(q[:, :count], expected)
    for name, guard in caches.items():
        common.assert_bitwise_equal(guard.tensor, unpadded[name], name)
        assert guard.tensor[:, :, start : start + count].isfinite().all()
        guard.check(name)


@pytest.mark.parametrize("op", [attention_reference.reference_sdpa_prefill, attention.sdpa_prefill], ids=["reference", "triton"])
@pytest.mark.parametrize(("count", "total", "start"), [(1, 5, 0), (17, 40, 3), (33, 64, 0)])
def test_attention_sees_no_slot_beyond_valid_len(op, count, total, start):
    slots = 128
    q, qkv = common.randn(1, total, 2, 16, seed=3), make_qkv(1, total, 2, 1, 16)
    caches = [common.randn(1, 1, slots, 16, seed=5 + i) for i in range(2)]
    for cache in caches:
        cache[:, :, start + count :] = NAN
    shared = {"k_cache": caches[0], "v_cache": caches[1], "positions": positions_of(start)}
    actual = op(q=padded(q, count), qkv=padded(qkv, count), **shared, valid_len=valid_len(1, count))
    expected = op(q=q[:, :count].contiguous(), qkv=qkv[:, :count].contiguous(), **shared)
    if op is attention.sdpa_prefill:
        common.assert_bitwise_equal(actual[:, :count], expected)
    else:
        common.assert_close_ratio(actual[:, :count], expected, 1e-6)


@pytest.mark.parametrize("op", [router.reference_router, router.router], ids=["reference", "triton"])
@pytest.mark.parametrize(("count", "total"), [pytest.param(5, 12, marks=pytest.mark.slow), (1, 3), (3, 4), (4, 4)])
def test_expert_choices_beyond_valid_len_are_not_traced(op, count, total):
    """Many tokens and few; padding that runs beyond the trace."""
    x = common.randn(2, total, 32, seed=1)
    shared = {
        "norm_weight": common.randn(32, seed=2), "weight": common.randn(8, 32, seed=3), "eps": 1e-6, "top_k": 2,
        "positions": positions_of(1, 4),
    }  # fmt: skip
    trace = torch.full((2, 4 + count, 2), -7, dtype=torch.int32, device=common.DEVICE)
    ids, _ = op(x=x, **shared, expert_ids=trace, valid_len=valid_len(2, count))
    for row, start in enumerate((1, 4)):
        common.assert_bitwise_equal(trace[row, start : start + count], ids[row, :count], "trace")
        assert (trace[row, :start] == -7).all() and (trace[row, start + count :] == -7).all()
