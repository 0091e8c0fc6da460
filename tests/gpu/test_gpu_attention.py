"""Attention and the sampler on the device, at the shapes of Qwen3.5-35B-A3B and at those that break kernels."""

from __future__ import annotations

import kernels_common as common
import pytest
import test_kernels_attention as cases
import torch
from moeexp_kernels.ops import attention as ops
from moeexp_kernels.ops import attention_splits
from moeexp_kernels.ops import qk_norm_rope as rope
from moeexp_kernels.ops import sample as sampler
from moeexp_kernels.ops.attention_reference import reference_sdpa

pytestmark = pytest.mark.usefixtures("exact_reference")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HEADS, KV_HEADS, HEAD_DIM, ROTARY = 16, 2, 256, 64
VOCABULARY = 248_320
DECODE = {"splitk": attention_splits.sdpa_decode_splitk, "tiled": ops.sdpa_decode_tiled}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens, positions", [(1, [0]), (1, [4095, 17, 2000]), (7, [100, 0]), (512, [0]), (2048, [2047])])
def test_qk_norm_rope(dtype, tokens, positions):
    cases.check_rope(len(positions), tokens, HEADS, KV_HEADS, HEAD_DIM, ROTARY, dtype, positions, max(positions) + tokens + 1)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens, positions", [(1, [0]), (1, [262_143 + 5, 17]), (512, [1000])])
def test_qk_norm_rope_with_yarn(dtype, tokens, positions):
    """Positions beyond the original context too."""
    inv_freq, factor = cases.yarn_case()
    cases.check_rope(
        len(positions), tokens, HEADS, KV_HEADS, HEAD_DIM, ROTARY, dtype, positions, max(positions) + tokens + 1,
        inv_freq=inv_freq, attention_factor=factor,
    )  # fmt: skip


def test_an_attention_factor_is_of_rotary_dims_alone():
    cases.test_an_attention_factor_is_of_rotary_dims_alone(rope.qk_norm_rope)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "positions, slots",
    [([0], 4096), ([30, 31, 32], 64), ([4094, 4095, 511, 512], 4096), ([65_535], 65_536), ([40_000, 3], 65_537)],
)
def test_decode(name, dtype, positions, slots):
    case = cases.make_attention_case(len(positions), 1, HEADS, KV_HEADS, HEAD_DIM, dtype, positions, slots)
    cases.check_attention(DECODE[name], case)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens", [2, 3, 4, 8, 32])
@pytest.mark.parametrize("positions, slots", [([0], 4096), ([4060, 511], 4096), ([62], 128), ([32_000], 65_536)])
def test_tokens_of_one_call_are_to_the_bit_those_of_calls_of_their_own(positions, slots, tokens, dtype):
    case = cases.make_attention_case(len(positions), tokens, HEADS, KV_HEADS, HEAD_DIM, dtype, positions, slots)
    together = cases.check_attention(attention_splits.sdpa_decode_splitk, case)
    common.assert_bitwise_equal(together, cases.one_by_one(attention_splits.sdpa_decode_splitk, case))


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 4), (5, 1), (9, 3), (34, 2)])
def test_decode_shapes(name, dtype, head_dim, heads, kv_heads):
    case = cases.make_attention_case(2, 1, heads, kv_heads, head_dim, dtype, [700, 5], 1024)
    cases.check_attention(DECODE[name], case)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tokens", [*cases.FAULT_LENGTHS, 2048])
@pytest.mark.parametrize("position", [0, 1000])
def test_prefill(dtype, tokens, position):
    slots = position + tokens + 3
    case = cases.make_attention_case(1, tokens, HEADS, KV_HEADS, HEAD_DIM, dtype, [position], slots)
    cases.check_attention(ops.sdpa_prefill, case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 4), (5, 1), (9, 3), (34, 2)])
def test_prefill_shapes(dtype, head_dim, heads, kv_heads):
    case = cases.make_attention_case(2, 131, heads, kv_heads, head_dim, dtype, [0, 70], 256)
    cases.check_attention(ops.sdpa_prefill, case)


@pytest.mark.parametrize("pieces", [(64, 1, 1, 63, 1, 126), (1, 255), (129, 127)])
def test_pieces_equal_the_whole(pieces):
    qkv = cases.make_qkv(1, 256, HEADS, KV_HEADS, HEAD_DIM)
    shape = (qkv, 300, HEADS, KV_HEADS, HEAD_DIM, attention_splits.sdpa_decode_splitk)
    whole, parts = cases.run_in_pieces([256], *shape), cases.run_in_pieces(pieces, *shape)
    common.assert_close_ratio(parts[0], whole[0], 1e-5)
    common.assert_bitwise_equal(parts[1], whole[1], "k_cache")
    common.assert_bitwise_equal(parts[2], whole[2], "v_cache")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "op, tokens", [(attention_splits.sdpa_decode_splitk, 1), (ops.sdpa_decode_tiled, 1), (ops.sdpa_prefill, 200)]
)
def test_bitwise_stable(op, tokens, dtype):
    case = cases.make_attention_case(2, tokens, HEADS, KV_HEADS, HEAD_DIM, dtype, [3000, 77], 4096)
    common.assert_bitwise_stable(lambda: op(**case), runs=20)


def test_rows_beyond_2_to_the_31_elements():
    """The last row of the batch begins 2.25e9 elements into each cache."""
    batch, slots = 3, 2_200_000
    small = cases.make_attention_case(batch, 1, 4, KV_HEADS, HEAD_DIM, BF16, [70, 3, 99], 100)
    caches = [torch.empty(batch, KV_HEADS, slots, HEAD_DIM, dtype=BF16, device="cuda") for _ in range(2)]
    for cache, name in zip(caches, ("k_cache", "v_cache"), strict=True):
        cache[:, :, :100] = small[name]
    expected = reference_sdpa(**small)
    large = {**small, "k_cache": caches[0], "v_cache": caches[1]}
    for op in (attention_splits.sdpa_decode_splitk, ops.sdpa_decode_tiled, ops.sdpa_prefill):
        common.assert_close_ratio(op(**large), expected, common.TOLERANCE[BF16])


def test_slots_beyond_2_to_the_31_elements():
    """The last 64 slots, 2.2e9 elements in, hold all of the attention: zeros everywhere else weigh nothing against them."""
    slots, tail = 8_600_000, 64
    q = common.randn(1, 1, 4, HEAD_DIM, seed=1, dtype=BF16)
    caches = [torch.zeros(1, 1, slots, HEAD_DIM, dtype=BF16, device="cuda") for _ in range(2)]
    caches[0][0, 0, -tail:] = q.mean(2)[0] * 60 + common.randn(tail, HEAD_DIM, seed=2, dtype=BF16)
    caches[1][0, 0, -tail:] = common.randn(tail, HEAD_DIM, seed=3, dtype=BF16)
    shared = {"q": q, "qkv": cases.make_qkv(1, 1, 4, 1, HEAD_DIM, BF16)}
    expected = reference_sdpa(
        **shared,
        k_cache=caches[0][:, :, -tail:],
        v_cache=caches[1][:, :, -tail:],
        positions=cases.positions_of(tail - 1),
    )
    last = cases.positions_of(slots - 1)
    for op in (attention_splits.sdpa_decode_splitk, ops.sdpa_prefill):
        out = op(**shared, k_cache=caches[0], v_cache=caches[1], positions=last)
        common.assert_close_ratio(out, expected, common.TOLERANCE[BF16])
    rope.qk_norm_rope(
        qkv=shared["qkv"], **cases.make_weights(HEAD_DIM, ROTARY), positions=last, k_cache=caches[0], v_cache=caches[1],
        num_heads=4, eps=cases.EPS,
    )  # fmt: skip
    value = shared["qkv"][0, 0, -HEAD_DIM:]
    common.assert_bitwise_equal(caches[1][0, 0, -1], value, "the value just appended")


class Attention(torch.nn.Module):
    """Both ops of a full-attention layer, as the model calls them."""

    def __init__(self, slots: int, dtype: torch.dtype, attend):
        super().__init__()
        self.attend = attend
        for name, cache in zip("kv", cases.make_cache(1, KV_HEADS, slots, HEAD_DIM, dtype), strict=True):
            self.register_buffer(f"{name}_cache", cache)
        for name, weight in cases.make_weights(HEAD_DIM, ROTARY).items():
            self.register_buffer(name, weight)

    def forward(self, qkv, positions):
        caches = {"k_cache": self.k_cache, "v_cache": self.v_cache, "positions": positions}
        weights = {"q_norm": self.q_norm, "k_norm": self.k_norm, "inv_freq": self.inv_freq}
        q = rope.qk_norm_rope(qkv=qkv, **weights, num_heads=HEADS, eps=cases.EPS, **caches)
        return self.attend(q=q, qkv=qkv, **caches)


@pytest.mark.parametrize("name", DECODE)
def test_graph_replay_follows_the_position(name):
    qkv, positions = cases.make_qkv(1, 1, HEADS, KV_HEADS, HEAD_DIM, BF16), cases.positions_of(5)
    eager, captured = (Attention(4096, BF16, DECODE[name]) for _ in range(2))
    captured(qkv, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured(qkv, positions)
    for step, position in enumerate((5, 6, 900, 4095, 0)):
        qkv.copy_(cases.make_qkv(1, 1, HEADS, KV_HEADS, HEAD_DIM, BF16, seed=step))
        positions.fill_(position)
        graph.replay()
        common.assert_bitwise_equal(out, eager(qkv, positions), f"position {position}")
    common.assert_bitwise_equal(captured.k_cache, eager.k_cache)
    common.assert_bitwise_equal(captured.v_cache, eager.v_cache)


@pytest.mark.parametrize("attend, lengths", [(ops.sdpa_prefill, (5, 64, 129)), (attention_splits.sdpa_decode_splitk, (1,))])
def test_compiled_and_exported(attend, lengths, tmp_path):
    """torch.compile and AOTInductor run the same kernels: bitwise equal, at lengths that were not traced."""
    eager, compiled, exported = (Attention(512, BF16, attend) for _ in range(3))
    traced = cases.make_qkv(1, 1 if lengths == (1,) else 33, HEADS, KV_HEADS, HEAD_DIM, BF16)
    dynamic = {"qkv": {1: torch.export.Dim("tokens", min=2, max=512)} if lengths != (1,) else None, "positions": None}
    program = torch.export.export(exported, (traced, cases.positions_of(3)), dynamic_shapes=dynamic)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    package = torch._inductor.aoti_load_package(path)
    fast = torch.compile(compiled, fullgraph=True, dynamic=lengths != (1,))
    for length in lengths:
        qkv, positions = cases.make_qkv(1, length, HEADS, KV_HEADS, HEAD_DIM, BF16, seed=length), cases.positions_of(40)
        expected = eager(qkv, positions)
        common.assert_bitwise_equal(fast(qkv, positions), expected, f"torch.compile, T={length}")
        common.assert_bitwise_equal(package(qkv, positions), expected, f"AOTInductor, T={length}")
    common.assert_bitwise_equal(compiled.k_cache, eager.k_cache)
    common.assert_bitwise_equal(compiled.v_cache, eager.v_cache)


# ---- sampler


def fresh_logits(rows: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, 1, VOCABULARY, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_greedy(dtype):
    x = fresh_logits(5, dtype)
    x[1, 0, 1000::70_000] = 60.0
    x[2, 0, -1] = 60.0
    x[3] = 0.0
    x[4, 0, 77_777] = float("nan")
    with common.poisoned_empty():
        out = sampler.greedy(logits=x)
    assert out.flatten().tolist()[1:] == [1000, VOCABULARY - 1, 0, 77_777]
    assert out[0].item() == (x[0, 0] == x[0, 0].max()).nonzero()[0].item()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 20, 0.95), (0.8, 0, 0.9), (1.2, 5000, 1.0)])
def test_sample(dtype, temperature, top_k, top_p):
    """The token is in the support and, but for rounding, the one with the reference's highest score."""
    x = fresh_logits(2, dtype)
    seed_state = common.Guarded(torch.tensor([torch.randint(2**62, ()).item(), 0], device="cuda"))
    near = {"top_p": top_p, "up": min(1.0, top_p + 1e-4), "down": top_p - 1e-4 if top_p < 1 else 1.0}
    support = {
        key: sampler.reference_support(logits=x, temperature=temperature, top_k=top_k, top_p=value) for key, value in near.items()
    }
    for draw in range(20):
        scores = sampler.reference_scores(logits=x, seed_state=seed_state.tensor, temperature=temperature)
        with common.poisoned_empty():
            token = sampler.sample(logits=x, seed_state=seed_state.tensor, temperature=temperature, top_k=top_k, top_p=top_p)
        assert seed_state.tensor[1].item() == draw + 1
        assert support["up"].gather(1, token).all()
        best = scores.masked_fill(~support["down"], float("-inf")).amax(-1, keepdim=True)
        assert (scores.gather(1, token) >= best - 1e-3).all()
    seed_state.check("seed_state")


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 6, 1.0), (1.7, 0, 0.8), (1.0, 8, 0.9)])
def test_sample_follows_the_distribution(temperature, top_k, top_p):
    from test_kernels_sample import chi_square, filtered, logits_of, seeds

    x = logits_of(1, 12, seed=5, scale=1.0).expand(40_000, 1, 12)
    draws = sampler.sample(logits=x, seed_state=seeds(), temperature=temperature, top_k=top_k, top_p=top_p)
    assert chi_square(draws, filtered(x[:1], temperature, top_k, top_p)) < 45


def test_sample_in_a_graph():
    x, settings = fresh_logits(1, BF16, scale=1.0), {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    seed_state, twin = torch.tensor([3, 0], device="cuda"), torch.tensor([3, 0], device="cuda")
    sampler.sample(logits=x, seed_state=seed_state, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = sampler.sample(logits=x, seed_state=seed_state, **settings)
    replayed = []
    for _ in range(2):
        seed_state.copy_(torch.tensor([3, 0]))
        for _ in range(10):
            graph.replay()
            replayed.append(token.item())
    eager = [sampler.sample(logits=x, seed_state=twin, **settings).item() for _ in range(10)]
    assert replayed == eager * 2 and len(set(eager)) > 3


def test_sample_is_bitwise_stable():
    x = fresh_logits(4, F32)
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.8}
    common.assert_bitwise_stable(
        lambda: sampler.sample(logits=x, seed_state=torch.tensor([9, 9], device="cuda"), **settings), runs=20
    )
