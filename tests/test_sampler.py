"""What feeds the next step: one op of the sampler where there is one, torch's ops elsewhere, and the loop around either."""

from __future__ import annotations

import pytest
import torch
from common import build_session, random_tokens
from kernels_common import DEVICE
from moeexp_kernels import registry
from moeexp_kernels.ops import sample
from moeexp_kernels.parts import tuning
from moeexp_runner.sampler import Sampler

from moeexp.config.compose import compose
from moeexp.stack.factory import sampler_of

DRAW = {"temperature": 2.0, "top_k": 0, "top_p": 1.0}
PROMPT = random_tokens(3, 7, device=DEVICE)


def fields(rows=3):
    shapes = {"token": (rows, 1), "positions": (rows,), "index": (1,), "ids": (4, rows)}
    return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}


def test_torchs_ops_feed_where_no_op_does():
    tokens, into = torch.tensor([[5], [2], [9]]), fields()
    sampler = Sampler(lambda *, logits: tokens + int(logits))
    for step in range(3):
        sampler.feed(logits=torch.tensor(step), **into)
    assert into["token"].tolist() == [[7], [4], [11]] and into["positions"].tolist() == [3, 3, 3] and into["index"].item() == 3
    assert into["ids"].tolist() == [[0, 0, 0], [5, 2, 9], [6, 3, 10], [7, 4, 11]]


def test_an_op_that_feeds_is_called_once_and_nothing_else_is():
    calls, into = [], fields()
    sampler = Sampler(
        lambda **arguments: pytest.fail("the choice alone"), feed_op=lambda **arguments: calls.append(arguments), seed=3, **DRAW
    )
    logits = torch.zeros(3, 1, 8)
    sampler.feed(logits=logits, **into)
    assert [set(call) for call in calls] == [{"logits", "seed_state", *DRAW, *into}]
    assert calls[0]["seed_state"] is sampler.seed_state and all(calls[0][name] is tensor for name, tensor in into.items())
    assert not any(tensor.any() for tensor in into.values()), "what the op left undone stays undone"


@pytest.mark.parametrize("name", ["greedy", "gumbel"])
def test_only_our_own_ops_feed(name, monkeypatch):
    cfg = compose([f"sampler={name}"]).sampler
    ours = {"greedy": sample.feed_greedy, "gumbel": sample.feed_sample}[name]
    assert sampler_of(cfg, "triton", device="cpu")._feed_op is ours
    assert sampler_of(cfg, "reference", device="cpu")._feed_op is None
    if name == "greedy":
        assert sampler_of(cfg, "moeexp_kernels.ops.sample:reference_greedy", device="cpu")._feed_op is None
    # What stands in for an op, as a seeded fault does, is called.
    table = registry.OPS["sample"] if name == "greedy" else registry.DRAWS
    monkeypatch.setitem(table, "triton", lambda **arguments: sample.reference_greedy(logits=arguments["logits"]))
    assert sampler_of(cfg, "triton", device="cpu")._feed_op is None


def test_an_op_that_feeds_takes_what_its_choice_takes():
    for choice, feed in registry.FEEDS:
        names = [[argument.name for argument in op._opoverload._schema.arguments] for op in (choice, feed)]
        assert names[1] == [*names[0], "token", "positions", "index", "ids"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several chunks of a small vocabulary."""
    row = tuning.lookup("sample", "", "cpu")
    monkeypatch.setitem(tuning.OVERRIDES, ("sample", ""), {**row, "BLOCK": 32, "NARROW_STEP": 16})


@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "draws"])
def test_a_loop_is_the_same_however_it_is_fed(small_blocks, draws):
    options = {"seed": 5, "device": DEVICE, **DRAW} if draws else {}
    choice, feed = registry.FEEDS[draws]
    reference = sample.reference_sample if draws else sample.reference_greedy
    found = []
    for sampler in (Sampler(reference, **options), Sampler(choice, **options), Sampler(choice, feed_op=feed, **options)):
        session = build_session(batch=3, max_seq_len=16, cuda_graph="loop", sampler=sampler, device=DEVICE)
        loop = session.loop
        # To the last slot; and then so that steps run beyond the one that is wanted.
        runs = [session.generate(PROMPT, 9), session.generate(PROMPT, 9, on_token=lambda ids, index: index == 2)]
        found.append([*runs, session.overrun, *(each.tolist() for each in (loop.token, loop.positions, loop.index, loop.ids))])
    assert found[0] == found[1] == found[2]
    eager = build_session(batch=3, max_seq_len=16, sampler=Sampler(reference, **options), device=DEVICE)
    assert found[0][0] == eager.generate(PROMPT, 9)
    assert found[0][4] == [7 + 8] * 3 and found[0][5] == [8], "after eight steps"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_warm_up_steps_back(small_blocks, monkeypatch, fused, capturing):
    """Outside a capture, on a GPU: however many there are, they write one row."""
    sampler = Sampler(sample.greedy, feed_op=sample.feed_greedy if fused else None)
    loop = build_session(batch=3, max_seq_len=8, cuda_graph="loop", sampler=sampler, device=DEVICE).loop
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    loop._copies = loop._copies or object()  # as if there were a stream
    loop.start(torch.zeros_like(loop.token), 0)
    loop.ids.fill_(-1)
    logits = torch.eye(3, 64, device=DEVICE)[:, None] * 2.0
    for _ in range(3):
        loop._feed(logits)
    steps = 3 if capturing else 0
    assert loop.positions.tolist() == [steps] * 3 and loop.index.item() == steps
    assert loop.token.tolist() == [[0], [1], [2]]
    written = max(steps, 1)
    assert loop.ids.tolist() == [[-1] * 3] + [[0, 1, 2]] * written + [[-1] * 3] * (7 - written)
