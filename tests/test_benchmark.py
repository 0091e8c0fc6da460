"""Rounds of timing: how long they go on, what they keep. With a session and a clock that are known."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from moeexp_runner import timing

from moeexp import benchmark, schema
from moeexp.benchmark import Benchmark

CONFIG = schema.compose(["model=nano", "new_tokens=4", "batch=2"])


class Session:
    """A prefill takes 0.5 s; a generation 1 s to the first token and 0.25 s for each further one."""

    batch, device = 2, torch.device("cpu")

    def __init__(self, clock):
        self.clock, self.calls = clock, []

    def reset(self):
        pass

    def prefill(self, tokens):
        self.clock.now += 0.5
        self.calls.append("prefill")

    def generate(self, tokens, new_tokens, *, on_token):
        self.calls.append(f"generate {new_tokens}")
        for index in range(new_tokens):
            self.clock.now += 0.25 if index else 1.0
            on_token([index, index], index)
        return [list(range(new_tokens))] * 2


@pytest.fixture
def make(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    for module in (timing.time, benchmark.time):
        monkeypatch.setattr(module, "perf_counter", lambda: clock.now)

    def make(**settings):
        config = dataclasses.replace(CONFIG, **settings)
        record = SimpleNamespace(latencies_ms=[])
        return Benchmark(config, Session(clock), torch.zeros(2, 6, dtype=torch.int64), None, record)

    return make


def run(bench):
    bench.warm_up()
    while not bench.enough():
        bench.round()
    return bench


def test_one_round_is_at_least_a_prefill_and_a_generation(make):
    bench = run(make(repeats=1, min_samples=1, min_time_s=0.0))
    assert bench.session.calls == ["prefill", "generate 4", "prefill", "generate 4"], "the first pair is the warm-up"
    values = bench.values()
    assert values["prefill_tok_s"] == 2 * 6 / 0.5 and values["ttft_s"] == 1.0 and values["decode_tok_s"] == 2 / 0.25
    assert bench.record.latencies_ms == [250.0] * 3
    (only,) = values["rounds"]
    assert only["n"] == 3 and only["decode_ms_p50"] == 250.0 and only["prefill_s"] == 0.5 and only["ttft_s"] == 1.0
    assert "joules_per_token" not in values, "there is no counter here"


@pytest.mark.parametrize(
    "settings, rounds, samples",
    [
        ({"repeats": 4, "min_samples": 1, "min_time_s": 0.0}, 4, 12),
        ({"repeats": 1, "min_samples": 10, "min_time_s": 0.0}, 4, 12),
        # A quarter of a round of 10 s is prefills, 2.5 s of it; then generations of 1.75 s until the 10 s are over.
        ({"repeats": 2, "min_samples": 1, "min_time_s": 20.0}, 2, 2 * 5 * 3),
    ],
)
def test_rounds_samples_and_time_are_all_reached(make, settings, rounds, samples):
    bench = run(make(**settings))
    assert len(bench.rounds) == rounds and len(bench.samples.token_s) == samples
    assert sum(entry["n"] for entry in bench.rounds) == samples == len(bench.record.latencies_ms)
    assert bench.seconds >= settings["min_time_s"]


def test_a_run_of_one_token_ends_too(make):
    bench = run(make(repeats=1, min_samples=3, min_time_s=0.0, new_tokens=1))
    assert len(bench.samples.ttft_s) == 3 and "decode_tok_s" not in bench.values()


def test_what_was_measured_before_an_interrupt_is_kept(make):
    bench = make(repeats=5, min_samples=1, min_time_s=0.0)
    bench.round()

    def interrupted(tokens, new_tokens, *, on_token):
        bench.session.clock.now += 1.0
        on_token([0, 0], 0)
        bench.session.clock.now += 0.125
        on_token([0, 0], 1)
        raise KeyboardInterrupt

    bench.session.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        bench.round()
    assert bench.record.latencies_ms == [250.0] * 3 + [125.0]


def test_energy_is_that_of_generations(make, monkeypatch):
    readings = iter([5.0, 8.0, 100.0, 104.0])
    monkeypatch.setattr(timing, "energy_joules", lambda device: next(readings))
    bench = run(make(repeats=2, min_samples=1, min_time_s=0.0))
    assert bench.values()["joules_per_token"] == (3.0 + 4.0) / (2 * 8)
