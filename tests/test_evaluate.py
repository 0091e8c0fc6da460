"""Bits per byte against a direct computation, with a session whose logits are known."""

import math

import pytest
import torch

from moeexp import evaluate
from moeexp.evaluate import bits_per_byte, position_slices, window_losses

VOCAB = 11


class CountingSession:
    """Logits at a position depend on every token since the last reset, through their running sum."""

    def __init__(self, batch=1, max_seq_len=8):
        self.batch, self.max_seq_len, self.vocab_size = batch, max_seq_len, VOCAB
        self.device = torch.device("cpu")
        self.table = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
        self.calls, self.clean = [], False

    def reset(self):
        self.clean = True

    def logits(self, tokens):
        return self.table[tokens.cumsum(-1) % 7]

    def prefill(self, tokens, positions):
        assert self.clean, "prefill on state that was not reset"
        assert tokens.shape[0] == self.batch and tokens.shape[1] <= self.max_seq_len and tokens.is_contiguous()
        self.clean = False
        self.calls.append((tokens.tolist(), positions.tolist()))
        return self.logits(tokens)[:, positions]


def text(n, seed=1):
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def widths(ids):
    """Tokens of unequal byte lengths: 1, 2 or 3."""
    return sum(1 + i % 3 for i in ids)


def directly(tokens, width):
    """By definition, one token at a time: bits of each scored token over bytes of each scored token."""
    session, bits, scored = CountingSession(), 0.0, 0
    for start in range(0, len(tokens), width):
        window = tokens[start : start + width]
        for i in range(1, len(window)):
            row = session.logits(torch.tensor(window[:i]))[-1].double()
            bits -= float(torch.log2(row.softmax(-1)[window[i]]))
            scored += widths(window[i : i + 1])
    return bits / scored, scored


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 21, 40])
def test_equals_the_definition(count, batch):
    tokens = text(count)
    result = bits_per_byte(CountingSession(batch), tokens, widths)
    bits, scored = directly(tokens, 8)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6) and result["scored_bytes"] == scored
    assert result["window"] == 8 and result["windows"] == sum(len(tokens[i : i + 8]) > 1 for i in range(0, count, 8))


def test_a_repeated_window_is_not_scored_twice():
    session = CountingSession(batch=2)
    result = bits_per_byte(session, text(24), widths)
    assert [len(set(map(tuple, tokens))) for tokens, _ in session.calls] == [2, 1]
    assert result["windows"] == 3 and result["scored_bytes"] == directly(text(24), 8)[1]


def test_window_is_bounded_by_its_own_limit(monkeypatch):
    monkeypatch.setattr(evaluate, "WINDOW", 5)
    result = bits_per_byte(CountingSession(), text(12), widths)
    assert result["window"] == 5 and result["bits_per_byte"] == pytest.approx(directly(text(12), 5)[0], rel=1e-6)


@pytest.mark.parametrize("limit", [1, 2 * VOCAB * 3, 10**6])
def test_slices_of_positions_change_nothing(monkeypatch, limit):
    session, window = CountingSession(batch=2), torch.tensor([text(8, 1), text(8, 2)])
    whole = window_losses(session, window)
    monkeypatch.setattr(evaluate, "SLICE_ELEMENTS", limit)
    session.calls.clear()
    assert torch.equal(window_losses(session, window), whole) and whole.shape == (2, 7)
    step = max(1, limit // (2 * VOCAB))
    assert [positions for _, positions in session.calls] == [
        list(range(i, min(7, i + step))) for i in range(0, 7, step)
    ]
    assert torch.equal(torch.cat(position_slices(session, 7)), torch.arange(7))


@pytest.mark.parametrize("tokens", [[], [3]])
def test_too_little_text_is_refused(tokens):
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens.*eval_bytes"):
        bits_per_byte(CountingSession(), tokens, widths)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    session = CountingSession()
    session.table.zero_()
    assert bits_per_byte(session, text(30), len)["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=1e-6)
