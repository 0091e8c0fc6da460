"""Samples of a generation, with a session and a clock that are known."""

import time

import pytest
import torch
from common import EVEN, build_session, random_tokens
from moeexp_runner import timing
from moeexp_runner.timing import Samples, read_bandwidth, throughput, time_generation, time_prefill

CPU = torch.device("cpu")


class ScriptedSession:
    """Emits `rows[step]` at the times of `clock`, as `Session.generate` would."""

    def __init__(self, rows, clock, batch=None):
        self.rows, self.clock, self.batch, self.device = rows, clock, batch or len(rows[0]), CPU

    def generate(self, tokens, new_tokens, *, on_token):
        steps = []
        for index in range(new_tokens):
            if self.rows[index] is None:
                raise KeyboardInterrupt
            self.clock.now = self.clock.arrivals[index]
            steps.append(self.rows[index])
            if on_token(self.rows[index], index):
                break
        return [list(row) for row in zip(*steps, strict=True)]


class Clock:
    def __init__(self, *arrivals):
        self.now, self.arrivals = 100.0, [100.0 + a for a in arrivals]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(0.5, 0.75, 1.75, 2.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_latencies_are_differences_of_arrivals(clock):
    samples = Samples()
    ids = time_generation(ScriptedSession([[1], [2], [3], [4]], clock), None, 4, samples)
    assert ids == [[1, 2, 3, 4]]
    assert samples.ttft_s == [0.5] and samples.token_s == [0.25, 1.0, 0.25] and samples.prefill_s == []
    assert samples.lengths == [3]


def test_stops_once_every_row_has_ended(clock):
    rows = [[7, 1], [2, 1], [3, 9], [4, 4]]
    samples = Samples()
    assert time_generation(ScriptedSession(rows, clock), None, 4, samples, stop_ids={7, 9}) == [[7], [1, 1, 9]]
    assert len(samples.token_s) == 2 and samples.lengths == [2]
    assert samples.tokens == [1, 1], "the first row ended with its first token; what it makes beside the other counts for nothing"
    assert time_generation(ScriptedSession(rows, clock), None, 4, samples, stop_ids={7}) == [[7], [1, 1, 9, 4]]
    assert time_generation(ScriptedSession(rows, clock), None, 4, samples) == [[7, 2, 3, 4], [1, 1, 9, 4]]
    assert samples.tokens == [1, 1, 1, 1, 1, 2, 2, 2]
    assert time_generation(ScriptedSession(rows, clock), None, 4, Samples(), stop_ids={3, 9}) == [[7, 2, 3], [1, 1, 9]]


def test_an_interrupted_generation_keeps_its_samples(clock):
    samples = Samples()
    with pytest.raises(KeyboardInterrupt):
        time_generation(ScriptedSession([[1], [2], None], clock), None, 4, samples)
    assert samples.ttft_s == [0.5] and samples.token_s == [0.25] and samples.lengths == [1]
    with pytest.raises(KeyboardInterrupt):
        time_generation(ScriptedSession([None], clock, batch=1), None, 4, samples)
    assert samples.ttft_s == [0.5] and samples.token_s == [0.25] and samples.lengths == [1]


def test_a_real_session_is_timed():
    session, tokens, samples = build_session(EVEN, max_seq_len=24), random_tokens(1, 12), Samples()
    plain = session.generate(tokens, 4)
    start = time.perf_counter()
    assert time_generation(session, tokens, 4, samples) == plain
    time_prefill(session, tokens, samples)
    wall = time.perf_counter() - start
    assert len(samples.ttft_s) == 1 and len(samples.token_s) == 3 and len(samples.prefill_s) == 1
    every = samples.ttft_s + samples.token_s + samples.prefill_s
    assert min(every) > 0 and sum(every) <= wall
    time_prefill(session, tokens, samples)
    assert session.length == 12, "each prefill starts on reset state"


def test_a_throughput_is_tokens_over_time():
    assert throughput(9, [0.5, 0.5, 2.0]) == 3.0


def test_read_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    # Calls come in pairs, start and end; the first round is a warm-up that takes longest.
    times = iter([0, 9, 10, 14, 20, 22, 30, 33])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    assert read_bandwidth(CPU, megabytes=1, rounds=3) == 2**20 / 2
