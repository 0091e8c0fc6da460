"""Intervals: that they cover what they say, that pairing and seeds do what they should, and when there is none."""

from dataclasses import replace

import numpy as np
import pytest
import synthetic

from moeexp.report import intervals
from moeexp.report.intervals import Interval, Speed, interval, ratio, round_lengths, speed_of
from moeexp.report.runs import runs_of


def drifting(rng, rounds=5, per_round=40, drift=None):
    """Latencies of about 1 ms whose rounds differ by 2 %, or by the given drift, and single tokens by 3 %."""
    drift = rng.normal(0, 0.02, rounds) if drift is None else drift
    return np.exp(np.repeat(drift, per_round) + rng.normal(0, 0.03, rounds * per_round))


def test_the_interval_of_equal_runs_spans_one_nineteen_times_in_twenty():
    rng, covered, trials = np.random.default_rng(0), 0, 150
    for trial in range(trials):
        a = speed_of(synthetic.record(id=f"a{trial}", samples=drifting(rng)))
        b = speed_of(synthetic.record(id=f"b{trial}", samples=drifting(rng)))
        # By the rounds alone.
        covered += ratio(replace(b, run_to_run=0.0), replace(a, run_to_run=0.0)).verdict == "no difference"
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
    assert together.in_turns and not alone.in_turns


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
    found = ratio(speed, speed_of(synthetic.record(id="b")))
    noise = pytest.approx(0.05)
    alone = Interval(pytest.approx(1.0, rel=0.1), run_to_run=noise)
    assert found == replace(alone, medians=alone)
    assert ratio(speed, speed).verdict == "no interval"


def test_no_speed_no_interval():
    assert speed_of(synthetic.record(status="incorrect")) is None


def test_a_speed_is_held_against_the_mean_of_its_samples():
    """Tokens that arrive eight at a time: the median latency is next to nothing and says nothing about speed."""
    samples = np.tile([0.001] * 7 + [8.0], 25) * np.repeat([1.0, 1.01, 0.99, 1.02, 0.98], 40)
    record = synthetic.record(samples=samples) | {"decode_tok_s": 1e3 / samples.mean()}
    found = speed_of(record).interval
    assert found.low < record["decode_tok_s"] < found.high and 1.01 < found.high / found.low < 1.2
    assert speed_of(record | {"decode_tok_s": 123.0}).log_replicates is None
    median = 1e3 / record["token_latencies_ms"]["p50"]
    assert speed_of(record | {"decode_tok_s": median}).log_replicates is None, "a median is no tokens over time"


def stalled(late=16.0, id="late", group=None, **values):
    """A millisecond a token, but for a few late tokens in one of five rounds."""
    samples = 1.0 + 0.002 * np.random.default_rng(7).normal(size=200)
    samples[[90, 95, 100, 105]] = late
    return synthetic.record(id=id, samples=samples, group=group, **values)


def test_a_gain_that_is_a_stall_is_seen_by_medians_and_without_stalls_and_said():
    turns = {"id": "g"}
    late = stalled(group=turns, stalls=synthetic.stalls(4, 15.0, 1000.0))
    smooth = synthetic.record(id="b", ms=1.0, noise=0.002, group=turns, stalls=synthetic.stalls(0, 0.0, 1000.0))
    found = ratio(speed_of(smooth), speed_of(late))
    assert found.value == pytest.approx(1.3, rel=0.01)
    assert found.medians.value == pytest.approx(1.0, rel=0.01) and found.corrected.value == pytest.approx(1.0, rel=0.01)
    assert found.medians.high < 1.01 and found.low < 0.99, "late tokens widen the ratio's interval, not the medians'"
    every = np.tile(np.where(np.arange(40) == 20, 16.0, 1.0), 5) + 0.002 * np.random.default_rng(8).normal(size=200)
    steady = synthetic.record(id="a", samples=every, group=turns, stalls=synthetic.stalls(5, 15.0, 1000.0))
    found = ratio(speed_of(smooth), speed_of(steady))
    assert found.verdict == "faster" and found.phrase == "faster, but no difference by medians and without stalls"
    hidden = synthetic.record(id="c", samples=0.98 * every, group=turns)
    found = ratio(speed_of(hidden), speed_of(stalled(group=turns)))
    assert found.corrected is None and found.verdict == "no difference"
    assert found.phrase == "no difference, but faster by medians"


def test_a_single_round_is_cut_into_blocks():
    """Drawn whole, it would have no spread at all."""
    record = synthetic.record(rounds=1) | {"rounds": [{"n": 40}]}
    assert round_lengths(record, 40) == [8] * 5
    found = speed_of(record).interval
    assert found.low < found.value < found.high


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
    assert [intervals.student(k) for k in (1, 4, 30, 1000)] == [12.706, 2.776, 2.042, 1.960]
    assert list(intervals.T_95) == sorted(intervals.T_95, reverse=True) and len(intervals.T_95) == 30


def pair(times, device, **values):
    """B over A, where a token of B takes a `times`-th of A's, both of tight samples."""
    a, b = (
        synthetic.record(id=id, ms=ms, seed=seed, noise=0.002, device=device, **values)
        for id, ms, seed in (("a", 1.0, 1), ("b", 1.0 / times, 2))
    )
    return ratio(speed_of(b), speed_of(a))


@pytest.mark.parametrize(("device", "drift"), [("cpu", 1.3), ("cpu", 1 / 1.3), ("cuda", 1.01), ("cuda", 0.98)])
def test_drift_between_processes_is_no_difference(device, drift):
    found = pair(drift, device)
    assert found.verdict == "no difference" and found.phrase == "no difference beyond run-to-run noise"
    assert not found.in_turns and found.run_to_run == pytest.approx(intervals.RUN_TO_RUN[device])


def test_a_gpu_that_waits_for_the_host_is_as_noisy_as_the_host():
    def waiting(share):
        return {"time_split": {"wall_us": 1000.0, "host_us": 1000.0 * share}}

    noise = [pair(1.2, "cuda", **waiting(share)) for share in (0.0, 0.2, 0.8, 1.0)]
    assert [found.run_to_run for found in noise] == pytest.approx([0.05, 0.12, 0.33, 0.4])
    assert [found.verdict for found in noise] == ["faster", "faster", "no difference", "no difference"]
    assert pair(1.2, "cpu", **waiting(1.0)).run_to_run == pytest.approx(0.4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_real_gain_is_faster_also_between_processes(device):
    found = pair(3.0, device)
    assert found.verdict == found.phrase == "faster" and not found.in_turns


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_turns_keep_the_narrow_interval(device):
    found = pair(1.05, device, group={"id": "g"})
    assert found.phrase == "faster" and found.in_turns and found.high / found.low < 1.01


def test_a_speed_by_itself_has_the_noise_of_its_run_alone():
    found = speed_of(synthetic.record(noise=0.002, device="cpu")).interval
    assert found.in_turns and found.high / found.low < 1.01


def seen(*repeats, device="cuda", **values):
    """The noise that is allowed for between two other runs of a report which has these repeats, of ms each."""
    others = [synthetic.record("quant=none", id="x", device=device), synthetic.record("quant=int8", id="y", device=device)]
    again = [
        synthetic.record(f"seed={index}", id=f"r{index}", ms=ms, noise=0.001, device=device, **values)
        for index, ms in enumerate(repeats)
    ]
    x, y, *_ = runs_of(others + again)
    return ratio(x.speed, y.speed).run_to_run


def test_a_report_s_own_repeats_tell_the_run_to_run_noise_where_it_is_more():
    assert seen() == seen(1.0) == seen(1.0, 1.01, 0.99) == pytest.approx(0.05)
    ms = (1.0, 1.2, 0.9, 1.05)
    assert seen(*ms) == pytest.approx(np.expm1(1.96 * 2**0.5 * np.std(np.log(ms), ddof=1)), rel=0.02)
    assert seen(1.0, 1.1, device="cpu") == pytest.approx(0.4)
    assert seen(1.0, 1.2, group={"id": "g"}) == pytest.approx(0.05)  # took turns


def test_what_is_no_repeat_tells_nothing():
    records = [synthetic.record(id=f"{i}", ms=1 + i) | {"code_fingerprint": f"{i}"} for i in range(3)]
    assert [run.speed.run_to_run for run in runs_of(records)] == [0.05] * 3
    records = synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5, ("batch=2",): 1.0})
    assert [run.speed.run_to_run for run in runs_of(records)] == [0.05] * 3


def test_more_pairs_average_the_noise_of_runs_but_not_a_step_between_the_levels():
    def mean(order):
        """Four pairs of a and b, their runs in this order."""
        speeds = [Speed(1.0, np.zeros(9), 4, started=f"{index}", run_to_run=0.2) for index in range(len(order))]
        return interval([(speed, (1 if level == "b" else -1) / 4) for speed, level in zip(speeds, order, strict=True)])

    assert mean("aaaabbbb").run_to_run == pytest.approx(0.2)
    assert mean("abababab").run_to_run == pytest.approx(1.2**0.5 - 1)
    assert 1.2**0.5 - 1 <= mean("aabbaabb").run_to_run < 0.2


def test_what_a_session_of_turns_has_in_common_cancels():
    a, b, c, d = (Speed(1.0, np.zeros(9), 4, timed_with=name, run_to_run=0.2) for name in "ggh" + "h")
    assert interval([(b, 0.5), (a, -0.5), (d, 0.5), (c, -0.5)]).in_turns
    assert interval([(b, 1), (a, -1), (d, -1), (c, 1)]).in_turns  # an interaction over two groups
    assert interval([(c, 0.5), (a, -0.5), (d, 0.5), (b, -0.5)]).run_to_run == pytest.approx(0.2)


def test_unlike_load_allows_no_verdict():
    quiet, busy = (synthetic.record(id=f"{n}", device="cpu", telemetry=synthetic.load(n)) for n in (1, 12))
    found = ratio(speed_of(quiet), replace(speed_of(busy), tok_s=300.0, median_tok_s=300.0))
    assert found.unlike_load and found.verdict == "unlike load"
    assert found.phrase == "faster, but under unlike load" and found.low > 1
    alike = synthetic.record(id="c", device="cpu", telemetry=synthetic.load(3))
    unknown = synthetic.record(id="d", device="cpu")
    assert not ratio(speed_of(quiet), speed_of(alike)).unlike_load
    assert not ratio(speed_of(busy), speed_of(unknown)).unlike_load
