"""The session on eager reference methods: limits, faults, and no memory of what was before."""

import pytest
import torch
from common import build_session, random_tokens, same_state
from kernels_common import poison_state


@pytest.fixture
def session():
    return build_session(max_seq_len=48)


def run(session, tokens, steps=3):
    session.reset()
    logits = [session.prefill(tokens, torch.arange(tokens.shape[1]))]
    for step in range(steps):
        logits.append(session.decode(tokens[:, step % tokens.shape[1]][:, None].contiguous()).clone())
    return torch.cat(logits, 1)


def test_context_filled_to_the_last_slot_and_not_beyond(session):
    tokens = random_tokens(1, 40)
    assert len(session.generate(tokens, 8)[0]) == 8
    with pytest.raises(ValueError, match="max_seq_len=48"):
        session.generate(tokens, 9)
    session.reset()
    session.prefill(random_tokens(1, 48))
    before = session.arena.snapshot()
    with pytest.raises(ValueError, match="max_seq_len=48"):
        session.decode(tokens[:, :1].contiguous())
    assert same_state(before, session.arena.snapshot()) and session.length == 48


@pytest.mark.parametrize(
    "tokens, word",
    [
        (torch.zeros(1, 3, dtype=torch.int32), "int64"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[1, T >= 1\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "T >= 1"),
        (torch.full((1, 3), 99), "token ids"),
        (torch.full((1, 3), -1), "token ids"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_wrong_tokens_are_refused_before_anything_runs(session, tokens, word):
    session.prefill(random_tokens(1, 5))
    before = session.arena.snapshot()
    with pytest.raises(ValueError, match=word):
        session.prefill(tokens)
    assert same_state(before, session.arena.snapshot()) and session.length == 5


def test_a_prompt_after_another_is_as_if_it_were_the_first(session):
    a, b = random_tokens(1, 20, seed=1), random_tokens(1, 33, seed=2)
    first = run(session, a)
    run(session, b)
    assert torch.equal(run(session, a), first)


def test_interleaved_sessions_do_not_bleed():
    one, two = build_session(seed=0, max_seq_len=48), build_session(seed=0, max_seq_len=48)
    a, b = random_tokens(1, 20, seed=1), random_tokens(1, 20, seed=2)
    alone_a, alone_b = run(one, a), run(two, b)
    one.reset(), two.reset()
    mixed_a = [one.prefill(a, torch.arange(20))]
    mixed_b = [two.prefill(b, torch.arange(20))]
    for step in range(3):
        mixed_a.append(one.decode(a[:, step][:, None].contiguous()).clone())
        mixed_b.append(two.decode(b[:, step][:, None].contiguous()).clone())
    assert torch.equal(torch.cat(mixed_a, 1), alone_a) and torch.equal(torch.cat(mixed_b, 1), alone_b)


def test_nan_left_in_the_state_is_gone_after_reset(session):
    tokens = random_tokens(1, 20)
    clean = run(session, tokens)
    poison_state(session.arena.tensors, kinds=("",))
    assert torch.equal(run(session, tokens), clean)


def test_nan_beyond_the_position_has_no_effect(session):
    tokens = random_tokens(1, 20)
    clean = run(session, tokens)
    session.reset()
    poison_state(session.arena.tensors)
    logits = [session.prefill(tokens, torch.arange(20))]
    for step in range(3):
        logits.append(session.decode(tokens[:, step][:, None].contiguous()).clone())
    assert torch.equal(torch.cat(logits, 1), clean)


@pytest.mark.parametrize("splits", [(37, 33), (1, 69), (64, 6), (63, 7), (65, 1, 4), (3, 17, 50)])
def test_ragged_prefill_equals_one_call(splits):
    session, tokens = build_session(max_seq_len=70), random_tokens(1, 70)
    whole = session.prefill(tokens, torch.arange(70))
    state = session.arena.snapshot()
    session.reset()
    parts = [session.prefill(part.contiguous(), torch.arange(part.shape[1])) for part in tokens.split(splits, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    for name, tensor in session.arena.tensors.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-5, msg=name)


def test_rows_of_a_batch_are_independent():
    both = build_session(seed=0, batch=2, max_seq_len=48)
    alone = build_session(seed=0, max_seq_len=48)
    tokens = random_tokens(2, 20)
    together = run(both, tokens)
    for row in range(2):
        torch.testing.assert_close(together[row : row + 1], run(alone, tokens[row : row + 1].contiguous()), rtol=0, atol=1e-5)


def test_state_that_was_replaced_is_noticed_before_launch(session):
    session.prefill(random_tokens(1, 5))
    name = next(iter(session.arena.tensors))
    session.arena.tensors[name] = session.arena.tensors[name].clone()
    with pytest.raises(RuntimeError, match="re-allocated"):
        session.decode(random_tokens(1, 1))


def test_generation_stops_when_told_and_a_closed_session_refuses(session):
    seen = []

    def stop(ids, index):
        seen.append(ids)
        return index == 2

    assert len(session.generate(random_tokens(1, 5), 10, on_token=stop)[0]) == 3 == len(seen)
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.decode(random_tokens(1, 1))


def unchanged(session, call, message):
    """`call` must raise ValueError and leave session and state as they were."""
    before, length = session.arena.snapshot(), session.length
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert same_state(before, session.arena.snapshot()) and session.length == length


@pytest.mark.parametrize(
    "positions, message",
    [
        (torch.tensor([], dtype=torch.int64), "not be empty"),
        (torch.tensor([-1]), r"0\.\.3"),
        (torch.tensor([0, 4]), r"0\.\.3"),
        (torch.tensor([1.0]), "int64"),
        (torch.tensor([True, False]), "int64"),
        (torch.tensor(1), r"int64 \[n\]"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_wrong_logit_positions_are_refused_before_anything_runs(session, positions, message):
    session.prefill(random_tokens(1, 5))
    unchanged(session, lambda: session.prefill(random_tokens(1, 4), positions), message)


@pytest.mark.parametrize(
    "token, message",
    [
        (torch.zeros(1, 2, dtype=torch.int64), r"\[1, 1\], got \[1, 2\]"),
        (torch.zeros(1, dtype=torch.int64), "int64"),
        (torch.zeros(2, 1, dtype=torch.int64), "int64"),
        (torch.zeros(1, 1), "int64"),
        (torch.zeros(1, 1, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_wrong_decode_tokens_are_refused_before_anything_runs(session, token, message):
    session.prefill(random_tokens(1, 5))
    unchanged(session, lambda: session.decode(token), message)


@pytest.mark.parametrize(
    "tokens, new_tokens, message",
    [
        (torch.full((1, 3), 99), 2, "token ids"),
        (torch.zeros(1, 3), 2, "int64"),
        (torch.zeros(3, dtype=torch.int64), 2, "int64"),
        (torch.zeros(1, 3, dtype=torch.int64), 0, "new_tokens=0"),
        (torch.zeros(1, 47, dtype=torch.int64), 2, "47 tokens plus new_tokens=2"),
    ],
)
def test_a_refused_generation_does_not_even_reset(session, tokens, new_tokens, message):
    session.prefill(random_tokens(1, 5))
    unchanged(session, lambda: session.generate(tokens, new_tokens), message)


def test_prefill_to_the_last_slot_in_pieces_and_not_beyond(session):
    session.prefill(random_tokens(1, 30))
    unchanged(session, lambda: session.prefill(random_tokens(1, 19)), "30 tokens in the session plus 19")
    session.prefill(random_tokens(1, 18))
    assert session.length == 48


def test_by_default_the_last_position_has_logits(session):
    tokens = random_tokens(1, 9)
    last = session.prefill(tokens)
    session.reset()
    assert last.shape == (1, 1, 64)
    torch.testing.assert_close(last, session.prefill(tokens, torch.arange(9))[:, 8:], rtol=0, atol=1e-6)


def test_a_prompt_of_one_token_is_a_prompt(session):
    """Also after another prompt, and equal to the same token through decode on reset state."""
    token = random_tokens(1, 1)
    first = session.prefill(token).clone()
    state = session.arena.snapshot()
    session.prefill(random_tokens(1, 20))
    session.reset()
    assert torch.equal(session.prefill(token), first) and same_state(session.arena.snapshot(), state)
    session.reset()
    torch.testing.assert_close(session.decode(token), first, rtol=0, atol=1e-5)
    assert len(session.generate(token, 3)[0]) == 3


def test_generate_is_prefill_sample_decode():
    session, tokens = build_session(batch=2, max_seq_len=24), random_tokens(2, 7)
    token, expected = session.sample(session.prefill(tokens)), []
    for _ in range(5):
        expected.append(token[:, 0].tolist())
        token = session.sample(session.decode(token))
    seen = []
    rows = session.generate(tokens, 5, on_token=lambda ids, index: seen.append((index, ids)))
    assert seen == list(enumerate(expected)) and rows == [list(row) for row in zip(*expected, strict=True)]
    assert session.length == 7 + 4, "the last token is not fed"


def test_copied_outputs_are_sampled_alike():
    tokens = random_tokens(1, 7)
    session = build_session(max_seq_len=24, copy_outputs=True)
    assert session.generate(tokens, 5) == build_session(max_seq_len=24).generate(tokens, 5)


def test_every_call_on_a_closed_session_is_refused(session):
    token = random_tokens(1, 1)
    session.close()
    session.close()
    for call in (session.reset, lambda: session.prefill(token), lambda: session.decode(token)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        session.generate(token, 2)


def test_positions_of_the_next_call_follow_what_was_seen(session):
    """Position-indexed state: slots that were fed are written, the ones after them are not."""
    session.prefill(random_tokens(1, 5))
    session.decode(random_tokens(1, 1))
    for name, tensor in session.arena.tensors.items():
        if name.endswith("_cache"):
            written = tensor.abs().sum((0, 1, 3)) > 0
            assert written[:6].all() and not written[6:].any(), name
