"""Intervals: that they cover what they say, that pairing and seeds do what they should, and when there is none."""

import numpy as np
import pytest
import synthetic

from moeexp import statistics
from moeexp.statistics import Interval, ratio, round_lengths, speed_of


def drifting(rng, rounds=5, per_round=40, drift=None):
    """Latencies of about 1 ms whose rounds differ by 2 %, or by the given drift, and single tokens by 3 %."""
    drift = rng.normal(0, 0.02, rounds) if drift is None else drift
    return np.exp(np.repeat(drift, per_round) + rng.normal(0, 0.03, rounds * per_round))


def test_the_interval_of_equal_runs_spans_one_nineteen_times_in_twenty():
    rng, covered, trials = np.random.default_rng(0), 0, 150
    for trial in range(trials):
        a = speed_of(synthetic.record(id=f"a{trial}", samples=drifting(rng)))
        b = speed_of(synthetic.record(id=f"b{trial}", samples=drifting(rng)))
        covered += ratio(b, a).verdict == "no difference"
    assert 0.90 <= covered / trials <= 0.995


def test_rounds_that_were_timed_in_turns_share_their_drift():
    rng = np.random.default_rng(1)
    drift = rng.normal(0, 0.05, 5)
    runs = {}
    for group in (None, {"id": "g", "rounds": 5}):
        a = synthetic.record(id="a", samples=drifting(np.random.default_rng(2), drift=drift), group=group)
        b = synthetic.record(id="b", samples=0.97 * drifting(np.random.default_rng(3), drift=drift), group=group)
        runs[group is None] = (speed_of(a), speed_of(b))
    alone, together = (ratio(*reversed(runs[key])) for key in (True, False))
    assert alone.verdict == "no difference" and together.verdict == "faster"
    assert together.high - together.low < 0.3 * (alone.high - alone.low)
    assert statistics.paired(*runs[False]) and not statistics.paired(*runs[True])


def test_the_value_is_the_ratio_of_the_published_speeds_and_lies_in_its_interval():
    a, b = synthetic.record(id="a", ms=2.0), synthetic.record(id="b", ms=1.0, seed=1)
    found = ratio(speed_of(b), speed_of(a))
    assert found.value == pytest.approx(b["decode_tok_s"] / a["decode_tok_s"])
    assert found.low < found.value < found.high and found.verdict == "faster"
    assert ratio(speed_of(a), speed_of(b)).verdict == "slower"


def test_the_same_records_give_the_same_numbers():
    first, second = (speed_of(synthetic.record(id="a", noise=0.1)).interval for _ in range(2))
    assert first == second
    assert speed_of(synthetic.record(id="other", noise=0.1)).interval != first


def test_a_wider_spread_of_rounds_widens_the_interval():
    def width(by):
        samples = drifting(np.random.default_rng(5), drift=by * np.array([-1, 0.5, 1, -0.5, 0]))
        found = speed_of(synthetic.record(samples=samples)).interval
        return found.high - found.low

    assert width(0.05) > 3 * width(0.005)


@pytest.mark.parametrize("samples", [[1.0] * 7, []])
def test_few_samples_give_a_speed_without_an_interval(samples):
    record = synthetic.record(ms=1.0)
    record["token_latencies_ms"] = record["token_latencies_ms"] | {"samples": samples}
    speed = speed_of(record)
    assert speed.tok_s == record["decode_tok_s"]
    assert ratio(speed, speed_of(synthetic.record(id="b"))) == Interval(pytest.approx(1.0, rel=0.1))
    assert ratio(speed, speed).verdict == "no interval"


def test_no_speed_no_interval():
    assert speed_of(synthetic.record(status="incorrect")) is None


def test_a_speed_of_bursts_is_held_against_the_mean():
    """Tokens that arrive eight at a time: the median latency is next to nothing and says nothing about speed."""
    samples = np.tile([0.001] * 7 + [8.0], 25) * np.repeat([1.0, 1.01, 0.99, 1.02, 0.98], 40)
    record = synthetic.record(samples=samples) | {"decode_tok_s": 1e3 / samples.mean()}
    found = speed_of(record).interval
    assert found.low < record["decode_tok_s"] < found.high and 1.01 < found.high / found.low < 1.2
    assert speed_of(record | {"decode_tok_s": 123.0}).log_replicates is None


def test_rounds_are_those_recorded_else_the_repeats_else_blocks():
    record = synthetic.record(rounds=5)
    assert round_lengths(record, 200) == [40] * 5
    latencies = record["token_latencies_ms"]
    assert round_lengths(record | {"rounds": [{"n": 150}, {"n": 50}]}, 200) == [150, 50]
    assert round_lengths(record | {"rounds": [{"n": 150}, {"n": 70}, {"n": 90}]}, 200) == [150, 50]
    assert round_lengths(record | {"rounds": [{"n": 150}]}, 200) == [40] * 5
    shortened = record | {"token_latencies_ms": latencies | {"n": 4000}}
    assert round_lengths(shortened, 200) == [20] * 10
    assert round_lengths(shortened, 9) == [5, 4] and sum(round_lengths(shortened, 23)) == 23


def test_students_t_is_the_table_of_any_textbook():
    assert [statistics.student(k) for k in (1, 4, 30, 1000)] == [12.706, 2.776, 2.042, 1.960]
    assert list(statistics.T_95) == sorted(statistics.T_95, reverse=True) and len(statistics.T_95) == 30
