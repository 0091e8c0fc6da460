"""Intervals on speeds and on ratios of speeds, from raw per-token samples.

A speed is tokens over the time of decoding: batch over the mean latency, in every mode. A token's latency is like its
neighbours' and like the rest of its round (and the tokens of a loop arrive in bursts that belong together), so single
samples are not independent. The bootstrap therefore draws whole rounds, K - 1 of K, which makes its variance unbiased
where K is small (Rao and Wu 1988). The interval is Student's t with K - 1 degrees on the logarithm, because few rounds
know their own spread badly.

A mean counts every late token, which a median does not see: beside each ratio stand the ratio by medians, with an interval
of its own (rounds first, samples within each drawn round second: Davison and Hinkley 1997, 3.8), and the ratio of what is
left when the stalls that a record knows of are subtracted. Where these say otherwise than the ratio, it is late tokens that
make the difference, and `phrase` says so.

Two runs timed in turns in one process (`group` in their records) draw the same rounds, so that what moved both at once
cancels in their ratio. Between runs that took no turns the machine may have changed, of which the samples of neither say
anything: there the interval is widened by run-to-run noise (RUN_TO_RUN, or what the report's own repeats show, if that
is more). Everything is seeded: the same records give the same numbers.

Legend: R replicates, K rounds, N samples.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from moeexp.report.conditions import UNLIKE_LOAD, cpu_left, group_name, other_load

REPLICATES = 1000
MIN_SAMPLES = 8  # fewer give no interval
BLOCKS = 10  # of consecutive samples, where a record does not say what its rounds were
# A speed must be what the mean of its samples says, or the samples cannot tell its spread.
SAME_SPEED = 0.01
# By how much the speeds of two identical runs, each in a process of its own, differ at most 19 times in 20. On a GPU whose
# clocks hold, processes differ by 1 to 2 % (standard deviation: allocation, placement, temperature), two of them by 2.8
# times that. On a CPU, what other processes may take from one run and not from the other before it is flagged, UNLIKE_LOAD,
# is a ratio of 1.33; with 5 % as on a GPU that is 1.4. Pairs of repeats on a shared machine of two cores differed by 1.06
# to 1.26, and by 2 to 5 where its load had changed. A step on a GPU is noisy by as much of it as waits for the host:
# repeats of `tiny` (half to three quarters host) on three hosts of H100s differed by 1.02 to 1.42.
RUN_TO_RUN = {"cuda": 0.05, "cpu": 0.4}
NOTHING = 1e-9  # powers that cancel
FURTHEST = 500.0  # of a logarithm

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond that the normal one.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_95 = 1.960


@dataclass(frozen=True)
class Interval:
    """A ratio or a speed with its 95 % interval; `low` and `high` are None where no samples tell the spread.

    `run_to_run`: the run-to-run noise that it allows for, as a part of a ratio; 0 where all was timed in turns.
    `unlike_load`: other processes kept the CPU busier during some of the runs than during the others. `idle`: the runs
    differ only in settings without an effect on their device. `weights`: how their quantisation differs where the
    engine does too, or an empty text. `medians`, `corrected`: the same by median latencies, and without the stalls; None
    where not all runs know them."""

    value: float
    low: float | None = None
    high: float | None = None
    run_to_run: float = 0.0
    unlike_load: bool = False
    idle: bool = False
    weights: str = ""
    medians: Interval | None = None
    corrected: Interval | None = None

    @property
    def in_turns(self) -> bool:
        return self.run_to_run == 0

    @property
    def verdict(self) -> str:
        """Of a ratio of speeds: faster | slower | no difference (the interval spans 1) | no interval | unlike load | not
        applicable here."""
        if self.idle:
            return "not applicable here"
        if self.seen is None:
            return "no interval"
        return "unlike load" if self.unlike_load else self.seen

    @property
    def phrase(self) -> str:
        """The verdict as a reader sees it, with what limits it."""
        if self.idle or self.seen is None:
            return self.verdict
        beyond = " beyond run-to-run noise" if self.seen == "no difference" and not self.in_turns else ""
        limits = ", on other weights" * bool(self.weights) + ", but under unlike load" * self.unlike_load
        doubt = f", but {self.doubt}" if self.doubt else ""
        return self.seen + beyond + limits + doubt

    @property
    def doubt(self) -> str:
        """What the medians, or the speeds without stalls, say where that is not the verdict: late tokens make the
        difference. Empty where they agree."""
        return ", ".join(f"{seen} {' and '.join(names)}" for seen, names in self.dissent.items())

    @property
    def dissent(self) -> dict[str, list[str]]:
        """{verdict: [by medians, without stalls]} of those that do not share this one's."""
        said: dict[str, list[str]] = defaultdict(list)
        if self.idle or self.seen is None:
            return said
        for name, other in (("by medians", self.medians), ("without stalls", self.corrected)):
            seen = None if other is None else other.seen
            if seen is not None and seen != self.seen:
                said[seen].append(name)
        return said

    @property
    def seen(self) -> str | None:
        """faster | slower | no difference by the interval alone; None without one."""
        if self.low is None or self.high is None:
            return None
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


@dataclass(frozen=True)
class Speed:
    """A decode speed in tokens per second.

    `log_replicates`: float64 [R], what the logarithm of the speed came out as in each replicate, or None; `median_tok_s`
    and `log_medians`: the same by the median latency; `corrected_tok_s`: without stalls, None if they are not known;
    `freedom`: degrees of freedom; `timed_with`: names the group of runs whose rounds alternated with this one's, or None;
    `started`: orders runs in time; `load`: of other processes, per core, None if unknown; `run_to_run`: as RUN_TO_RUN."""

    tok_s: float
    log_replicates: np.ndarray | None = None
    median_tok_s: float | None = None
    log_medians: np.ndarray | None = None
    corrected_tok_s: float | None = None
    freedom: int = 0
    timed_with: str | None = None
    started: str = ""
    load: float | None = None
    run_to_run: float = RUN_TO_RUN["cpu"]

    @property
    def interval(self) -> Interval:
        """Of the speed that was measured, from the noise within the run."""
        return replace(interval([(replace(self, run_to_run=0.0), 1.0)]), unlike_load=False)

    @property
    def session(self) -> Hashable:
        """The same for runs that were timed in turns, and for no others."""
        return self.timed_with or id(self)


def speed_of(record: dict[str, Any]) -> Speed | None:
    """None for a record that publishes no decode speed."""
    tok_s, latencies = record["decode_tok_s"], record["token_latencies_ms"]
    if tok_s is None:
        return None
    group, latencies, tokens = group_name(record), latencies or {}, tokens_per_step(record)
    samples = np.asarray(latencies.get("samples", []), dtype=np.float64)
    speed = Speed(
        tok_s,
        median_tok_s=1e3 * tokens / latencies["p50"] if latencies.get("p50") else None,
        corrected_tok_s=(record.get("stalls") or {}).get("decode_tok_s"),
        timed_with=group,
        started=record["started"],
        load=other_load(record),
        run_to_run=run_to_run(record),
    )
    if len(samples) < MIN_SAMPLES or not (samples > 0).any() or not latencies["mean"] > 0:
        return speed
    if abs(1e3 * tokens / latencies["mean"] / tok_s - 1) >= SAME_SPEED:
        return speed
    lengths = round_lengths(record, len(samples))
    own = str(record["id"])
    # A spread is relative: the speed itself is over all samples, of which a record may keep a part.
    means, medians = (
        replicates(samples, lengths, centre, round_seed=group or own, sample_seed=own) for centre in ("mean", "median")
    )
    logs = math.log(tok_s) + math.log(samples.mean()) - np.log(means)
    speed = replace(speed, log_replicates=logs, freedom=max(len(lengths) - 1, 1))
    if speed.median_tok_s is None or not (medians > 0).all():
        return speed
    return replace(speed, log_medians=math.log(speed.median_tok_s) + math.log(float(np.median(samples))) - np.log(medians))


def tokens_per_step(record: dict[str, Any]) -> float:
    """The batch; fewer where sequences ended before others and ran along."""
    rounds = [one for one in record.get("rounds") or [] if "tokens" in one]
    steps = sum(one["n"] for one in rounds)
    return sum(one["tokens"] for one in rounds) / steps if steps else record["config"]["batch"]


def run_to_run(record: dict[str, Any]) -> float:
    """RUN_TO_RUN of the record's device; on a GPU the CPU's for the share of a step that waited for the host."""
    cpu = RUN_TO_RUN["cpu"]
    device, split = RUN_TO_RUN.get(record["config"]["device"], cpu), record.get("time_split")
    return device + (cpu - device) * split["host_us"] / split["wall_us"] if split else device


def replicates(samples: np.ndarray, lengths: Sequence[int], centre: str, *, round_seed: str, sample_seed: str) -> np.ndarray:
    """samples [N] made of consecutive rounds of `lengths` -> [R] medians of the two-stage bootstrap, or means of drawn
    whole rounds (`centre`: "median" | "mean")."""
    assert sum(lengths) == len(samples) and min(lengths) > 0, (lengths, len(samples))
    rounds = len(lengths)
    starts, sizes = np.cumsum([0, *lengths[:-1]]), np.asarray(lengths)
    drawn = max(rounds - 1, 1)
    per_round = math.ceil(len(samples) / rounds)
    chosen = _generator("rounds", round_seed).integers(0, rounds, (REPLICATES, drawn))
    if centre == "mean":
        return (np.add.reduceat(samples, starts) / sizes)[chosen].mean(axis=1)
    place = _generator("samples", sample_seed).random((REPLICATES, drawn, per_round))
    index = starts[chosen][..., None] + (place * sizes[chosen][..., None]).astype(np.int64)
    return np.median(samples[index].reshape(REPLICATES, -1), axis=1)


def interval(terms: Sequence[tuple[Speed, float]]) -> Interval:
    """The product of speeds, each to its power, with its interval: [(b, 1.0), (a, -1.0)] is the ratio b / a."""
    noise, load = _run_to_run(terms), _load(terms)
    # What is left without stalls spreads as medians do.
    medians = _product_of([(speed, speed.median_tok_s, power) for speed, power in terms], noise)
    corrected = _product_of([(speed, speed.corrected_tok_s, power) for speed, power in terms], noise)
    found = _product(terms, noise)
    return replace(found, unlike_load=abs(load) > math.log(UNLIKE_LOAD), medians=medians, corrected=corrected)


def _product_of(terms: Sequence[tuple[Speed, float | None, float]], noise: float) -> Interval | None:
    """By another speed of each run, spread as its medians; None where one has no such speed."""
    known = [(replace(run, tok_s=tok_s, log_replicates=run.log_medians), p) for run, tok_s, p in terms if tok_s is not None]
    return _product(known, noise) if len(known) == len(terms) else None


def _product(terms: Sequence[tuple[Speed, float]], noise: float) -> Interval:
    """By the `tok_s` and `log_replicates` of each."""
    log = sum(power * math.log(speed.tok_s) for speed, power in terms)
    found = Interval(_exp(log), run_to_run=math.expm1(min(noise, FURTHEST)))
    drawn = [power * speed.log_replicates for speed, power in terms if speed.log_replicates is not None]
    if len(drawn) < len(terms):
        return found
    spread = float(np.std(sum(drawn), ddof=1))
    margin = math.hypot(student(min(speed.freedom for speed, _ in terms)) * spread, noise)
    return replace(found, low=_exp(log - margin), high=_exp(log + margin))


def _exp(log: float) -> float:
    """Within what a float holds: damaged records may say anything."""
    return math.exp(min(max(log, -FURTHEST), FURTHEST))


def _run_to_run(terms: Sequence[tuple[Speed, float]]) -> float:
    """How far run-to-run noise may move the logarithm of the product, 19 times in 20.

    What moved a whole session of turns moved all of its runs, so that a session counts with what is left of its powers.
    The noise is taken for the worse of two kinds: each session's own, which several pairs average out, and a step
    somewhere in the order of time, which they do not where one level's runs all came before the other's."""
    powers: dict[Hashable, float] = defaultdict(float)
    starts: dict[Hashable, str] = {}
    for speed, power in terms:
        powers[speed.session] += power
        starts[speed.session] = min(starts.get(speed.session, speed.started), speed.started)
    apart = [powers[session] for session in sorted(powers, key=starts.__getitem__)]
    if all(abs(power) < NOTHING for power in apart):
        return 0.0
    # RUN_TO_RUN is of a ratio, which has two sessions.
    own = math.sqrt(sum(power * power for power in apart) / 2)
    step = max(map(abs, accumulate(apart[:-1])), default=0.0)
    return math.log1p(max(speed.run_to_run for speed, _ in terms)) * max(own, step)


def _load(terms: Sequence[tuple[Speed, float]]) -> float:
    """The logarithm of what other processes' load may have put into the product; 0 where unknown."""
    known = [power * math.log(cpu_left(speed.load)) for speed, power in terms if speed.load is not None]
    return sum(known) if len(known) == len(terms) else 0.0


def ratio(fast: Speed, slow: Speed) -> Interval:
    """How many times `slow`'s speed `fast` has."""
    return interval([(fast, 1.0), (slow, -1.0)])


def with_repeats(speeds: Sequence[Speed | None], same: Sequence[Hashable], machines: Sequence[str]) -> list[Speed | None]:
    """The speeds with the run-to-run noise of their machine, where its repeats among them show more than RUN_TO_RUN.

    `same`: equal for runs of one config, which differ by that noise alone."""
    repeats: dict[tuple[str, Hashable], dict[Hashable, list[float]]] = defaultdict(lambda: defaultdict(list))
    for speed, key, machine in zip(speeds, same, machines, strict=True):
        if speed is not None:
            repeats[machine, key][speed.session].append(math.log(speed.tok_s))
    squares: dict[str, list[float]] = defaultdict(list)
    freedom: dict[str, int] = defaultdict(int)
    for (machine, _), sessions in repeats.items():
        means = [float(np.mean(logs)) for logs in sessions.values()]
        squares[machine] += [(mean - float(np.mean(means))) ** 2 for mean in means]
        freedom[machine] += len(means) - 1
    # With the normal quantile: Student's would take two repeats that differ by a little for proof of much noise, and
    # where they differ by less than they should, RUN_TO_RUN holds.
    seen = {
        machine: math.expm1(NORMAL_95 * math.sqrt(2 * sum(squares[machine]) / count))
        for machine, count in freedom.items()
        if count
    }
    return [
        speed and replace(speed, run_to_run=max(speed.run_to_run, seen.get(machine, 0.0)))
        for speed, machine in zip(speeds, machines, strict=True)
    ]


def student(freedom: int) -> float:
    return T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95


def round_lengths(record: dict[str, Any], n: int) -> list[int]:
    """How many of the first `n` samples each round has: as recorded, else by the config's repeats, else blocks; blocks also
    of a single round, which says nothing of how rounds differ."""
    recorded = [one["n"] for one in record.get("rounds") or []]
    if sum(recorded) >= n and all(recorded):
        ends = np.minimum(np.cumsum(recorded), n)  # a record may keep the first samples only
        lengths = [int(length) for length in np.diff(ends, prepend=0) if length]
        if len(lengths) > 1:
            return lengths
    repeats = record["config"].get("repeats")
    if record["token_latencies_ms"]["n"] == n and isinstance(repeats, int) and repeats > 1 and n % repeats == 0:
        return [n // repeats] * repeats
    blocks = min(BLOCKS, n // 4)
    return [n // blocks + (block < n % blocks) for block in range(blocks)]


def _generator(*seed: str) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(seed).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
