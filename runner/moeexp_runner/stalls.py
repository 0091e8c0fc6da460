"""Stalls of a decode: delay that is never made up for, found in the latencies of its tokens.

After a hiccup of the host, the tokens of a loop arrive in a burst: the GPU had steps enqueued and went on. So a late token is
no stall as such. A stall is the part of its delay that the `ahead` tokens after it do not recover; where the host asks for
each step, `ahead` is 1. No token is left out: the delay alone is subtracted from the time.

With d[i] the delay of token i's arrival against the steady pace, e[i] = min(d[i], …, d[i + ahead]) is what of it stays. e is
flat while tokens keep pace, alone or in bursts, and steps up by a stall's length where one begins.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEAST = 8  # latencies; fewer tell no pace
NEIGHBOURS = 32  # windows on either side, or four times their length: a pace follows the context and the clocks
STRIDE = 4  # tokens that share a pace
SHARE = 0.25  # of the pace
SPREADS = 8.0  # robust standard deviations of a token's delay
PASSES = 6  # of finding the pace from what is no stall, and stalls from the pace
ENDS = 0.9  # quantile of what d lies above e by where bursts are usual


@dataclass(frozen=True)
class Delays:
    """Milliseconds: the stalls, and by how much the tokens behind the first came early because it came late."""

    stalls: list[float]
    early: float

    @property
    def net(self) -> float:
        return math.fsum(self.stalls) - self.early


def find(latencies_ms: Sequence[float], lengths: Sequence[int], ahead: int, batch: float = 1) -> dict[str, float] | None:
    """latencies_ms of consecutive generations, `lengths` of them each. The record's `stalls`: {count, total_ms, longest_ms,
    pace_ms, ahead, decode_tok_s}, the last without the stalls, for `batch` tokens in each. None below `LEAST` latencies,
    and where there is no steady pace.

    Where the first token of a generation, which has no latency, came late, its successors come in a burst: what they are
    early by is no speed, and counts as time in `decode_tok_s`."""
    assert sum(lengths) == len(latencies_ms), (lengths, len(latencies_ms))
    assert ahead >= 1, ahead
    if len(latencies_ms) < LEAST:
        return None
    generations = list(_pieces(latencies_ms, [length for length in lengths if length]))
    time, paces = math.fsum(latencies_ms), _paces(generations, ahead)
    if paces is None:
        return None
    for _ in range(PASSES):
        found = _delays(generations, paces, ahead)
        paces = _scaled(paces, time - found.net)
    steady = time - found.net
    return {
        "count": len(found.stalls),
        "total_ms": round(math.fsum(found.stalls), 5),
        "longest_ms": round(max(found.stalls, default=0.0), 5),
        "pace_ms": round(steady / len(latencies_ms), 5),
        "ahead": ahead,
        "decode_tok_s": 1e3 * batch * len(latencies_ms) / steady,
    }


def _pieces(values: Sequence[float], lengths: Sequence[int]) -> Iterator[Sequence[float]]:
    start = 0
    for length in lengths:
        yield values[start : start + length]
        start += length


def _paces(generations: Sequence[Sequence[float]], ahead: int) -> list[list[float]] | None:
    """Time per token around each token: medians over windows, long enough to hold a burst, that are near it in context and
    in time. Their level is that of the whole, stalls included, or above it.
    None where most windows took no time."""
    windows = [_windows(generation, min(ahead, max(1, len(generation) // 3))) for generation in generations]
    near = max(NEIGHBOURS, 4 * ahead)
    paces = []
    for number, (generation, own) in enumerate(zip(generations, windows, strict=True)):
        reach = min(near, len(own) // 4) if len(own) <= 2 * near else near
        others = -(-max(2 * near + 1 - len(own), 0) // (2 * (2 * reach + 1)))
        beside = windows[max(number - others, 0) : number + others + 1]
        known: dict[int, float] = {}

        def pace(window: int, beside=beside, own=own, reach=reach, known=known) -> float:
            centre = window // STRIDE * STRIDE + STRIDE // 2
            if centre not in known:
                found: list[float] = []
                for other in beside:
                    start = min(max(centre - reach, 0), max(len(other) - 2 * reach - 1, 0))
                    found += other[start : start + 2 * reach + 1]
                known[centre] = statistics.median(found)
            return known[centre]

        shift = (len(generation) - len(own)) // 2
        paces.append([pace(min(max(token - shift, 0), len(own) - 1)) for token in range(len(generation))])
    time = math.fsum(map(math.fsum, generations))
    level = math.fsum(map(math.fsum, paces))
    if level == 0:
        return None
    # From below, each burst would look like a stall.
    return paces if level > time else _scaled(paces, time)


def _windows(latencies: Sequence[float], width: int) -> list[float]:
    """Sums of `width` consecutive ones."""
    total = list(itertools.accumulate(latencies, initial=0.0))
    return [(after - before) / width for before, after in zip(total, total[width:], strict=False)]


def _scaled(paces: list[list[float]], time: float) -> list[list[float]]:
    scale = time / math.fsum(map(math.fsum, paces))
    return [[pace * scale for pace in generation] for generation in paces]


def _delays(generations: Sequence[Sequence[float]], paces: Sequence[Sequence[float]], ahead: int) -> Delays:
    delays = [_cumulated(generation, pace) for generation, pace in zip(generations, paces, strict=True)]
    lasting = _lasting(delays, ahead)
    # Of the whole where a few tokens in a row took no time.
    floor = max(SPREADS * _spread(lasting, ahead), SHARE / 4 * statistics.fmean(itertools.chain.from_iterable(paces)))
    lost: list[float] = []
    early = 0.0
    for delay, stays, pace in zip(delays, lasting, paces, strict=True):
        stalls: list[tuple[float, float]] = []
        least = [max(SHARE * value, floor) for value in pace]
        begin, last = 0, -ahead
        for token in range(len(pace)):
            if stays[token + 1] - stays[token] <= least[token]:
                continue
            if token - last < ahead:  # the same stall: within a burst it shows in two steps
                stalls.pop()
            else:
                begin = token
            last = token
            # A second hiccup may hide for a while that the first is recovered.
            stalls.append((min(stays[token + 1 : token + 2 + ahead]) - stays[begin], least[begin]))
        lost += [stall for stall, threshold in stalls if stall > threshold / 2]
        head = -min(delay[: ahead + 1])
        early += head if head > least[0] else 0.0
    return Delays(lost, early)


def _cumulated(latencies: Sequence[float], pace: Sequence[float]) -> list[float]:
    """d, one longer than the latencies: the first arrival is on time."""
    found = [0.0]
    for latency, steady in zip(latencies, pace, strict=True):
        found.append(found[-1] + latency - steady)
    return found


def _lasting(delays: Sequence[Sequence[float]], ahead: int) -> list[list[float]]:
    """e. Where a generation ends before `ahead` tokens could recover a delay, the last ones count with what is unusual of
    theirs: a burst that was cut is no stall."""
    full = [[min(delay[i : i + ahead + 1]) for i in range(len(delay))] for delay in delays]
    usual: dict[int, float] = {}  # by tokens that are left
    for left in range(1, ahead + 1):
        above = sorted(
            min(delay[i : i + left]) - stays[i]
            for delay, stays in zip(delays, full, strict=True)
            for i in range(1, len(delay) - ahead)
        )
        usual[left] = above[int(ENDS * (len(above) - 1))] if above else 0.0
    for stays in full:
        for i in range(max(len(stays) - ahead, 1), len(stays)):
            if stays[i] > stays[i - 1]:
                stays[i] = max(stays[i - 1], stays[i] - usual[len(stays) - i])
    return full


def _spread(lasting: Sequence[Sequence[float]], ahead: int) -> float:
    """Robust standard deviation of one token's delay, from how far e wanders over `ahead` tokens."""
    steps = [stays[i + ahead] - stays[i] for stays in lasting for i in range(len(stays) - 2 * ahead)]
    if not steps:
        return 0.0
    middle = statistics.median(steps)
    return 1.4826 * statistics.median(abs(step - middle) for step in steps) / math.sqrt(ahead)
