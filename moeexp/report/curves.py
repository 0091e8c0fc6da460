"""Runs that differ in one number of their workload, as curves: speed over the sequences, the depth, the prompt, or the tokens of
a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeexp.config.axes import REPETITIONS
from moeexp.report.runs import Run, settings_text

LEAST = 3  # points that make a curve
MOST = 12  # curves of a report
NOTE = (
    "Runs that differ in one number and in what comes with it, as max_seq_len does. Of several runs with the same one the middle "
    "one counts, of prefill the fastest, with a graph or without."
)


@dataclass(frozen=True)
class CurvePoint:
    x: float
    y: float
    run: Run


@dataclass(frozen=True)
class Curve:
    """`of`: the settings that its runs share, where the report has other curves of this kind."""

    title: str
    x_unit: str
    y_unit: str
    points: Sequence[CurvePoint]  # by x
    of: str = ""

    @property
    def name(self) -> str:
        return ": ".join(filter(None, (self.title, self.of)))


@dataclass(frozen=True)
class CurveKind:
    """`x`, `y`: of a record, None where it has none. `along`: the settings that come with x. `fastest`: of several runs at one x
    the one that counts is the one with the most y, and not the middle one."""

    title: str
    x_unit: str
    y_unit: str
    x: Callable[[dict[str, Any]], float | None]
    y: Callable[[dict[str, Any]], float | None]
    along: tuple[str, ...]
    fastest: bool = False


def _of_config(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record["config"].get(name)


def _decode(record: dict[str, Any]) -> float | None:
    """Of a run that timed no steps of several tokens: those have a curve of their own."""
    return None if record.get("verify") else record["decode_tok_s"]


def _verified(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: (record.get("verify") or {}).get(name)


KINDS = (
    CurveKind("Decoding several sequences", "sequences", "tok/s of all", _of_config("batch"), _decode, ("batch", "max_seq_len")),
    CurveKind(
        "Decoding behind a prompt", "tokens before", "tok/s", _of_config("prompt_len"), _decode,
        ("prompt_len", "max_seq_len", "prefill_graph_lengths"),
    ),
    # Whether a graph is worth it depends on the length.
    CurveKind(
        "Prefill", "prompt tokens", "tok/s", _of_config("prompt_len"), lambda record: record["prefill_tok_s"],
        ("prompt_len", "max_seq_len", "new_tokens", "cuda_graph", "prefill_graph_lengths"), fastest=True,
    ),
    CurveKind("Steps of several tokens", "tokens of a step", "ms a step", _verified("tokens"), _verified("step_ms"), ()),
)  # fmt: skip


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Those of at least LEAST points, of runs whose speed may be published."""
    return [curve for kind in KINDS for curve in _of_kind(kind, runs)]


def shown(runs: Sequence[Run]) -> tuple[list[Curve], str]:
    """MOST of them, those with most points first, and what a report says above them."""
    found = sorted(curves(runs), key=lambda curve: -len(curve.points))
    cut = f" {MOST} of {len(found)} curves." if len(found) > MOST else ""
    return found[:MOST], NOTE + cut


def _of_kind(kind: CurveKind, runs: Sequence[Run]) -> list[Curve]:
    groups: dict[tuple[tuple[str, str], ...], dict[float, list[CurvePoint]]] = {}
    for run in runs:
        x, y = kind.x(run.record), kind.y(run.record)
        if run.speed is None or x is None or y is None:
            continue
        apart = (*kind.along, *REPETITIONS)
        shared = tuple((axis, value) for axis, value in run.settings.items() if axis not in apart)
        groups.setdefault(shared, {}).setdefault(x, []).append(CurvePoint(x, y, run))
    found = {shared: by_x for shared, by_x in groups.items() if len(by_x) >= LEAST}
    return [
        Curve(
            kind.title, kind.x_unit, kind.y_unit, [_one(by_x[x], kind.fastest) for x in sorted(by_x)],
            settings_text(shared) if len(found) > 1 else "",
        )
        for shared, by_x in found.items()
    ]  # fmt: skip


def _one(points: Sequence[CurvePoint], fastest: bool) -> CurvePoint:
    """The fastest, or the middle one; of two the slower."""
    ordered = sorted(points, key=lambda point: point.y)
    return ordered[-1] if fastest else ordered[(len(ordered) - 1) // 2]
