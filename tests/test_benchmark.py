"""Rounds of timing: how long they go on, what they keep. With a session and a clock that are known."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from moeexp_runner import energy, timing

from moeexp.config import compose
from moeexp.record.record import Record, latency_summary
from moeexp.run import benchmark
from moeexp.run.benchmark import Benchmark

CONFIG = compose.compose(["model=nano", "new_tokens=4", "batch=2"])


class Session:
    """A prefill takes 0.5 s; a generation 1 s to the first token and 0.25 s for each further one."""

    batch, device = 2, torch.device("cpu")

    def __init__(self, clock):
        self.clock, self.calls = clock, []
        self.prefill_s, self.step_s = lambda: 0.5, lambda: 0.25

    def reset(self):
        pass

    def prefill(self, tokens):
        self.clock.now += self.prefill_s()
        self.calls.append("prefill")

    def generate(self, tokens, new_tokens, *, on_token):
        self.calls.append(f"generate {new_tokens}")
        for index in range(new_tokens):
            self.clock.now += self.step_s() if index else 1.0
            on_token([index, index], index)
        return [list(range(new_tokens))] * 2


@pytest.fixture
def make(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    for module in (timing.time, benchmark.time, energy.time):
        monkeypatch.setattr(module, "perf_counter", lambda: clock.now)

    def make(**settings):
        config = dataclasses.replace(CONFIG, **settings)
        record = SimpleNamespace(latencies_ms=[], prefill_ms=[], ttft_ms=[])
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
    assert bench.record.prefill_ms == [500.0] and bench.record.ttft_ms == [1000.0]
    assert only["n"] == 3 and only["decode_ms_p50"] == 250.0 and only["prefill_s"] == 0.5 and only["ttft_s"] == 1.0
    assert bench.energy() == {}, "there is no counter here"


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
    assert bench.record.latencies_ms == [250.0] * 3 + [125.0] and bench.samples.lengths == [3, 1]
    assert bench.record.prefill_ms == [500.0] * 2 and bench.record.ttft_ms == [1000.0] * 2


@pytest.mark.parametrize("cuda_graph", [False, "decode", "loop", "all"])
def test_a_throughput_is_tokens_over_time_in_every_mode(make, cuda_graph):
    """Uneven samples, of which neither the median nor its inverse is a throughput."""
    bench = make(repeats=3, min_samples=1, min_time_s=0.0, cuda_graph=cuda_graph, new_tokens=9)
    steps, prefills = itertools.cycle([0.125, 0.125, 0.125, 0.75, 0.25]), itertools.cycle([0.5, 0.5, 3.5])
    bench.session.step_s, bench.session.prefill_s = steps.__next__, prefills.__next__
    for _ in range(3):
        bench.round()
    values, samples = bench.values(), bench.samples
    assert values["decode_tok_s"] == pytest.approx(2 * 24 / sum(samples.token_s))
    assert values["prefill_tok_s"] == pytest.approx(2 * 6 * 3 / 4.5)
    assert values["ttft_s"] == 1.0, "a latency, the median"
    sums = {key: sum(entry[key] for entry in values["rounds"]) for key in ("n", "decode_s", "prefills", "prefills_s")}
    assert values["decode_tok_s"] == pytest.approx(2 * sums["n"] / sums["decode_s"])
    assert values["prefill_tok_s"] == pytest.approx(12 * sums["prefills"] / sums["prefills_s"])
    assert [entry["prefill_s"] for entry in values["rounds"]] == [0.5, 0.5, 3.5]


@pytest.mark.parametrize("cuda_graph, ahead, burst", [(False, 1, 0), ("decode", 1, 0), ("loop", 4, 4), ("all", 4, 4)])
def test_a_stall_is_what_the_mode_could_not_recover(make, cuda_graph, ahead, burst):
    """A token of each generation is late by 6 steps. With a loop the next 4 come at once, and 2 steps were lost."""
    bench = make(repeats=3, min_samples=1, min_time_s=0.0, cuda_graph=cuda_graph, loop_ahead=4, new_tokens=41)
    pattern = [0.25] * 20 + [0.25 + 6 * 0.25] + [0.0] * burst + [0.25] * (19 - burst)
    bench.session.step_s = itertools.cycle(pattern).__next__
    for _ in range(3):
        bench.round()
    values = bench.values()
    found, lost = values["stalls"], 0.25 * (6 - burst)
    assert found["ahead"] == ahead and found["count"] == 3
    assert found["total_ms"] == pytest.approx(3e3 * lost, rel=1e-3)
    assert found["longest_ms"] == pytest.approx(1e3 * lost, rel=1e-3)
    time = sum(bench.samples.token_s)
    assert found["decode_tok_s"] == pytest.approx(2 * 120 / (time - 3 * lost), rel=1e-3)
    assert values["decode_tok_s"] == pytest.approx(2 * 120 / time)


def test_raw_samples_stay_where_a_run_was_interrupted_and_not_where_it_was_wrong(make, tmp_path):
    for status, passed, kept in (("interrupted", True, True), ("incorrect", False, False)):
        record = Record(tmp_path / f"{status}.json", id="t", config=compose.compose(["model=nano"]), command=["test"])
        bench = make(repeats=1, min_samples=1, min_time_s=0.0)
        bench.record = record
        bench.round()
        record.set(check={"passed": passed}, **bench.values())
        record.finish(status)
        found = Record.load(record.path)
        assert found.data["decode_tok_s"] is None and found.data["stalls"] is None
        samples = (found.latencies_ms, found.prefill_ms, found.ttft_ms)
        assert samples == (([250.0] * 3, [500.0], [1000.0]) if kept else ([], [], []))
        if kept:
            assert found.data["prefill_latencies_ms"] == latency_summary([500.0])
            assert found.data["ttft_latencies_ms"] == latency_summary([1000.0])


def test_energy_is_of_decoding_alone_and_no_sample(make, monkeypatch):
    """A GPU that takes 100 W while it prefills, 40 W while it decodes, and 10 W else."""
    bench = run(make(repeats=2, min_samples=1, min_time_s=0.0))
    session, timed = bench.session, len(bench.samples.token_s)
    joules = [0.0]

    def generate(tokens, new_tokens, *, on_token):
        start = session.clock.now
        ids = Session.generate(session, tokens, new_tokens, on_token=on_token)
        joules[0] += 100.0 * 1.0 + 40.0 * (session.clock.now - start - 1.0)
        return ids

    session.generate = generate

    def idle(seconds):
        session.clock.now += seconds
        joules[0] += 10.0 * seconds

    monkeypatch.setattr(energy.time, "sleep", idle)
    monkeypatch.setattr(energy, "counter", lambda device: lambda: joules[0])
    found = bench.energy()
    assert found["joules_per_token"] == pytest.approx(40.0 * 0.25 / 2), "two sequences share a step"
    assert found["energy"]["joules_per_prefill"] == pytest.approx(100.0)
    assert len(bench.samples.token_s) == timed == len(bench.record.latencies_ms)


@pytest.mark.parametrize("first, told", [(1.0, True), (14.0, True), (14.5, False)])
def test_energy_of_a_generation_that_is_nearly_all_prefill_is_not_told_and_it_says_so(make, monkeypatch, first, told):
    """Three steps of 0.25 s behind a prompt."""
    bench, notes = make(repeats=1, min_samples=1, min_time_s=0.0), []
    bench.record.note = notes.append
    bench.samples.token_s, bench.samples.ttft_s = 6 * [0.25], 2 * [first]
    monkeypatch.setattr(energy, "counter", lambda device: None)
    monkeypatch.setattr(energy, "of_decoding", lambda generate, new_tokens, read: {"joules": 1.0, "tokens": 2.0})
    assert bench.energy() == ({"energy": {"joules": 1.0, "tokens": 2.0}, "joules_per_token": 0.5} if told else {})
    assert bool(notes) != told and all("decoding is 4.9% of a generation's time" in note for note in notes)


def test_tokens_beyond_an_end_count_for_nothing(make, monkeypatch):
    """Of two rows one ends with its third token of ten, while the other goes on: nine steps' time, and 9 + 2 tokens after
    the first ones."""
    bench = make(new_tokens=10, repeats=2, min_samples=1, min_time_s=0.0)
    bench.eos, session = {7}, bench.session

    def generate(tokens, new_tokens, *, on_token):
        rows = [[20 + index, 7 if index == 2 else 1] for index in range(new_tokens)]
        for index, row in enumerate(rows):
            session.clock.now += session.step_s() if index else 1.0
            assert not on_token(row, index), "the first row goes on"
        return [list(row) for row in zip(*rows, strict=True)]

    session.generate = generate
    run(bench)
    assert bench.ids == [list(range(20, 30)), [1, 1, 7]]
    values = bench.values()
    assert values["decode_tok_s"] == 11 / (9 * 0.25) and values["stalls"]["decode_tok_s"] == pytest.approx(11 / (9 * 0.25))
    assert [(one["n"], one["tokens"]) for one in bench.rounds] == [(9, 11)] * 2
    assert bench.step_s() == 0.25
    taken = {}
    monkeypatch.setattr(energy, "counter", lambda device: None)
    monkeypatch.setattr(energy, "of_decoding", lambda generate, new_tokens, read: taken.update(tokens=generate(new_tokens)))
    assert bench.energy() == {} and taken == {"tokens": 11}
