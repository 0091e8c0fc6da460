"""Intervals on medians and on ratios of medians, from raw per-token samples.

A token's latency is like its neighbours' and like the rest of its round, so single samples are not independent. The
bootstrap therefore draws rounds first and samples within each drawn round second (Davison and Hinkley 1997, 3.8), K - 1
of K rounds, which makes its variance unbiased where K is small (Rao and Wu 1988). The interval is Student's t with
K - 1 degrees on the logarithm, because few rounds know their own spread badly.

Two runs timed in turns in one process (`group` in their records) draw the same rounds, so that what moved both at once
cancels in their ratio. Everything is seeded: the same records give the same numbers.

Legend: R replicates, K rounds, N samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REPLICATES = 1000
CONFIDENCE = 0.95
MIN_SAMPLES = 8  # fewer give no interval
BLOCKS = 10  # of consecutive samples, where a record does not say what its rounds were
# A speed must be what one of the two statistics of its samples says, or the samples cannot tell its spread.
SAME_SPEED = 0.01
# What of a record's `group` is the same for all of its runs and for no others.
GROUP_KEYS = ("id", "name", "members", "runs", "order")

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; beyond that the normal one.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_95 = 1.960


@dataclass(frozen=True)
class Interval:
    """A ratio or a speed with its 95 % interval; `low` and `high` are None where no samples tell the spread."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Of a ratio of speeds: faster | slower | no difference (the interval spans 1) | no interval."""
        if self.low is None or self.high is None:
            return "no interval"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


@dataclass(frozen=True)
class Speed:
    """A decode speed in tokens per second.

    `log_replicates`: float64 [R], what the logarithm of the speed came out as in each replicate, or None; `freedom`:
    degrees of freedom; `timed_with`: names the group of runs whose rounds alternated with this one's, or None."""

    tok_s: float
    log_replicates: np.ndarray | None = None
    freedom: int = 0
    timed_with: str | None = None

    @property
    def interval(self) -> Interval:
        return interval([(self, 1.0)])


def speed_of(record: dict[str, Any]) -> Speed | None:
    """None for a record that publishes no decode speed."""
    tok_s, latencies = record["decode_tok_s"], record["token_latencies_ms"]
    if tok_s is None:
        return None
    group = group_name(record)
    samples = np.asarray((latencies or {}).get("samples", []), dtype=np.float64)
    centre = _centre(record) if len(samples) >= MIN_SAMPLES else None
    if centre is None or not (samples > 0).any():
        return Speed(tok_s, timed_with=group)
    lengths = round_lengths(record, len(samples))
    own = str(record["id"])
    medians = replicates(samples, lengths, centre, round_seed=group or own, sample_seed=own)
    whole = float(np.median(samples) if centre == "median" else samples.mean())
    # A spread is relative: the speed itself is over all samples, of which a record may keep a part.
    return Speed(tok_s, math.log(tok_s) + math.log(whole) - np.log(medians), max(len(lengths) - 1, 1), group)


def replicates(
    samples: np.ndarray, lengths: Sequence[int], centre: str, *, round_seed: str, sample_seed: str
) -> np.ndarray:
    """samples [N] made of consecutive rounds of `lengths` -> [R] medians or means ("median" | "mean") of the
    two-stage bootstrap. A mean is of bursts, whose tokens belong together: there whole rounds are drawn, once."""
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
    log = sum(power * math.log(speed.tok_s) for speed, power in terms)
    if any(speed.log_replicates is None for speed, _ in terms):
        return Interval(math.exp(log))
    spread = float(np.std(sum(power * speed.log_replicates for speed, power in terms), ddof=1))
    margin = student(min(speed.freedom for speed, _ in terms)) * spread
    return Interval(math.exp(log), math.exp(log - margin), math.exp(log + margin))


def ratio(fast: Speed, slow: Speed) -> Interval:
    """How many times `slow`'s speed `fast` has."""
    return interval([(fast, 1.0), (slow, -1.0)])


def paired(a: Speed, b: Speed) -> bool:
    """Whether the two were timed in turns, so that drift of the machine is in neither's favour."""
    return a.timed_with is not None and a.timed_with == b.timed_with


def student(freedom: int) -> float:
    return T_95[freedom - 1] if freedom <= len(T_95) else NORMAL_95


def round_lengths(record: dict[str, Any], n: int) -> list[int]:
    """How many of the first `n` samples each round has: as recorded, else by the config's repeats, else blocks."""
    recorded = [one["n"] for one in record.get("rounds") or []]
    if sum(recorded) >= n and all(recorded):
        ends = np.minimum(np.cumsum(recorded), n)  # a record may keep the first samples only
        return [int(length) for length in np.diff(ends, prepend=0) if length]
    repeats = record["config"].get("repeats")
    if record["token_latencies_ms"]["n"] == n and isinstance(repeats, int) and repeats > 1 and n % repeats == 0:
        return [n // repeats] * repeats
    blocks = min(BLOCKS, n // 4)
    return [n // blocks + (block < n % blocks) for block in range(blocks)]


def group_name(record: dict[str, Any]) -> str | None:
    """Names the runs that were timed in turns with this one; None if it ran by itself."""
    group = record.get("group") or {}
    name = next((group[key] for key in GROUP_KEYS if isinstance(group.get(key), (str, list)) and group[key]), None)
    return None if name is None else f"{name}"


def _centre(record: dict[str, Any]) -> str | None:
    """Which statistic of the latencies the speed is: the median, or the mean where tokens arrive in bursts."""
    latencies, batch = record["token_latencies_ms"], record["config"]["batch"]
    for key, name in (("p50", "median"), ("mean", "mean")):
        if latencies[key] > 0 and abs(1e3 * batch / latencies[key] / record["decode_tok_s"] - 1) < SAME_SPEED:
            return name
    return None


def _generator(*seed: str) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(seed).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
