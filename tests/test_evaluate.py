"""Bits per byte against a direct computation, with a session whose logits are known."""

import math

import pytest
import torch
from rich.console import Console

from moeexp.check import bits_per_byte as evaluate
from moeexp.check.bits_per_byte import bits_per_byte, position_slices, record_quality, window_losses
from moeexp.config.compose import compose
from moeexp.config.validate import validate
from moeexp.model.prompt import Text
from moeexp.record.phases import Phases
from moeexp.record.record import Record

VOCAB = 11
BYTES = Text("bytes", None)
LETTERS = "Привет мир, это текст. 你好世界，这是文字。 😀👨‍👩‍👧 é\r\n" * 4


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
    """Of tokens of unequal byte lengths: 1, 2 or 3."""
    return [1 + i % 3 for i in ids]


def directly(tokens, width):
    """By definition, one token at a time: bits of each scored token over bytes of each scored token."""
    session, bits, scored = CountingSession(), 0.0, 0
    for start in range(0, len(tokens), width):
        window = tokens[start : start + width]
        for i in range(1, len(window)):
            row = session.logits(torch.tensor(window[:i]))[-1].double()
            bits -= float(torch.log2(row.softmax(-1)[window[i]]))
            scored += sum(widths(window[i : i + 1]))
    return bits / scored, scored


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 21, 40])
def test_equals_the_definition(count, batch):
    tokens = text(count)
    result = bits_per_byte(CountingSession(batch), tokens, widths(tokens))
    bits, scored = directly(tokens, 8)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6) and result["scored_bytes"] == scored
    assert result["window"] == 8 and result["windows"] == sum(len(tokens[i : i + 8]) > 1 for i in range(0, count, 8))


def test_a_repeated_window_is_not_scored_twice():
    session = CountingSession(batch=2)
    result = bits_per_byte(session, text(24), widths(text(24)))
    assert [len(set(map(tuple, tokens))) for tokens, _ in session.calls] == [2, 1]
    assert result["windows"] == 3 and result["scored_bytes"] == directly(text(24), 8)[1]


def test_window_is_bounded_by_its_own_limit(monkeypatch):
    monkeypatch.setattr(evaluate, "WINDOW", 5)
    result = bits_per_byte(CountingSession(), text(12), widths(text(12)))
    assert result["window"] == 5 and result["bits_per_byte"] == pytest.approx(directly(text(12), 5)[0], rel=1e-6)


@pytest.mark.parametrize("limit", [1, 2 * VOCAB * 3, 10**6])
def test_slices_of_positions_change_nothing(monkeypatch, limit):
    session, window = CountingSession(batch=2), torch.tensor([text(8, 1), text(8, 2)])
    whole = window_losses(session, window)
    monkeypatch.setattr(evaluate, "SLICE_ELEMENTS", limit)
    session.calls.clear()
    assert torch.equal(window_losses(session, window), whole) and whole.shape == (2, 7)
    step = max(1, limit // (2 * VOCAB))
    assert [positions for _, positions in session.calls] == [list(range(i, min(7, i + step))) for i in range(0, 7, step)]
    assert torch.equal(torch.cat(position_slices(session, 7)), torch.arange(7))


@pytest.mark.parametrize("sizes", [[], [3], [2, 0]])
def test_too_little_text_is_refused(sizes):
    with pytest.raises(ValueError, match=f"{len(sizes)} tokens.*eval_bytes"):
        bits_per_byte(CountingSession(), [3] * len(sizes), sizes)


@pytest.mark.parametrize("width", [2, 3, 5, 8, 64])
def test_bytes_scored_are_those_of_the_text_wherever_a_window_ends(monkeypatch, width):
    """Windows of two- and three-byte letters, many of which split a letter. Decoding the tokens of a window apart, as one
    would, counts such a letter as U+FFFD, which has three bytes."""
    monkeypatch.setattr(evaluate, "WINDOW", width)
    ids, sizes = BYTES.measure(LETTERS)
    most = 0.0
    for start in range(width):  # every place in the text where windows may begin
        found = bits_per_byte(CountingSession(max_seq_len=width), [i % VOCAB for i in ids[start:]], sizes[start:])
        windows = [ids[i : i + width] for i in range(start, len(ids), width)]
        assert found["scored_bytes"] == sum(len(window) - 1 for window in windows)
        assert found["scored_bytes"] + len(windows) + start == len(LETTERS.encode())
        apart = sum(len(BYTES.decode(window[1:]).encode()) for window in windows)
        most = max(most, apart / found["scored_bytes"])
    assert most > {2: 2.0, 3: 1.5, 5: 1.3, 8: 1.2, 64: 1.02}[width]


def quality_of(tmp_path, data, size, text=BYTES):
    """What a record says after `record_quality` of a file with these bytes."""
    (tmp_path / "heldout.txt").write_bytes(data)
    cfg = compose(["model=tiny", f"model.heldout={tmp_path}/heldout.txt", f"eval_bytes={size}"])
    record = Record(tmp_path / "record.json", id="a", config=cfg, command=[])
    session = CountingSession()
    session.vocab_size, session.table = 256, torch.zeros(7, 256)
    record_quality(cfg, session, text, record, Phases(record, Console(quiet=True)))
    return record.data


@pytest.mark.parametrize("size", range(20, 26))
def test_a_character_that_eval_bytes_cuts_is_left_out(tmp_path, size):
    data = "\ufeffпривет\r\n你好👨‍👩‍👧 and more".encode()
    found = quality_of(tmp_path, data, size)
    assert data[17:20] == "你".encode() and data[20:23] == "好".encode()
    whole = 20 if size < 23 else 23
    assert found["evaluation"]["eval_bytes"] == whole and found["evaluation"]["scored_bytes"] == whole - 3
    assert found["bits_per_byte"] == pytest.approx(8.0)


@pytest.mark.parametrize("data, at", [(b"ab\xffcd" + b"e" * 30, 2), (b"abc\xc3", 3), (b"\xed\xa0\x80" + b"e" * 30, 0)])
def test_text_that_is_no_utf8_is_refused_before_any_work(tmp_path, data, at):
    """Bytes that do not decode were dropped without a word, wherever they stood."""
    with pytest.raises(ValueError, match=rf"heldout\.txt is not UTF-8 at byte {at} \(.*model\.heldout=null$"):
        quality_of(tmp_path, data, 16)
    cfg = compose(["model=tiny", f"model.heldout={tmp_path}/heldout.txt", "eval_bytes=16"])
    with pytest.raises(ValueError, match=f"is not UTF-8 at byte {at}"):
        validate(cfg, cuda_available=False)


def test_a_tokenizer_that_does_not_tell_is_noted(tmp_path):
    text = Text("bytes", None)
    text.measure = None
    found = quality_of(tmp_path, b"some text", 8, text)
    assert found["bits_per_byte"] is None and "does not tell which characters" in found["notes"][0]


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    session = CountingSession()
    session.table.zero_()
    assert bits_per_byte(session, text(30), [1] * 30)["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=1e-6)
