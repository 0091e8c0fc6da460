"""Stalls, in the latencies of a decode that is simulated: a GPU, a host that reads with some steps enqueued, hiccups."""

import json
import random
import statistics
from pathlib import Path

import pytest
from common import slow_after
from moeexp_runner import stalls

RESULTS = Path(__file__).parents[1] / "results"
AHEAD = [1, 2, 4, 8]


def loop(n=128, *, step=1.0, ahead=8, jitter=0.0, host=None, gpu=None, burst=1, drift=0.0, seed=0):
    """Latencies (ms) of the n tokens after the first, as `Loop.run` would see them. host, gpu: {token or step: hiccup in ms},
    of the reader before it notes the token, of the step. burst: the host wakes up
    for as many tokens. drift: by how much
    the last step is slower than the first, relative."""
    rng, host, gpu = random.Random(seed), host or {}, gpu or {}
    now = 0.0  # the host's clock
    ready = [1.0]  # when the token's copy is there; that of the first is the prefill's
    done, arrivals = 1.0, []
    for index in range(n + 1):
        while len(ready) < min(n + 1, index + 1 + ahead):
            now += 0.005  # a launch
            number = len(ready)
            length = step * (1 + drift * number / n) * max(0.1, rng.gauss(1.0, jitter))
            done = max(done, now) + length + gpu.get(number, 0.0)
            ready.append(max(done + 0.004, ready[-1]))
        if now < ready[index]:
            now = ready[min(-(-index // burst) * burst, len(ready) - 1)]
        now += host.get(index, 0.0)
        arrivals.append(now)
    return [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]


def corrected(*generations, ahead):
    flat = [latency for generation in generations for latency in generation]
    return stalls.find(flat, [len(generation) for generation in generations], ahead, 1)


def tok_s(latencies):
    return 1e3 * len(latencies) / sum(latencies)


PLACES = {
    "first token": [0], "start": [1], "soon": [3], "middle": [64], "near the end": [125], "end": [128],
    "two in a row": [60, 61], "two apart": [30, 90], "in its own burst": [64, 66],
}  # fmt: skip
CASES = [(place, who) for place in PLACES for who in ("host", "gpu") if (place, who) != ("first token", "gpu")]


@pytest.mark.parametrize("step", [0.4, 1.0, 2.5, 12.0])
@pytest.mark.parametrize(("place", "who"), CASES)
@pytest.mark.parametrize("ahead", AHEAD)
def test_a_hiccup_of_4_ms_does_not_change_the_corrected_speed(ahead, place, who, step):
    plain = loop(step=step, ahead=ahead)
    late = loop(step=step, ahead=ahead, **{who: dict.fromkeys(PLACES[place], 4.0)})
    expected, found = corrected(plain, ahead=ahead), corrected(late, ahead=ahead)
    assert expected["count"] == 0 and expected["total_ms"] == 0 and expected["longest_ms"] == 0
    assert abs(found["decode_tok_s"] / expected["decode_tok_s"] - 1) < 0.005, found
    lost = sum(late) - sum(plain)
    if lost > step:  # of a step of 12 ms, 4 are more than a quarter
        assert found["total_ms"] == pytest.approx(lost, abs=0.3 * step)
        assert 1 <= found["count"] <= len(PLACES[place])
    assert found["ahead"] == ahead


@pytest.mark.parametrize("ahead", slow_after(1, AHEAD))
def test_hiccups_under_jitter_anywhere_of_any_length(ahead):
    """A property over random cases; the message has what makes one again."""
    for seed in range(60):
        rng = random.Random(f"{ahead} {seed}")
        step, jitter, n = rng.uniform(0.5, 6.0), rng.uniform(0.0, 0.04), rng.choice([63, 127, 255])
        who, place, ms = rng.choice(["host", "gpu"]), rng.randint(1, n), rng.choice([4.0, 4.0, 25.0])
        settings = {"n": n, "step": step, "ahead": ahead, "jitter": jitter}
        plain = [loop(**settings, seed=f"{seed} {i}") for i in range(4)]
        late = [*plain[:2], loop(**settings, seed=f"{seed} 2", **{who: {place: ms}}), plain[3]]
        expected, found = corrected(*plain, ahead=ahead), corrected(*late, ahead=ahead)
        case = (seed, who, place, ms, settings, expected, found)
        assert expected["count"] == 0, case
        assert abs(found["decode_tok_s"] / expected["decode_tok_s"] - 1) < 0.005, case


def test_what_is_recovered_is_no_stall():
    """Eight steps of 1 ms are enqueued: the host may be away for 4 ms, and the time of all tokens is the same."""
    plain, late = loop(), loop(host={64: 4.0})
    assert max(late) > 4.5 and sum(late) == pytest.approx(sum(plain), rel=1e-3)
    assert corrected(late, ahead=8)["count"] == 0
    assert corrected(loop(host={64: 12.0}), ahead=8)["count"] == 1, "this one is not"


def test_a_stall_is_as_long_as_what_was_lost():
    late = loop(host={64: 12.0})
    found = corrected(late, ahead=8)
    assert found["total_ms"] == pytest.approx(sum(late) - sum(loop()), abs=0.05) and found["longest_ms"] == found["total_ms"]
    assert found["pace_ms"] == pytest.approx(1.0, rel=0.01)
    assert found["decode_tok_s"] == pytest.approx(1e3 * 128 / (sum(late) - found["total_ms"]))
    assert found["decode_tok_s"] > 1.02 * tok_s(late)


def test_without_a_loop_nothing_is_recovered():
    latencies = [2.0] * 40 + [6.0] + [2.0] * 20 + [9.0] + [2.0] * 40
    found = stalls.find(latencies, [len(latencies)], 1, 3)
    assert (found["count"], found["total_ms"], found["longest_ms"]) == (2, 11.0, 7.0)
    assert found["decode_tok_s"] == pytest.approx(3 * 500.0)


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("jitter", slow_after(1, [0.03, 0.01, 0.06]))
def test_jitter_is_no_stall(ahead, jitter):
    for seed in range(25):
        generations = [loop(ahead=ahead, jitter=jitter, seed=f"{seed} {i}") for i in range(8)]
        assert corrected(*generations, ahead=ahead)["count"] == 0, seed


@pytest.mark.parametrize(("burst", "ahead"), [(8, 8), (4, 8), (3, 8), (5, 8), (2, 2), (3, 4), (4, 6)])
@pytest.mark.parametrize("n", [31, 120, 127])
@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_steady_bursts_are_no_stalls(burst, ahead, n, jitter):
    rng = random.Random(0)
    for phase in range(burst):
        pattern = [
            [(burst if (i + phase) % burst == burst - 1 else 0.0) + 0.05 + abs(rng.gauss(0, jitter)) for i in range(n)]
            for _ in range(4)
        ]
        assert corrected(*pattern, ahead=ahead)["count"] == 0, phase


@pytest.mark.parametrize("burst", [2, 3, 5, 8])
def test_a_hiccup_within_bursts(burst):
    for place in range(40, 60):
        plain, late = loop(burst=burst), loop(burst=burst, gpu={place: 4.0})
        assert min(plain) < 0.02
        expected, found = corrected(plain, plain, ahead=8), corrected(plain, late, ahead=8)
        assert expected["count"] == 0 and found["count"] == 1, (place, found)
        assert abs(found["decode_tok_s"] / expected["decode_tok_s"] - 1) < 0.005, (place, expected, found)


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("drift", [0.1, 0.5, 1.0])
def test_a_pace_that_drifts_is_no_stall(ahead, drift):
    generations = [loop(512, ahead=ahead, drift=drift, jitter=0.02, seed=i) for i in range(3)]
    assert corrected(*generations, ahead=ahead)["count"] == 0
    late = loop(512, ahead=ahead, drift=drift, jitter=0.02, seed=1, gpu={300: 9.0})
    found = corrected(generations[0], late, generations[2], ahead=ahead)
    assert found["count"] == 1 and found["total_ms"] == pytest.approx(9.0, rel=0.1)


def test_clocks_that_fall_are_no_stall():
    generations = [loop(63, step=step, ahead=1, jitter=0.01, seed=i) for i, step in enumerate([1.0] * 6 + [1.6] * 6)]
    assert corrected(*generations, ahead=1)["count"] == 0


def test_no_token_is_left_out():
    """The time that is left and the stalls make up the whole, and generations do not run into each other."""
    for seed in range(20):
        generations = [loop(40, ahead=2, jitter=0.03, seed=f"{seed} {i}", gpu={7 * i + 1: 3.0}) for i in range(5)]
        found = corrected(*generations, ahead=2)
        whole, n = sum(map(sum, generations)), 200
        assert 1e3 * n / found["decode_tok_s"] + found["total_ms"] == pytest.approx(whole, rel=1e-6), seed
        assert found["count"] == 5, seed


@pytest.mark.parametrize("count", range(16))
def test_a_few_tokens_are_handled(count):
    for ahead in (1, 8):
        found = stalls.find([1.0] * count, [count], ahead, 1)
        assert found is None if count < stalls.LEAST else found["count"] == 0 and found["decode_tok_s"] == 1000.0
        if count:
            assert stalls.find([1.0] * count, [0, *[1] * count, 0], ahead, 1) == found
    assert stalls.find([0.0] * count, [count], 1, 1) is None


def test_published_ladder_s_gain_of_a_stall():
    """Two rungs of which one was measured with a hiccup: by tokens over time they differ more than without stalls."""
    before, after = (
        json.loads((RESULTS / f"ladder_qwen3_5_35b_a3b_int4_h100/{rung}/record.json").read_text()) for rung in (11, 12)
    )
    speeds, medians = [], []
    for record in (before, after):
        samples, length = record["token_latencies_ms"]["samples"], record["config"]["new_tokens"] - 1
        found = stalls.find(samples, [length] * (len(samples) // length), record["config"]["loop_ahead"], 1)
        assert found["count"] >= 1
        speeds.append((tok_s(samples), found["decode_tok_s"]))
        medians.append(1e3 / statistics.median(samples))
    plain, without = (b / a for a, b in zip(*speeds, strict=True))
    assert plain == pytest.approx(1.064, abs=0.001)
    assert abs(without - medians[1] / medians[0]) < 0.015 < plain - without


@pytest.mark.parametrize("place", range(8))
def test_a_hiccup_in_the_middle_of_a_burst_is_one_stall(place):
    """The tokens before it in the burst came early, so that its delay shows in two steps."""
    late = [8.0, *[0.0] * 7] * 16
    late[64 + place] += 4.0
    found = stalls.find(late, [128], 8, 1)
    assert found["count"] == 1 and found["total_ms"] == pytest.approx(4.0, abs=0.1), found


def test_whatever_the_latencies_the_parts_make_up_the_time():
    """Random latencies of any kind, zeros among them; the message has what makes a case again."""
    for seed in range(400):
        rng = random.Random(seed)
        lengths = [rng.choice([0, 1, 2, 7, 31, 64]) for _ in range(rng.randint(1, 6))]
        ahead, zeros, tail = rng.choice([1, 2, 8, 64]), rng.choice([0.0, 0.5, 0.95]), rng.choice([0.0, 0.1, 0.5])
        values = [
            0.0 if rng.random() < zeros else rng.expovariate(1.0) * (100.0 if rng.random() < tail else 1.0)
            for _ in range(sum(lengths))
        ]
        found = stalls.find(values, lengths, ahead, 2)
        case = (seed, lengths, ahead, zeros, tail, found)
        if found is None:
            assert len(values) < stalls.LEAST or values.count(0.0) > len(values) / 2, case
            continue
        assert found["decode_tok_s"] > 0 and found["pace_ms"] > 0, case
        assert 0 <= found["longest_ms"] <= found["total_ms"] <= sum(values) + 1e-4, case
        assert 0 <= found["count"] <= len(values) and (found["count"] == 0) == (found["total_ms"] == 0), case
