"""Greedy choice and draws: against the references, against transformers' filters, and against the distribution. A token that is
fed: against torch's ops."""

from __future__ import annotations

from functools import partial

import kernels_common as common
import pytest
import torch
from moeexp_kernels.ops import sample as ops
from moeexp_kernels.parts import tuning
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NO_FILTER = {"top_k": 0, "top_p": 1.0}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several chunks also at a vocabulary that the interpreter can afford."""
    row = tuning.lookup("sample", "", "cpu")
    monkeypatch.setitem(tuning.OVERRIDES, ("sample", ""), {**row, "BLOCK": 32, "NARROW_STEP": 16})


def seeds(seed: int = 1234, offset: int = 0) -> Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=common.DEVICE)


def logits_of(*rows_by_tokens: int, seed: int, dtype=F32, scale=2.0) -> Tensor:
    return common.randn(*rows_by_tokens, seed=seed, dtype=dtype, scale=scale)[:, None]


def chi_square(draws: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic; tokens of probability 0 must not occur."""
    counts = torch.bincount(draws.flatten().cpu(), minlength=probabilities.numel()).double()
    expected = probabilities.double().cpu() * draws.numel()
    assert counts[expected == 0].sum() == 0, "a token outside the support was drawn"
    used = expected > 0
    return ((counts - expected)[used].square() / expected[used]).sum().item()


def filtered(x: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] of one row of logits."""
    keep = ops.reference_support(logits=x, temperature=temperature, top_k=top_k, top_p=top_p)
    return (x[:1, 0].double() / temperature).masked_fill(~keep[:1], float("-inf")).softmax(-1)[0]


# ---- greedy


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocabulary", [1, 31, 33, 200])
def test_greedy_is_argmax(small_blocks, dtype, vocabulary):
    x = logits_of(3, vocabulary, seed=vocabulary, dtype=dtype)
    with common.poisoned_empty():
        common.assert_bitwise_equal(ops.greedy(logits=x), ops.reference_greedy(logits=x))


def test_greedy_takes_the_lowest_index_of_a_tie_and_every_special_value(small_blocks):
    nan, inf = float("nan"), float("inf")
    rows = [
        ([1.0, 7.0, 7.0, 0.0], 1),
        ([-0.0, 0.0, -1.0, -2.0], 0),
        ([0.0, -0.0, -1.0, -2.0], 0),
        ([-inf, -inf, -inf, -inf], 0),
        ([-3.0, -inf, -2.0, -4.0], 2),
        ([1.0, inf, 2.0, inf], 1),
        ([1.0, nan, inf, nan], 1),
        ([1.0, 2.0, -nan, 3.0], 2),
    ]
    x = torch.tensor([values for values, _ in rows], device=common.DEVICE)[:, None]
    assert ops.greedy(logits=x).flatten().tolist() == [index for _, index in rows]
    wide = torch.zeros(1, 1, 130, device=common.DEVICE)  # equal logits in every chunk
    assert ops.greedy(logits=wide).item() == 0
    wide[..., 129] = 1
    assert ops.greedy(logits=wide).item() == 129


def test_greedy_reads_a_strided_batch(small_blocks):
    x = logits_of(4, 50, seed=3)[::2]
    common.assert_bitwise_equal(ops.greedy(logits=x), ops.reference_greedy(logits=x))


# ---- the reference


def test_philox_known_answers():
    # Random123's kat_vectors: counter 0 and key 0; all counter and key words 2^32 - 1.
    assert ops.reference_words(torch.tensor([0, 0]), 1, 1).item() == 0x6627E8D5
    seed_state = torch.tensor([-1, -1])
    # Token and row are counter words too; -1 in both is beyond what a vocabulary holds, so that vector is not reachable.
    words = ops.reference_words(seed_state, 2, 4)
    assert len(set(words.flatten().tolist())) == 8 and 0 <= words.min() and words.max() < 2**32


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 5, 1.0), (0.7, 0, 0.8), (1.5, 40, 0.5), (0.6, 20, 0.95), (1, 1, 1e-3)]
)
def test_support_is_that_of_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    x = common.randn(6, 100, seed=11, scale=3.0, device="cpu")
    expected = TemperatureLogitsWarper(float(temperature))(None, x) if temperature != 1 else x
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    support = ops.reference_support(logits=x[:, None], temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(support, expected.isfinite())


def test_ties_at_the_threshold_all_stay():
    x = torch.tensor([[[3.0, 2.0, 2.0, 2.0, 1.0]]])
    assert ops.reference_support(logits=x, temperature=1.0, top_k=2, top_p=1.0)[0].tolist() == [True] * 4 + [False]
    assert ops.reference_support(logits=x, temperature=1.0, top_k=0, top_p=0.5)[0].tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 6, 1.0), (1.7, 0, 0.8), (1.0, 8, 0.9)])
def test_reference_draws_follow_the_distribution(temperature, top_k, top_p):
    # 40,000 draws of 11 degrees of freedom at most: 45 is exceeded with probability 5e-6, a 3 % error of one token gives ~60.
    x = logits_of(1, 12, seed=5, scale=1.0).expand(40_000, 1, 12)
    draws = ops.reference_sample(logits=x, seed_state=seeds(), temperature=temperature, top_k=top_k, top_p=top_p)
    assert chi_square(draws, filtered(x[:1], temperature, top_k, top_p)) < 45


# ---- the kernels

CASES = [
    (1.0, 0, 1.0),
    pytest.param(0.7, 20, 1.0, marks=pytest.mark.slow),
    pytest.param(0.7, 0, 0.9, marks=pytest.mark.slow),
    (1.3, 30, 0.8),
    pytest.param(1.0, 1, 1.0, marks=pytest.mark.slow),
    pytest.param(0.5, 0, 0.01, marks=pytest.mark.slow),
    pytest.param(1.0, 1000, 0.999, marks=pytest.mark.slow),
    pytest.param(2.0, 3, 0.95, marks=pytest.mark.slow),
    pytest.param(0.01, 5, 0.5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), BF16, pytest.param(F16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature, top_k, top_p", CASES)
def test_kernels_draw_the_reference_tokens(small_blocks, dtype, temperature, top_k, top_p):
    x = common.Guarded(logits_of(2, 75, seed=7, dtype=dtype))
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    state, expected_state = common.Guarded(seeds(2**40 + 17, 2**33 - 1)), seeds(2**40 + 17, 2**33 - 1)
    for _ in range(2):
        with common.poisoned_empty():
            token = ops.sample(logits=x.tensor, seed_state=state.tensor, **settings)
        expected = ops.reference_sample(logits=x.tensor, seed_state=expected_state, **settings)
        common.assert_bitwise_equal(token, expected)
        common.assert_bitwise_equal(state.tensor, expected_state, "seed_state")
    x.check("logits")
    state.check("seed_state")


@pytest.mark.slow
def test_kernels_draw_from_exactly_the_support(small_blocks):
    """Ties at both thresholds, few distinct values: every token of the support comes up, no other does."""
    row = torch.tensor([2.0, 1.0, 2.0, 1.5, 1.5, 1.5, 0.0, -1.0, float("-inf"), 1.0], device=common.DEVICE)
    x = row.expand(20, 1, 10).to(BF16)
    for top_k, top_p in ((3, 1.0), (0, 0.75)):
        support = ops.reference_support(logits=x[:1], temperature=1.0, top_k=top_k, top_p=top_p)[0]
        assert support.tolist() == [True, False, True, True, True, True] + [False] * 4
        draws = ops.sample(logits=x, seed_state=seeds(), temperature=1.0, top_k=top_k, top_p=top_p)
        assert sorted(set(draws.flatten().tolist())) == support.nonzero().flatten().tolist()


@pytest.mark.slow
def test_kernels_keep_no_token_too_many(small_blocks):
    """Nearly equal logits without ties: one more token than top_k would be drawn a third of the time."""
    x = torch.tensor([0.0, 0.5, 0.25, 0.375, -1.0], device=common.DEVICE).expand(16, 1, 5).to(BF16)
    draws = ops.sample(logits=x, seed_state=seeds(), temperature=1.0, top_k=2, top_p=1.0)
    assert set(draws.flatten().tolist()) == {1, 3}
    # 0.5 and 0.375 have 0.54 of all the mass, but 0.71 of the mass of the three largest.
    draws = ops.sample(logits=x, seed_state=seeds(), temperature=1.0, top_k=3, top_p=0.6)
    assert set(draws.flatten().tolist()) == {1, 3}


@pytest.mark.slow
def test_kernels_follow_the_distribution():
    x = logits_of(1, 5, seed=5, scale=1.0).expand(600, 1, 5)
    draws = ops.sample(logits=x, seed_state=seeds(), temperature=1.0, **NO_FILTER)
    assert chi_square(draws, filtered(x[:1], 1.0, 0, 1.0)) < 30  # 4 degrees of freedom: probability 5e-6


def test_replays_differ_and_a_reseed_repeats(small_blocks):
    x = torch.zeros(2, 1, 64, device=common.DEVICE)
    state = seeds(5)
    draws = [ops.sample(logits=x, seed_state=state, temperature=1.0, **NO_FILTER).flatten().tolist() for _ in range(4)]
    assert state.tolist() == [5, 4]
    assert len({tuple(pair) for pair in draws}) == 4 and any(first != second for first, second in draws)
    state.copy_(seeds(5))
    again = [ops.sample(logits=x, seed_state=state, temperature=1.0, **NO_FILTER).flatten().tolist() for _ in range(4)]
    assert again == draws
    other = ops.sample(logits=x, seed_state=seeds(6), temperature=1.0, **NO_FILTER).flatten().tolist()
    assert other != draws[0]


def test_no_temperature_is_greedy(small_blocks):
    x = logits_of(3, 70, seed=9)
    state = seeds(1, 2)
    common.assert_bitwise_equal(
        ops.sample(logits=x, seed_state=state, temperature=0.0, top_k=5, top_p=0.5), ops.reference_greedy(logits=x)
    )
    assert state.tolist() == [1, 2]
    almost = ops.sample(logits=x, seed_state=state, temperature=ops.MIN_TEMPERATURE, **NO_FILTER)
    common.assert_bitwise_equal(almost, ops.reference_greedy(logits=x))


# ---- what is fed

SLOTS = 6


def to_feed(rows: int, *, index: int = 0) -> dict[str, Tensor]:
    """As a loop has them after `index` steps; ids that nobody chose."""
    wide: dict = {"dtype": torch.int64, "device": common.DEVICE}
    positions = torch.arange(rows, **wide) * 3 + 2**40
    return {
        "token": torch.full((rows, 1), -7, **wide), "positions": positions, "index": torch.tensor([index], **wide),
        "ids": torch.arange(SLOTS * rows, **wide).view(SLOTS, rows) - 1000,
    }  # fmt: skip


def feed_by_torch(into: dict[str, Tensor], token: Tensor) -> None:
    into["token"].copy_(token)
    into["positions"].add_(1)
    into["index"].add_(1)
    into["ids"].index_copy_(0, into["index"], into["token"].view(1, -1))


FEEDS = {
    "greedy": None,
    "draw": {"temperature": 1.0, **NO_FILTER},
    "filtered draw": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "no temperature": {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
}


@pytest.mark.parametrize(
    "kind, rows",
    [
        pytest.param(kind, rows, marks=[pytest.mark.slow] if rows > (1 if kind == "filtered draw" else 3) else [])
        for kind in FEEDS for rows in (1, 3, 17)
    ],
)  # fmt: skip
def test_feeding_is_what_torchs_ops_do(small_blocks, kind, rows):
    """Steps in a row, each with other logits, the last of which fills the last row of ids."""
    settings, state, expected_state = FEEDS[kind], common.Guarded(seeds()), seeds()
    expected, guarded = to_feed(rows, index=1), {name: common.Guarded(each) for name, each in to_feed(rows, index=1).items()}
    into = {name: each.tensor for name, each in guarded.items()}
    for step in range(SLOTS - 2):
        x = logits_of(rows, 75, seed=step, dtype=BF16)
        with common.poisoned_empty():
            if settings is None:
                assert ops.feed_greedy(logits=x, **into) is None
            else:
                assert ops.feed_sample(logits=x, seed_state=state.tensor, **settings, **into) is None
        token = (
            ops.reference_greedy(logits=x) if settings is None
            else ops.reference_sample(logits=x, seed_state=expected_state, **settings)
        )  # fmt: skip
        feed_by_torch(expected, token)
        for name in into:
            common.assert_bitwise_equal(into[name], expected[name], f"{name} after step {step}")
        common.assert_bitwise_equal(state.tensor, expected_state, "seed_state")
    assert into["index"].item() == SLOTS - 1
    for name, each in [*guarded.items(), ("seed_state", state)]:
        each.check(name)


@pytest.mark.parametrize("index", [-(2**62), -2, SLOTS - 1, SLOTS, 2**62])
def test_a_row_of_ids_that_is_none_is_not_written(small_blocks, index):
    guarded = {name: common.Guarded(each) for name, each in to_feed(3, index=index).items()}
    x, before = logits_of(3, 40, seed=1), to_feed(3)
    ops.feed_greedy(logits=x, **{name: each.tensor for name, each in guarded.items()})
    common.assert_bitwise_equal(guarded["ids"].tensor, before["ids"], "ids")
    common.assert_bitwise_equal(guarded["token"].tensor, ops.reference_greedy(logits=x))
    common.assert_bitwise_equal(guarded["positions"].tensor, before["positions"] + 1, "positions")
    assert guarded["index"].tensor.item() == index + 1
    for name, each in guarded.items():
        each.check(name)


def test_what_cannot_be_fed_is_refused():
    x, into = logits_of(2, 8, seed=1), to_feed(2)
    draw = {"seed_state": seeds(), "temperature": 1.0, **NO_FILTER}
    wrong = {
        "token": into["token"][:1], "positions": into["positions"].int(), "index": into["index"][0],
        "ids": into["ids"].T.contiguous().T,
    }  # fmt: skip
    for name, value in wrong.items():
        for feed in (partial(ops.feed_greedy, logits=x), partial(ops.feed_sample, logits=x, **draw)):
            common.expect_value_error(lambda feed=feed, name=name, value=value: feed(**{**into, name: value}), name, "int64")
    common.expect_value_error(lambda: ops.feed_greedy(logits=x.double(), **into), "float64")
    common.expect_value_error(lambda: ops.feed_sample(logits=x, **{**draw, "top_k": -1}, **into), "top_k=-1")
    before = to_feed(2)
    for name, value in into.items():
        common.assert_bitwise_equal(value, before[name], name)


@pytest.mark.parametrize("draw", [ops.sample, ops.reference_sample])
def test_refusals(draw):
    x, good = logits_of(1, 8, seed=1), {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def refused(*words: str, logits: Tensor = x, seed_state: Tensor | None = None, **changed):
        state = seeds() if seed_state is None else seed_state
        common.expect_value_error(lambda: draw(logits=logits, seed_state=state, **{**good, **changed}), *words)

    refused("temperature=-1.0", "greedy", temperature=-1.0)
    refused("temperature=1e-09", temperature=1e-9)
    refused("temperature=nan", temperature=float("nan"))
    refused("top_k=-1", top_k=-1)
    refused("top_p=0.0", "(0, 1]", top_p=0.0)
    refused("top_p=1.5", top_p=1.5)
    refused("float64", logits=x.double())
    refused("[B, 1, V]", logits=x.expand(1, 2, 8))
    refused("strides", logits=logits_of(1, 16, seed=1)[..., ::2])
    refused("seed_state", "int64", seed_state=seeds().int())
