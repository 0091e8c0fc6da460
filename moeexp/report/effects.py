"""What each setting buys, alone and together, over runs that differ in it and in nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from moeexp.report.intervals import Interval, Speed, interval
from moeexp.report.runs import Run, acts, is_workload

# settings without the axes in question -> level, or pair of levels -> the runs there
Cells = dict[tuple, dict[tuple[str, ...], list[Run]]]


@dataclass(frozen=True)
class Effect:
    """`axis` at `level` against `base`: the geometric mean of the speed ratios of `pairs` matched pairs, those in which
    the setting has an effect; if there are none, of the others, and `ratio.idle`."""

    axis: str
    base: str
    level: str
    ratio: Interval
    pairs: int
    least: float  # the smallest and the largest of the pairs' ratios
    most: float


@dataclass(frozen=True)
class Interaction:
    """Two settings together against the product of what each buys alone: above 1 they help each other."""

    first: tuple[str, str, str]  # axis, base, level
    second: tuple[str, str, str]
    alone: tuple[float, float]  # what each buys where the other is at its base
    together: float
    ratio: Interval
    squares: int

    @property
    def verdict(self) -> str:
        """independent | combine | overlap | cancel | no interval."""
        return self._named(self.ratio.verdict)

    @property
    def phrase(self) -> str:
        """The verdict, and what the medians or the speeds without stalls say where that is another."""
        dissent = self.ratio.dissent.items()
        return self.verdict + "".join(f", but {self._named(seen)} {' and '.join(names)}" for seen, names in dissent)

    def _named(self, verdict: str) -> str:
        if verdict == "no difference":
            return "independent"
        if verdict == "faster":
            return "combine"
        if verdict == "slower":
            return "cancel" if self.together <= max(self.alone) else "overlap"
        return verdict


MEANING = {
    "independent": "the gains multiply: no interaction beyond noise",
    "combine": "together more than the product of the gains",
    "overlap": "together less than the product, still more than either alone",
    "cancel": "together no better than the better one alone",
}


def axes_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """{axis: levels}, of the settings that may make a run faster; the first level, the base, is that of the first run in
    which the setting has an effect."""
    measured = [run for run in runs if run.speed is not None]
    axes = dict.fromkeys(axis for run in measured for axis in run.settings if not is_workload(axis))
    levels = {
        axis: list(dict.fromkeys(run.settings[axis] for run in sorted(measured, key=lambda run: not acts(axis, run))))
        for axis in axes
    }
    return {axis: values for axis, values in levels.items() if len(values) > 1}


def main_effects(runs: Sequence[Run]) -> list[Effect]:
    effects = []
    for axis, (base, *others) in axes_of(runs).items():
        cells = _cells(runs, (axis,))
        for level in others:
            pairs = [(at[(level,)], at[(base,)]) for at in cells.values() if (level,) in at and (base,) in at]
            acting = [(new, old) for new, old in pairs if acts(axis, *new, *old)]
            pairs = acting or pairs
            if pairs:
                ratios = [interval(_terms(new, 1) + _terms(old, -1)).value for new, old in pairs]
                terms = [term for new, old in pairs for term in _terms(new, 1) + _terms(old, -1)]
                mean = replace(_mean(terms, len(pairs)), idle=not acting)
                effects.append(Effect(axis, base, level, mean, len(pairs), min(ratios), max(ratios)))
    return effects


def interactions(runs: Sequence[Run]) -> list[Interaction]:
    """Of every two settings for which all four combinations ran beside each other, and that have an effect."""
    found = []
    levels = axes_of(runs)
    for one, two in combinations(levels, 2):
        cells = _cells(runs, (one, two))
        for a in levels[one][1:]:
            for b in levels[two][1:]:
                found += _interaction(cells, (one, levels[one][0], a), (two, levels[two][0], b))
    return found


def _interaction(cells: Cells, one: tuple[str, str, str], two: tuple[str, str, str]) -> list[Interaction]:
    corners = [(one[2], two[2]), (one[2], two[1]), (one[1], two[2]), (one[1], two[1])]
    squares = [[at[corner] for corner in corners] for at in cells.values() if all(corner in at for corner in corners)]
    squares = [square for square in squares if _act(one[0], two[0], square)]
    if not squares:
        return []
    terms = [
        term for square in squares for corner, power in zip(square, (1, -1, -1, 1), strict=True) for term in _terms(corner, power)
    ]

    def mean(corner: int) -> float:
        over = [term for square in squares for term in _terms(square[corner], 1) + _terms(square[3], -1)]
        return _mean(over, len(squares)).value

    return [Interaction(one, two, (mean(1), mean(2)), mean(0), _mean(terms, len(squares)), len(squares))]


def _act(one: str, two: str, square: list[list[Run]]) -> bool:
    """Whether each of two settings does at one level of the other at least."""
    both, first, second, neither = square
    return (acts(one, *both, *second) or acts(one, *first, *neither)) and (
        acts(two, *both, *first) or acts(two, *second, *neither)
    )


def _cells(runs: Sequence[Run], axes: tuple[str, ...]) -> Cells:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.speed is not None:
            rest = tuple((axis, value) for axis, value in run.settings.items() if axis not in axes)
            cells[rest][tuple(run.settings[axis] for axis in axes)].append(run)
    return {rest: dict(at) for rest, at in cells.items()}


def _terms(runs: Sequence[Run], power: float) -> list[tuple[Speed, float]]:
    """The geometric mean of repeated runs of one cell."""
    return [(run.timed, power / len(runs)) for run in runs]


def _mean(terms: Sequence[tuple[Speed, float]], count: int) -> Interval:
    return interval([(speed, power / count) for speed, power in terms])
