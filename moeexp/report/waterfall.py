"""The way from the first run to the fastest, a setting at a time: what each step gained over the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeexp.report.intervals import Interval
from moeexp.report.records import cell_of
from moeexp.report.runs import Run, gain, settings_text


@dataclass(frozen=True)
class Step:
    run: Run
    label: str
    gain: Interval | None  # over the last step that has a speed
    total: Interval | None  # over the first


def waterfalls(runs: Sequence[Run]) -> list[list[Step]]:
    """One for each workload with at least two measured runs: a ladder's rungs in their order, else the steepest path."""
    by_workload: dict[tuple, list[Run]] = {}
    for run in runs:
        by_workload.setdefault(run.workload, []).append(run)
    found = []
    for group in by_workload.values():
        path = _rungs(group) if is_ladder(group) else steepest(group)
        if sum(run.speed is not None for run in path) > 1:
            found.append(_steps(path))
    return found


def is_ladder(runs: Sequence[Run]) -> bool:
    """Whether the runs are rungs that a design put in order."""
    designs = [run.record.get("design") or {} for run in runs]
    return all("ladder" in (one.get("name") or "") and one.get("index") is not None for one in designs)


def _rungs(ladder: Sequence[Run]) -> list[Run]:
    """In the design's order: a sweep refuses some cells before it runs any, and starts others a group at a time."""
    designs = [run.record["design"] for run in ladder]
    names = [design["name"] for design in designs]
    order = sorted(range(len(ladder)), key=lambda i: (names.index(names[i]), designs[i]["index"]))
    return [ladder[i] for i in order]


def steepest(runs: Sequence[Run]) -> list[Run]:
    """From the first measured run, change one setting at a time, each time the one that gains most, until none does.
    What has no effect gains nothing."""
    measured = [run for run in runs if run.speed is not None]
    path = measured[:1]
    while path:
        here = dict(path[-1].point)
        near = [run for run in measured if sum(here[axis] != value for axis, value in run.point) == 1]
        near = [run for run in near if not gain(run, path[-1]).idle]
        best = max(near, key=lambda run: run.timed.tok_s, default=None)
        if best is None or best.timed.tok_s <= path[-1].timed.tok_s:
            return path
        path.append(best)
    return path


def _steps(path: Sequence[Run]) -> list[Step]:
    steps: list[Step] = []
    first: Run | None = None  # of those with speeds, as `last`
    last: Run | None = None
    before: Run | None = None
    for run in path:
        label = cell_of(run.record) or _label(before, run, path)
        over_last = gain(run, last) if run.speed and last else None
        total = gain(run, first) if run.speed and first else None
        steps.append(Step(run, label, over_last, total))
        before = run
        if run.speed:
            first, last = first or run, run
    return steps


def _label(before: Run | None, run: Run, path: Sequence[Run]) -> str:
    """What changed, as one would write it; of the first, what changes later."""
    if before is None:
        changing = {axis for one in path for axis, value in one.point if run.settings[axis] != value}
        return settings_text((axis, value) for axis, value in run.point if axis in changing) or "baseline"
    old = dict(before.point)
    return "+ " + (settings_text((axis, value) for axis, value in run.point if old.get(axis) != value) or "again")
