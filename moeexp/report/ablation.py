"""What each setting buys on the bare baseline and what it still buys in the full stack: one factor at a time against
leave one out. Where the two differ, the settings share a gain or help each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeexp.report.intervals import Interval, Speed, interval
from moeexp.report.runs import Run, gain


@dataclass(frozen=True)
class Factor:
    """`alone`: added to the baseline; `last`: added to all the others; `ratio`: last over alone."""

    axis: str
    base: str
    level: str
    alone: Interval | None
    last: Interval | None
    ratio: Interval | None


@dataclass(frozen=True)
class Ablation:
    baseline: Run
    full: Run
    parts: list[Factor]
    together: Interval  # the full stack over the baseline
    product: Interval | None  # of what each buys alone; None if one did not run alone, or has no effect there
    ratio: Interval | None  # together over that product


def stacks(runs: Sequence[Run]) -> list[Ablation]:
    """One for each workload with a first run and another that differs from it in three settings or more, at least two
    of which also ran by themselves."""
    found = []
    for workload in dict.fromkeys(run.workload for run in runs):
        measured = [run for run in runs if run.workload == workload and run.speed is not None]
        stack = _stack(measured) if measured else None
        if stack:
            found.append(stack)
    return found


def _stack(measured: Sequence[Run]) -> Ablation | None:
    by_point = {run.point: run for run in measured}
    baseline = measured[0]
    full = max(measured, key=lambda run: (len(_changes(baseline, run)), run.timed.tok_s))
    changes = _changes(baseline, full)
    if len(changes) < 3:
        return None
    parts = [_part(by_point, baseline, full, change) for change in changes]
    if sum(part.alone is not None for part in parts) < 2:
        return None
    together = gain(full, baseline)
    if any(part.alone is None or part.alone.idle for part in parts):
        return Ablation(baseline, full, parts, together, None, None)
    alone = [by_point[_with(baseline, axis, new)].timed for axis, _, new in changes]
    product = [term for speed in alone for term in _over(speed, baseline.timed)]
    against = _over(full.timed, baseline.timed) + [(speed, -power) for speed, power in product]
    return Ablation(baseline, full, parts, together, interval(product), interval(against))


def _part(by_point: dict, baseline: Run, full: Run, change: tuple[str, str, str]) -> Factor:
    axis, old, new = change
    one, rest = by_point.get(_with(baseline, axis, new)), by_point.get(_with(full, axis, old))
    alone = gain(one, baseline) if one else None
    last = gain(full, rest) if rest else None
    both = interval(_over(full.timed, rest.timed) + _over(baseline.timed, one.timed)) if one and rest else None
    return Factor(axis, old, new, alone, last, both)


def _over(a: Speed, b: Speed) -> list[tuple[Speed, float]]:
    return [(a, 1.0), (b, -1.0)]


def _changes(a: Run, b: Run) -> list[tuple[str, str, str]]:
    return [(axis, x, y) for (axis, x), (_, y) in zip(a.point, b.point, strict=True) if x != y]


def _with(run: Run, axis: str, value: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, value if name == axis else old) for name, old in run.point)
