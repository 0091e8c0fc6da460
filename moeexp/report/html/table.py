"""The ranked table of runs with its filters, and the tables of `report.tables`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from moeexp.report.format import MEDIAN, MEDIAN_NOTE, NONE, number
from moeexp.report.html.template import render
from moeexp.report.ratios import by_medians, legend, three, times
from moeexp.report.records import cell_of, in_time, is_median, why
from moeexp.report.runs import Run, gain
from moeexp.report.tables import Table

SPEED = "decode tok/s"
FIRST = ("cell", SPEED)
# Looked at now and then: with all of them the table would be wider than a screen. A box shows them.
RARE = ("p99 ms", "first token ms", "bandwidth %", "kernels/token", "J/token")
ROOM = 5  # columns for axes, or for the names of a design's cells, which say more in less
FEW = 40  # levels of an axis that a filter lists; a longer list is searched


@dataclass(frozen=True)
class TableCell:
    text: str
    value: Any = None  # what the column is sorted by; None is last
    css: str = ""
    axis: str | None = None  # by which the page filters

    @property
    def parts(self) -> list[str]:
        """Which may stand below each other (a value, its interval); none breaks in itself."""
        return self.text.replace(" [", "\n[").split("\n")


def ranking(ranked: Sequence[Run]) -> Markup:
    """Every run, fastest first, a column for each setting that differs and each figure that some run has. In place of
    figures, a run that has none says why."""
    settings = [run.settings | run.asked for run in ranked]
    axes = list(dict.fromkeys(axis for one in settings for axis in one))
    first: dict[tuple, Run] = {}
    for run in sorted(ranked, key=lambda run: in_time(run.record)):
        if run.speed:
            first.setdefault(run.workload, run)
    columns: list[tuple[str, list[TableCell]]] = []
    for name, get in FIGURES.items():
        cells = [get(run, first) for run in ranked]
        if any(cell.value for cell in cells):  # stalls of 0 are none
            columns.append((name, cells))
    names = [cell_of(run.record) for run in ranked]
    if any(names):
        columns.insert(0, ("cell", [TableCell(name or "–", name) for name in names]))
    hidden = set(RARE)
    if all(names) and len(set(names)) == len(names) and len(axes) + 1 > ROOM:
        hidden |= set(axes)
    # The speed stands before the settings: a phone shows the first columns only.
    speed = [column for column in columns if column[0] in FIRST]
    rest = [column for column in columns if column[0] not in FIRST]
    header = [_header(name, name != "cell") for name in ("#", *(name for name, _ in speed))]
    header += [_header(name, False, name in hidden) for name in (*axes, "status")]
    header += [_header(name, True, name in hidden) for name, _ in rest]
    rows = []
    for index, run in enumerate(ranked):
        cells = [TableCell(str(index + 1), index + 1, "number")]
        cells += [_styled(of_runs[index], "cell" if name == "cell" else "number") for name, of_runs in speed]
        cells += [_axis_cell(axis, settings[index][axis], "rare" * (axis in hidden)) for axis in axes]
        status = run.record["status"]
        cells.append(_axis_cell("status", status, f"status {status}"))
        reason = why(run.record) if status != "ok" else None
        if not (rest and reason and all(of_runs[index].value is None for _, of_runs in rest)):
            reason = None
            cells += [_styled(of_runs[index], "number rare" if name in hidden else "number") for name, of_runs in rest]
        rows.append((run.id, cells, reason, len(rest)))
    more = [name for name in (*axes, *(name for name, _ in rest)) if name in hidden]
    gains = [gain(run, first[run.workload]) for run in ranked if run.speed]
    said = legend(gains)
    if any(is_median(run.record, "prefill_tok_s") for run in ranked):
        said = f"{said} {MEDIAN} Prefill {MEDIAN_NOTE}.".strip()
    choices = _choices(settings, ranked, axes)
    return render("ranking", choices=choices, more=more, header=header, rows=rows, legend=said)


def table(of: Table) -> Markup:
    """A table of a report, under what it is of and above its notes."""

    def cells(texts: Sequence[str], last: str = "") -> list[tuple[str, str]]:
        names = [*of.css, *[""] * (len(texts) - len(of.css))]
        names[-1] = f"{names[-1]} {last}".strip()
        return list(zip(texts, names, strict=True))

    kinds = of.kinds or [""] * len(of.rows)
    rows = [cells(row, kind) for row, kind in zip(of.rows, kinds, strict=True)]
    return render("table", table=of, header=cells(of.header), rows=rows)


def _choices(settings: Sequence[dict[str, str]], ranked: Sequence[Run], axes: Sequence[str]) -> dict[str, list[str]]:
    """What a filter lists for each axis."""
    found = {axis: sorted({one[axis] for one in settings}) for axis in axes}
    found["status"] = sorted({run.record["status"] for run in ranked})
    return {axis: values for axis, values in found.items() if 1 < len(values) <= FEW}


def _header(name: str, is_number: bool, rare: bool = False) -> tuple[str, str]:
    return name, " ".join(["number"] * is_number + ["rare"] * rare)


def _axis_cell(axis: str, text: str, css: str = "") -> TableCell:
    return TableCell(text, text, f"{css}{' wrap' * (len(text) > 40)}", axis)


def _styled(cell: TableCell, css: str) -> TableCell:
    return replace(cell, css=f"{css} {cell.css}")


def _figure(get: Callable[[dict[str, Any]], Any], scale: float = 1.0) -> Callable[[Run, dict], TableCell]:
    def figure(run: Run, first: dict[tuple, Run]) -> TableCell:
        value = get(run.record)
        if isinstance(value, str):  # not finite
            return TableCell(value)
        return TableCell("–") if value is None else TableCell(number(scale * value), scale * value)

    return figure


def _prefill(run: Run, first: dict[tuple, Run]) -> TableCell:
    value = run.record["prefill_tok_s"]
    mark = MEDIAN * is_median(run.record, "prefill_tok_s")
    return TableCell("–") if value is None else TableCell(number(value) + mark, value)


def _spread(run: Run, first: dict[tuple, Run]) -> TableCell:
    found = run.speed.interval if run.speed else None
    if found is None or found.low is None or found.high is None:
        return TableCell("–")
    half = 50 * (found.high - found.low) / found.value
    return TableCell(f"± {half:.2g} %", half)


def _stalls(run: Run, first: dict[tuple, Run]) -> TableCell:
    """How many, how long in all, and the speed without them."""
    stalls = run.record["stalls"]
    if not stalls:
        return TableCell("–")
    if not stalls["count"]:
        return TableCell(NONE, 0.0)
    text = f"{stalls['count']}, {three(stalls['total_ms'])} ms\nwithout {number(stalls['decode_tok_s'])}"
    return TableCell(text, stalls["total_ms"])


def _against_first(run: Run, first: dict[tuple, Run]) -> TableCell:
    if run.speed is None or first[run.workload] is run:
        return TableCell("–") if run.speed is None else TableCell("1, the first", 1.0)
    found = gain(run, first[run.workload])
    return TableCell(f"{times(found)}\nmedians {by_medians(found)}", found.value, found.verdict.replace(" ", "-"))


def _of(key: str, *path: str) -> Callable[[dict[str, Any]], Any]:
    def get(record: dict[str, Any]) -> Any:
        value = record.get(key)
        for name in path:
            value = value.get(name) if value else None
        return value

    return get


def peak_gib(record: dict[str, Any]) -> float | None:
    memory = record["memory_gib"] or {}
    return memory.get("device_in_use", memory.get("peak_allocated", memory.get("peak_host")))


FIGURES: dict[str, Callable[[Run, dict[tuple, Run]], TableCell]] = {
    SPEED: _figure(_of("decode_tok_s")),
    "95 %": _spread,
    "vs first": _against_first,
    "p50 ms": _figure(_of("token_latencies_ms", "p50")),
    "p99 ms": _figure(_of("token_latencies_ms", "p99")),
    "stalls": _stalls,
    "verify ms": _figure(_of("verify", "step_ms")),
    "prefill tok/s": _prefill,
    "first token ms": _figure(_of("ttft_s"), 1e3),
    "bits/byte": _figure(_of("bits_per_byte")),
    "memory GiB": _figure(peak_gib),
    "bandwidth %": _figure(_of("bandwidth_share"), 100.0),
    "kernels/token": _figure(_of("kernels_per_token")),
    "J/token": _figure(_of("joules_per_token")),
}
