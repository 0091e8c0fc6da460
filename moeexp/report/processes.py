"""Runs that repeat one another in processes of their own, and the figure that stands for them: the median with its spread.

Two processes of one config differ by more than the rounds of one do (placement, clocks, temperature), so a figure that is
quoted is the median of MINIMUM of them or more. `-m seed=0,1,2` makes them; runs that took turns in one process count once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeexp.config.axes import REPETITIONS
from moeexp.report.format import STALLS, number, stalls_text
from moeexp.report.runs import Run, settings_text

MINIMUM = 3  # of a headline figure
HEADER = ("config", "processes", "decode tok/s", "prefill tok/s", "TTFT ms", STALLS)
NOTE = (
    "The median over processes [the least, the most] of runs that differ in their seed alone. A headline figure is of "
    f"{MINIMUM} processes or more: -m seed=0,1,2."
)


@dataclass(frozen=True)
class Processes:
    """Measured runs of one config, code and machine; `sessions`: the runs of each process."""

    sessions: list[list[Run]]

    @property
    def count(self) -> int:
        return len(self.sessions)

    @property
    def runs(self) -> list[Run]:
        return [run for session in self.sessions for run in session]

    @property
    def label(self) -> str:
        return settings_text((axis, value) for axis, value in self.runs[0].settings.items() if axis not in REPETITIONS)

    def figure(self, get: Callable[[dict[str, Any]], float | None]) -> tuple[float, float, float] | None:
        """(median, least, most) over processes; of those that took turns in one the geometric mean. None where a run lacks
        it."""
        known = [[value for run in session if (value := get(run.record)) is not None] for session in self.sessions]
        if [len(session) for session in known] != [len(session) for session in self.sessions]:
            return None
        each = [session[0] if len(session) == 1 else statistics.geometric_mean(session) for session in known]
        return statistics.median(each), min(each), max(each)


def processes(runs: Sequence[Run]) -> list[Processes]:
    """Of every config that ran in at least two processes, in the order of the runs."""
    found: dict[Any, dict[Any, list[Run]]] = {}
    for run in runs:
        if run.speed is not None:
            found.setdefault(run.repeats, {}).setdefault(run.speed.session, []).append(run)
    return [Processes(list(sessions.values())) for sessions in found.values() if len(sessions) > 1]


def headline(runs: Sequence[Run], where: str) -> Processes:
    """The one config of these runs, measured in MINIMUM processes or more. `ValueError` for anything else."""
    measured = [run for run in runs if run.speed is not None]
    if len({run.repeats for run in measured}) > 1:
        raise ValueError(f"{where} holds runs of several configs: a headline figure is of one, repeated by its seed alone")
    count = len({run.timed.session for run in measured})
    if count < MINIMUM:
        raise ValueError(
            f"{where} holds {count} measured processes, and a headline figure needs {MINIMUM}: run it with -m seed=0,1,2"
        )
    return processes(measured)[0]


def spread(figure: tuple[float, float, float] | None, scale: float = 1.0) -> str:
    if figure is None:
        return "–"
    middle, least, most = (number(scale * value) for value in figure)
    return f"{middle} [{least}, {most}]"


def rows(found: Sequence[Processes]) -> list[list[str]]:
    """Cells under HEADER."""
    return [
        [
            one.label or one.runs[0].record["config"]["model"]["name"],
            f"{one.count}",
            spread(one.figure(lambda record: record["decode_tok_s"])),
            spread(one.figure(lambda record: record["prefill_tok_s"])),
            spread(one.figure(lambda record: record["ttft_s"]), 1e3),
            "; ".join(stalls_text(run.record) for run in one.runs),
        ]
        for one in found
    ]
