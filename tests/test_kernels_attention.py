"""QK-norm + RoPE + KV append, and gated attention over the cache, against the float32 references.

Every case has poison around its tensors, in scratch memory, and in the cache slots that no token has reached. Real shapes
and the device: gpu/.
"""

from __future__ import annotations

import kernels_common as common
import numpy as np
import pytest
import torch
from moeexp_kernels.ops import attention as ops
from moeexp_kernels.ops import attention_splits
from moeexp_kernels.ops import qk_norm_rope as rope
from moeexp_kernels.ops.attention_reference import reference_sdpa
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
FAULT_LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
EPS = 1e-6


def make_weights(head_dim: int, rotary: int, seed: int = 50) -> dict[str, Tensor]:
    frequencies = 1.0 / 10_000_000 ** (torch.arange(0, rotary, 2, dtype=F32) / rotary)
    return {
        "q_norm": common.randn(head_dim, seed=seed, scale=0.2),
        "k_norm": common.randn(head_dim, seed=seed + 1, scale=0.2),
        "inv_freq": frequencies.to(common.DEVICE),
    }


def make_cache(batch: int, kv_heads: int, slots: int, head_dim: int, dtype=F32, *, used=None, seed=1) -> list[Tensor]:
    """K and V with real values in slots [0, used[b]) (all, unless told) and NaN in the others."""
    caches = [common.randn(batch, kv_heads, slots, head_dim, seed=seed + i, dtype=dtype) for i in range(2)]
    for b, length in enumerate(used or []):
        for cache in caches:
            cache[b, :, length:] = NAN
    return caches


def make_qkv(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype=F32, *, seed=7) -> Tensor:
    return common.randn(batch, tokens, 2 * (heads + kv_heads) * head_dim, seed=seed, dtype=dtype)


def positions_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=common.DEVICE)


def check_rope(batch, tokens, heads, kv_heads, head_dim, rotary, dtype, positions, slots, **options) -> None:
    qkv = common.Guarded(make_qkv(batch, tokens, heads, kv_heads, head_dim, dtype))
    start = make_cache(batch, kv_heads, slots, head_dim, dtype, used=positions)
    caches = [common.Guarded(cache) for cache in start]
    expected_caches = [cache.clone() for cache in start]
    shared = {
        "qkv": qkv.tensor, **make_weights(head_dim, rotary), "positions": positions_of(*positions), "num_heads": heads,
        "eps": EPS, **options,
    }  # fmt: skip
    with common.poisoned_empty():
        q = rope.qk_norm_rope(k_cache=caches[0].tensor, v_cache=caches[1].tensor, **shared)
    expected = rope.reference_qk_norm_rope(k_cache=expected_caches[0], v_cache=expected_caches[1], **shared)
    tol = common.TOLERANCE[dtype]
    common.assert_close_ratio(q, expected, tol, "q")
    for b, position in enumerate(positions):
        written = slice(position, position + tokens)
        new, expected_new = caches[0].tensor[b, :, written], expected_caches[0][b, :, written]
        common.assert_close_ratio(new, expected_new, tol, f"k_cache[{b}]")
        for cache, before in zip(caches, start, strict=True):
            common.assert_bitwise_equal(cache.tensor[b, :, :position], before[b, :, :position], "slots before")
            after = slice(position + tokens, None)
            common.assert_bitwise_equal(cache.tensor[b, :, after], before[b, :, after], "slots after")
    common.assert_bitwise_equal(caches[1].tensor, expected_caches[1], "v_cache")
    for cache in [*caches, qkv]:
        cache.check()


def make_attention_case(batch, tokens, heads, kv_heads, head_dim, dtype, positions, slots, scale=1.0) -> dict[str, Tensor]:
    used = [min(max(position + tokens, 0), slots) for position in positions]
    k_cache, v_cache = make_cache(batch, kv_heads, slots, head_dim, dtype, used=used)
    return {
        "q": common.randn(batch, tokens, heads, head_dim, seed=3, dtype=dtype, scale=scale),
        "qkv": make_qkv(batch, tokens, heads, kv_heads, head_dim, dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "positions": positions_of(*positions),
    }


def check_attention(op, case: dict[str, Tensor], tol: float | None = None, name: str = "output") -> Tensor:
    guarded = {key: common.Guarded(tensor) for key, tensor in case.items()}
    with common.poisoned_empty():
        out = op(**{key: tensor.tensor for key, tensor in guarded.items()})
    expected = reference_sdpa(**case)
    common.assert_close_ratio(out, expected, tol or common.TOLERANCE[out.dtype], name)
    for key, tensor in guarded.items():
        tensor.check(key)
        common.assert_bitwise_equal(tensor.tensor, case[key], key)
    return out


# ---- qk_norm_rope


@pytest.mark.parametrize(
    "batch, tokens, heads, kv_heads, head_dim, rotary, dtype, positions",
    [
        (2, 3, 3, 1, 80, 20, F32, [5, 0]),
        (1, 2, 4, 2, 64, 64, BF16, [9]),
        (1, 1, 2, 2, 256, 64, F32, [13]),
        (2, 1, 5, 5, 96, 2, F16, [0, 15]),
    ],
)
def test_qk_norm_rope(batch, tokens, heads, kv_heads, head_dim, rotary, dtype, positions):
    check_rope(batch, tokens, heads, kv_heads, head_dim, rotary, dtype, positions, slots=16)


def yarn_case() -> tuple[Tensor, float]:
    """Frequencies [32] and attention factor of transformers for 256 dims of which 64 turn, stretched four times."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144, "rope_theta": 1e7}
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](Qwen3_5MoeTextConfig(rope_parameters=yarn))
    assert frequencies.shape == (32,) and factor > 1.1
    return frequencies.to(common.DEVICE), factor


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_qk_norm_rope_with_yarn(dtype):
    inv_freq, factor = yarn_case()
    check_rope(2, 3, 3, 1, 256, 64, dtype, [5, 0], 16, inv_freq=inv_freq, attention_factor=factor)


@pytest.mark.parametrize("op", [rope.reference_qk_norm_rope, rope.qk_norm_rope], ids=["reference", "triton"])
def test_an_attention_factor_is_of_rotary_dims_alone(op):
    """Twice the rotary dims to the last bit, and the others as they were; a factor of 1 changes no bit."""

    def outputs(**options):
        caches = [torch.zeros(1, 2, 8, 80, device=common.DEVICE) for _ in range(2)]
        q = op(
            qkv=make_qkv(1, 3, 4, 2, 80), **make_weights(80, 20), positions=positions_of(4), num_heads=4, eps=EPS,
            k_cache=caches[0], v_cache=caches[1], **options,
        )  # fmt: skip
        return q, *caches

    plain, twice = outputs(), outputs(attention_factor=2.0)
    for before, after in zip(plain[:2], twice[:2], strict=True):
        assert before.abs().max() > 0.1
        common.assert_bitwise_equal(after[..., :20], 2 * before[..., :20], "rotary dims")
        common.assert_bitwise_equal(after[..., 20:], before[..., 20:], "other dims")
    common.assert_bitwise_equal(twice[2], plain[2], "values")
    for before, after in zip(plain, outputs(attention_factor=1.0), strict=True):
        common.assert_bitwise_equal(after, before)


def test_qk_norm_rope_far_out():
    """At position 260,000 the angle must be formed as in the reference, and reduced exactly."""
    qkv, slots = make_qkv(1, 1, 1, 1, 16), 260_001
    caches = [torch.zeros(1, 1, slots, 16, device=common.DEVICE) for _ in range(4)]
    shared = {"qkv": qkv, **make_weights(16, 16), "positions": positions_of(slots - 1), "num_heads": 1, "eps": EPS}
    q = rope.qk_norm_rope(k_cache=caches[0], v_cache=caches[1], **shared)
    expected = rope.reference_qk_norm_rope(k_cache=caches[2], v_cache=caches[3], **shared)
    common.assert_close_ratio(q, expected, 1e-5)
    common.assert_close_ratio(caches[0], caches[2], 1e-5)


def test_qk_norm_rope_never_writes_outside_the_cache():
    for position, written in ((-1, []), (3, [3]), (4, [])):
        caches = [common.Guarded(torch.zeros(2, 1, 4, 16, device=common.DEVICE)) for _ in range(2)]
        rope.qk_norm_rope(
            qkv=make_qkv(2, 1, 2, 1, 16), **make_weights(16, 8), positions=positions_of(position, 0), num_heads=2, eps=EPS,
            k_cache=caches[0].tensor, v_cache=caches[1].tensor,
        )  # fmt: skip
        for cache in caches:
            cache.check()
            touched = cache.tensor.abs().amax((1, 3)).nonzero().tolist()
            assert touched == [[0, slot] for slot in written] + [[1, 0]]


# ---- decode

DECODE = {"splitk": attention_splits.sdpa_decode_splitk, "tiled": ops.sdpa_decode_tiled}


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, dtype, positions, slots",
    [
        (4, 2, 64, F32, [149, 2], 200),
        (6, 2, 80, BF16, [63, 64], 96),
        (3, 1, 256, BF16, [0, 66], 80),
        (2, 2, 96, F32, [31, 32], 33),
        (8, 1, 128, F16, [40, 99], 100),
    ],
)
def test_decode(name, heads, kv_heads, head_dim, dtype, positions, slots):
    check_attention(DECODE[name], make_attention_case(2, 1, heads, kv_heads, head_dim, dtype, positions, slots))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 2), (16, 2), (5, 1), (9, 3), (17, 1)])
def test_decode_shapes(name, dtype, head_dim, heads, kv_heads):
    case = make_attention_case(2, 1, heads, kv_heads, head_dim, dtype, [70, 5], 128)
    check_attention(DECODE[name], case)


def one_by_one(op, case):
    """The tokens of a case in calls of their own."""
    calls = [
        op(**{**case, "q": case["q"][:, [t]], "qkv": case["qkv"][:, [t]], "positions": case["positions"] + t})
        for t in range(case["q"].shape[1])
    ]
    return torch.cat(calls, dim=1)


@pytest.fixture
def products_row_by_row(monkeypatch):
    """The interpreter multiplies with numpy, whose BLAS sums a row in another order at another place in a matrix on some CPUs."""

    def matmul(x, y, dtype=None):
        return (x[..., :, :, None] * y[..., None, :, :]).sum(axis=-2, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("products_row_by_row")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "tokens, positions, slots",
    [(2, [149, 2], 200), (3, [62], 96), pytest.param(8, [30, 0], 130, marks=pytest.mark.slow), (5, [3], 24)],
)
def test_tokens_of_one_call_are_to_the_bit_those_of_calls_of_their_own(tokens, positions, slots, dtype):
    """The last of the cases has one split."""
    case = make_attention_case(len(positions), tokens, 4, 2, 32, dtype, positions, slots)
    together = check_attention(attention_splits.sdpa_decode_splitk, case)
    common.assert_bitwise_equal(together, one_by_one(attention_splits.sdpa_decode_splitk, case))


@pytest.mark.parametrize("name", DECODE)
def test_decode_of_nothing_is_zero(name):
    case = make_attention_case(2, 1, 4, 2, 32, F32, [-1, 40], 64)
    with common.poisoned_empty():
        out = DECODE[name](**case)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].abs().max() > 0


@pytest.mark.parametrize("name", DECODE)
def test_decode_survives_huge_scores(name):
    """Scores of +-1e4 that differ between splits: a fixed maximum, or a merge that rescales late, overflows or loses them."""
    case = make_attention_case(1, 1, 2, 1, 64, F32, [199], 200, scale=1500.0)
    check_attention(DECODE[name], case)


def test_decode_reads_the_live_slots_only():
    """The same context in a cache of another size has other splits and the same result."""
    short = make_attention_case(1, 1, 4, 2, 32, F32, [69], 70)
    out = check_attention(attention_splits.sdpa_decode_splitk, short)
    for slots in (71, 400):
        caches = make_cache(1, 2, slots, 32, used=[0])
        for cache, name in zip(caches, ("k_cache", "v_cache"), strict=True):
            cache[:, :, :70] = short[name]
        larger = {**short, "k_cache": caches[0], "v_cache": caches[1]}
        common.assert_close_ratio(attention_splits.sdpa_decode_splitk(**larger), out, 1e-6)


def test_number_of_splits():
    def splits(**changed):
        return attention_splits.splitk_splits(
            **{"batch": 1, "kv_heads": 2, "slots": 65_536, "block_n": 32, "programs": 256, **changed}
        )

    assert splits() == 128 and splits(batch=8) == 16 and splits(batch=1000) == 1
    assert splits(slots=32) == 1 and splits(slots=65) == 2 and splits(slots=129) == 4


# ---- prefill


@pytest.mark.parametrize(
    "tokens, heads, kv_heads, head_dim, dtype, positions, slots",
    [
        (33, 4, 2, 64, F32, [30, 0], 80),
        (17, 6, 2, 80, BF16, [64, 3], 96),
        (1, 3, 1, 96, F32, [0, 50], 64),
        (40, 2, 2, 256, BF16, [0, 7], 48),
    ],
)
def test_prefill(tokens, heads, kv_heads, head_dim, dtype, positions, slots):
    check_attention(ops.sdpa_prefill, make_attention_case(2, tokens, heads, kv_heads, head_dim, dtype, positions, slots))


def test_prefill_rows_that_see_nothing_are_zero():
    case = make_attention_case(1, 3, 2, 1, 32, F32, [-1], 8)
    out = ops.sdpa_prefill(**case)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    common.assert_close_ratio(out[:, 1:], reference_sdpa(**case)[:, 1:], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", FAULT_LENGTHS[:-1])
@pytest.mark.parametrize("position", [0, 1, 63])
def test_prefill_lengths(tokens, position):
    case = make_attention_case(1, tokens, 3, 1, 32, F32, [position], position + tokens + 5)
    check_attention(ops.sdpa_prefill, case, name=f"T={tokens} at {position}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 2), (16, 2), (5, 1), (17, 1)])
def test_prefill_shapes(dtype, head_dim, heads, kv_heads):
    check_attention(ops.sdpa_prefill, make_attention_case(2, 19, heads, kv_heads, head_dim, dtype, [0, 20], 64))


def run_in_pieces(pieces, qkv, slots, heads, kv_heads, head_dim, decode) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both caches after feeding qkv in pieces of the given lengths."""
    caches = make_cache(1, kv_heads, slots, head_dim, qkv.dtype, used=[0])
    weights, outputs, position = make_weights(head_dim, head_dim // 4), [], 0
    for length in pieces:
        part, positions = qkv[:, position : position + length], positions_of(position)
        q = rope.qk_norm_rope(
            qkv=part, **weights, positions=positions, k_cache=caches[0], v_cache=caches[1], num_heads=heads, eps=EPS
        )
        attend = decode if length == 1 else ops.sdpa_prefill
        outputs.append(attend(q=q, qkv=part, k_cache=caches[0], v_cache=caches[1], positions=positions))
        position += length
    return torch.cat(outputs, 1), *caches


@pytest.mark.parametrize("pieces", [pytest.param((9, 1, 1, 6), marks=pytest.mark.slow), (1, 2, 14)])
def test_pieces_equal_the_whole(pieces):
    qkv = make_qkv(1, 17, 4, 2, 32)
    whole = run_in_pieces([17], qkv, 24, 4, 2, 32, attention_splits.sdpa_decode_splitk)
    parts = run_in_pieces(pieces, qkv, 24, 4, 2, 32, attention_splits.sdpa_decode_splitk)
    common.assert_close_ratio(parts[0], whole[0], 1e-6)
    common.assert_bitwise_equal(parts[1], whole[1], "k_cache")
    common.assert_bitwise_equal(parts[2], whole[2], "v_cache")


@pytest.mark.parametrize("op, tokens", [(attention_splits.sdpa_decode_splitk, 1), (ops.sdpa_prefill, 9)])
def test_bitwise_stable(op, tokens):
    case = make_attention_case(1, tokens, 4, 2, 32, F32, [60], 80)
    common.assert_bitwise_stable(lambda: op(**{key: tensor.clone() for key, tensor in case.items()}), runs=3)


# ---- refusals


def test_refusals():
    case = make_attention_case(1, 1, 4, 2, 32, F32, [3], 8)

    def refused(*words: str, op=attention_splits.sdpa_decode_splitk, **changed):
        common.expect_value_error(lambda: op(**{**case, **changed}), *words)

    refused("head dim 512", "256", **{key: make_attention_case(1, 1, 2, 1, 512, F32, [0], 2)[key] for key in case})
    refused("3 query heads over 2", q=case["q"][:, :, :3], op=ops.sdpa_prefill)
    refused("k_cache", "float16", k_cache=case["k_cache"].half(), op=ops.sdpa_decode_tiled)
    refused("k_cache", "strides", k_cache=case["k_cache"].transpose(2, 3).contiguous().transpose(2, 3))
    refused("v_cache", "same strides", v_cache=case["v_cache"].new_zeros(1, 2, 9, 32)[:, :, :8])
    refused("qkv", "384", qkv=case["qkv"][..., :383])
    refused("q is", "bfloat16", q=case["q"].bfloat16())
    refused("float64", **{key: case[key].double() for key in ("q", "qkv", "k_cache", "v_cache")})


def test_rope_refusals():
    caches = dict(zip(("k_cache", "v_cache"), make_cache(1, 1, 4, 32), strict=True))
    good = {
        "qkv": make_qkv(1, 1, 2, 1, 32), **make_weights(32, 8), "positions": positions_of(0), "num_heads": 2, "eps": EPS,
        **caches,
    }  # fmt: skip

    def refused(*words: str, **changed):
        common.expect_value_error(lambda: rope.qk_norm_rope(**{**good, **changed}), *words)

    refused("inv_freq", "40", "32", inv_freq=torch.ones(20, device=common.DEVICE))
    refused("q_norm", "[32]", q_norm=torch.ones(31, device=common.DEVICE))
    refused("k_norm", "contiguous", k_norm=torch.ones(64, device=common.DEVICE)[::2])
    refused("qkv", "256", num_heads=3)
