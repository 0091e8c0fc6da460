"""The ranked table of runs with its filters, and the tables of `report.tables`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moeexp.report.format import MEDIAN, MEDIAN_NOTE, NONE, number
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
class Cell:
    text: str
    value: Any = None  # what the column is sorted by; None is last
    css: str = ""


def ranking(ranked: Sequence[Run]) -> str:
    """Every run, fastest first, a column for each setting that differs and each figure that some run has. In place of
    figures, a run that has none says why."""
    settings = [run.settings | run.asked for run in ranked]
    axes = list(dict.fromkeys(axis for one in settings for axis in one))
    first: dict[tuple, Run] = {}
    for run in sorted(ranked, key=lambda run: in_time(run.record)):
        if run.speed:
            first.setdefault(run.workload, run)
    columns: list[tuple[str, list[Cell]]] = []
    for name, get in FIGURES.items():
        cells = [get(run, first) for run in ranked]
        if any(cell.value for cell in cells):  # stalls of 0 are none
            columns.append((name, cells))
    names = [cell_of(run.record) for run in ranked]
    if any(names):
        columns.insert(0, ("cell", [Cell(name or "–", name) for name in names]))
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
        cells = [_cell(Cell(str(index + 1), index + 1), "number")]
        cells += [_cell(of_runs[index], "cell" if name == "cell" else "number") for name, of_runs in speed]
        cells += [_axis_cell(axis, settings[index][axis], "rare" * (axis in hidden)) for axis in axes]
        status = run.record["status"]
        cells.append(_axis_cell("status", status, f"status {status}"))
        reason = why(run.record) if status != "ok" else None
        if rest and reason and all(of_runs[index].value is None for _, of_runs in rest):
            cells.append(f'<td class="why" colspan="{len(rest)}"><div>{escape(reason)}</div></td>')
        else:
            cells += [_cell(of_runs[index], "number rare" if name in hidden else "number") for name, of_runs in rest]
        rows.append(f'<tr data-run="{escape(run.id)}">{"".join(cells)}</tr>')
    table = f'<table id="ranked"><thead><tr>{"".join(header)}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    more = [name for name in (*axes, *(name for name, _ in rest)) if name in hidden]
    gains = [gain(run, first[run.workload]) for run in ranked if run.speed]
    said = legend(gains)
    if any(is_median(run.record, "prefill_tok_s") for run in ranked):
        said = f"{said} {MEDIAN} Prefill {MEDIAN_NOTE}.".strip()
    return _filters(settings, ranked, axes, more) + f'<div class="scroll">{table}</div>' + below(said)


def below(line: str) -> str:
    """A line under a table or a chart; nothing for an empty one."""
    return f'<p class="soft">{escape(line)}</p>' if line else ""


def render(table: Table) -> str:
    """A table of a report, its texts escaped, under what it is of and above its notes."""

    def cells(tag: str, texts: Sequence[str], last: str = "") -> str:
        names = [*table.css, *[""] * (len(texts) - len(table.css))]
        names[-1] = f"{names[-1]} {last}".strip()
        return "".join(
            f"<{tag}{f' class={chr(34)}{escape(css)}{chr(34)}' if css else ''}>{escape(text)}</{tag}>"
            for text, css in zip(texts, names, strict=True)
        )

    kinds = table.kinds or [""] * len(table.rows)
    body = "".join(f"<tr>{cells('td', row, kind)}</tr>" for row, kind in zip(table.rows, kinds, strict=True))
    head = f"<h3>{escape(table.of)}</h3>" if table.of else ""
    return (
        f'{head}<div class="scroll"><table><thead><tr>{cells("th", table.header)}</tr></thead><tbody>{body}</tbody></table></div>'
        + "".join(map(below, table.notes))
    )


def _filters(
    settings: Sequence[dict[str, str]], ranked: Sequence[Run], axes: Sequence[str], more: Sequence[str]
) -> str:
    """A choice for each axis, the search, and the box that shows the columns `more`."""
    choices = {axis: list(dict.fromkeys(one[axis] for one in settings)) for axis in axes}
    choices["status"] = list(dict.fromkeys(run.record["status"] for run in ranked))
    boxes = ""
    for axis, values in choices.items():
        if 1 < len(values) <= FEW:
            options = "".join(f'<option value="={escape(v)}">{escape(v[:60])}</option>' for v in sorted(values))
            boxes += (
                f'<label>{escape(axis)}<select data-axis="{escape(axis)}"><option value="">all</option>'
                f"{options}</select></label>"
            )
    search = '<label>search<input id="search" type="search" placeholder="any text"></label>'
    box = ""
    if more:
        said = escape(f"also {', '.join(more)}")
        box = f'<label class="box" title="{said}"><input id="all-columns" type="checkbox">all columns</label>'
    return f'<div class="filters">{boxes}{search}{box}<span id="count"></span></div>'


def _header(name: str, is_number: bool, rare: bool = False) -> str:
    names = " ".join(["number"] * is_number + ["rare"] * rare)
    css = f' class="{names}"' if names else ""
    return f'<th{css} scope="col"><button type="button">{_breakable(name)}</button></th>'


def _breakable(text: str) -> str:
    """Escaped, and with places where a narrow column may break it: a setting's name is one long word."""
    return re.sub(r"([_.:])(?=\w)", r"\1<wbr>", escape(text))


def _axis_cell(axis: str, text: str, css: str = "") -> str:
    wide = " wrap" if len(text) > 40 else ""
    return f'<td class="{css}{wide}" data-axis="{escape(axis)}" data-value="{escape(text)}">{_breakable(text)}</td>'


def _cell(cell: Cell, css: str) -> str:
    value = "" if cell.value is None else escape(str(cell.value))
    # Parts may stand below each other (a value, its interval), and none breaks in itself.
    parts = escape(cell.text).replace(" [", "\n[").split("\n")
    text = " ".join(f"<span>{part}</span>" for part in parts) if len(parts) > 1 else parts[0]
    return f'<td class="{css} {cell.css}" data-value="{value}">{text}</td>'


def _figure(get: Callable[[dict[str, Any]], Any], scale: float = 1.0) -> Callable[[Run, dict], Cell]:
    def figure(run: Run, first: dict[tuple, Run]) -> Cell:
        value = get(run.record)
        if isinstance(value, str):  # not finite
            return Cell(value)
        return Cell("–") if value is None else Cell(number(scale * value), scale * value)

    return figure


def _prefill(run: Run, first: dict[tuple, Run]) -> Cell:
    value = run.record["prefill_tok_s"]
    mark = MEDIAN * is_median(run.record, "prefill_tok_s")
    return Cell("–") if value is None else Cell(number(value) + mark, value)


def _spread(run: Run, first: dict[tuple, Run]) -> Cell:
    found = run.speed.interval if run.speed else None
    if found is None or found.low is None or found.high is None:
        return Cell("–")
    half = 50 * (found.high - found.low) / found.value
    return Cell(f"± {half:.2g} %", half)


def _stalls(run: Run, first: dict[tuple, Run]) -> Cell:
    """How many, how long in all, and the speed without them."""
    stalls = run.record["stalls"]
    if not stalls:
        return Cell("–")
    if not stalls["count"]:
        return Cell(NONE, 0.0)
    text = f"{stalls['count']}, {three(stalls['total_ms'])} ms\nwithout {number(stalls['decode_tok_s'])}"
    return Cell(text, stalls["total_ms"])


def _against_first(run: Run, first: dict[tuple, Run]) -> Cell:
    if run.speed is None or first[run.workload] is run:
        return Cell("–") if run.speed is None else Cell("1, the first", 1.0)
    found = gain(run, first[run.workload])
    return Cell(f"{times(found)}\nmedians {by_medians(found)}", found.value, found.verdict.replace(" ", "-"))


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


FIGURES: dict[str, Callable[[Run, dict[tuple, Run]], Cell]] = {
    SPEED: _figure(_of("decode_tok_s")),
    "95 %": _spread,
    "vs first": _against_first,
    "p50 ms": _figure(_of("token_latencies_ms", "p50")),
    "p99 ms": _figure(_of("token_latencies_ms", "p99")),
    "stalls": _stalls,
    "prefill tok/s": _prefill,
    "first token ms": _figure(_of("ttft_s"), 1e3),
    "bits/byte": _figure(_of("bits_per_byte")),
    "memory GiB": _figure(peak_gib),
    "bandwidth %": _figure(_of("bandwidth_share"), 100.0),
    "kernels/token": _figure(_of("kernels_per_token")),
    "J/token": _figure(_of("joules_per_token")),
}
