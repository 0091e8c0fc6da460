"""What a run shows at its end: the check, the speeds, the text, and where the record is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeexp.config.schema import model_label
from moeexp.record.text import one_line, visible
from moeexp.report.format import number
from moeexp.report.records import is_median, why
from moeexp.report.table import footnotes, markdown, table

COLOURS = {"ok": "green", "running": "yellow", "unsupported": "yellow", "interrupted": "yellow", "lost": "yellow"}
MAX_TEXT = 600
LABEL = 14
WIDE = 60  # characters of a column; what is longer stands out of it
TEXTS = ("op", "kernel", "layer")  # of the budget's columns those that are no figures

LabelledText = tuple[str, str | Text]


def print_run(record: dict[str, Any], *, path: Path, console: Console) -> None:
    """The summary of one run; plain text where the console is no terminal."""
    console.print()
    findings, places = ([(one_line(label), _shown(value)) for label, value in rows]
                        for rows in (_findings(record), _places(record, path)))  # fmt: skip
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, width=LABEL)
        grid.add_column(overflow="fold")
        for label, value in findings:
            grid.add_row(Text(label), value)
        console.print(grid)
        findings = []
    # One line each, whatever the width: a path broken over two lines cannot be copied or searched for.
    for label, value in findings + places:
        console.print(Text.assemble((f"{label:<{LABEL}}", "dim"), "  ", value), soft_wrap=True)
    if record["step_budget"]:
        _print_budget(record, console)


def _print_budget(record: dict[str, Any], console: Console) -> None:
    from moeexp.report.tables import budget_of  # here: few runs have one, and what tables are made of takes a while to import

    for one in budget_of(record):
        widths = [min(WIDE, max(map(len, column))) for column in zip(one.header, *one.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if name in TEXTS else cell.rjust(width)
                      for name, cell, width in zip(one.header, row, widths, strict=True)) for row in (one.header, *one.rows)
        ]  # fmt: skip
        for text in ("", *lines, *one.notes):
            console.print(Text(visible(text)), soft_wrap=True)


def print_sweep(records: Sequence[dict[str, Any]], *, path: Path, console: Console) -> None:
    """The combined table of a sweep, and the reason for each run that is not ok."""
    console.print()
    if not console.is_terminal:
        console.print(markdown(records), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(_view(records))
        for note in footnotes(records):
            console.print(Text(one_line(note), style="dim"))
    console.print(f"table  {visible(short_path(path))}", markup=False, highlight=False, soft_wrap=True)


def outcome(record: dict[str, Any]) -> str:
    """A run in one line, as a sweep shows it when the run has ended."""
    if record["status"] == "ok":
        speed = record["decode_tok_s"]
        return "ok" if speed is None else f"ok, {number(speed)} tok/s"
    return f"{record['status']}: {why(record) or 'no reason recorded'}"


def _shown(value: str | Text) -> Text:
    """With nothing in it that would act on the terminal."""
    plain = visible(str(value))
    return value if isinstance(value, Text) and plain == value.plain else Text(plain)


def _view(records: Sequence[dict[str, Any]]) -> Table:
    header, rows = table(records)
    status = header.index("status")
    view = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(header):
        width = max(len(one_line(row[index])) for row in rows)
        side: Literal["right", "left"] = "right" if index > status else "left"
        view.add_column(Text(one_line(name)), justify=side, overflow="fold", min_width=min(width, 12))
    for row in rows:
        cells = [Text(one_line(cell)) for cell in row]
        cells[status].stylize(COLOURS.get(row[status], "red"))
        view.add_row(*cells)
    return view


def _findings(record: dict[str, Any]) -> list[LabelledText]:
    config, status = record["config"], record["status"]
    model = model_label(config["model"]["name"], config["model"]["weights"])
    point = [model, f"quant {config['quant']['name']}", config["export"], config["dtype"]]
    if config.get("engine") == "transformers":
        point[2] = "transformers"
    point += [f"graph {config['cuda_graph']}"] if config["cuda_graph"] else []
    gpu = ((record["environment"] or {}).get("gpu") or {}).get("name")
    point.append(gpu or config["device"])
    head = Text.assemble((status, f"bold {COLOURS.get(status, 'red')}"), "  ", ", ".join(point))
    reason = why(record) if status != "ok" else None
    rows: list[LabelledText] = [("status", head)] + ([("reason", reason)] if reason else [])
    return rows + _check_rows(record) + _speed_rows(record) + _text_rows(record)


def _places(record: dict[str, Any], path: Path) -> list[LabelledText]:
    rows: list[LabelledText] = [("record", short_path(path))]
    tracker = record["tracker"] or {}
    if tracker.get("url"):
        rows.append(("W&B", tracker["url"]))
    elif tracker.get("path") and tracker["name"] == "wandb":
        rows.append(("W&B", f"offline; wandb sync {tracker['path']}"))
    elif tracker.get("path"):
        rows.append((tracker["name"], tracker["path"]))
    return rows


def _check_rows(record: dict[str, Any]) -> list[LabelledText]:
    check = record["check"]
    if not check:
        off = record["config"]["check"] == "off"
        return [("check", "off: no speed is published")] if off else []
    rows: list[LabelledText] = []
    for part in check.get("parts", []):
        # Of each part the tolerance nearest to its limit: the others have more room.
        worst = max(part["tolerances"], key=_tightness, default=None)
        text = Text("passed" if part["passed"] else "FAILED", style="green" if part["passed"] else "bold red")
        if worst is not None:
            measured = f"  {worst['tolerance']} {_compact(worst['value'])}, limit {_compact(worst['limit'])}"
            text.append(measured, style="not bold default")
        kept, positions = (part.get("report", {}).get(name) for name in ("with_logits", "positions"))
        if kept is not None and kept != positions:
            text.append(f"  logits of {number(kept)} of {number(positions)} positions", style="not bold default")
        rows.append((f"check {part['name']}", text))
    if not rows:
        rows.append(("check", "passed" if check.get("passed") else "FAILED"))
    return rows


def _speed_rows(record: dict[str, Any]) -> list[LabelledText]:
    rows: list[LabelledText] = []
    if record["decode_tok_s"] is not None:
        text = Text(f"{number(record['decode_tok_s'])} tok/s", style="bold")
        latencies = record["token_latencies_ms"]
        if latencies:
            spread = f"p50 {number(latencies['p50'])} ms, p99 {number(latencies['p99'])} ms, n {latencies['n']}"
            text.append(f"  {spread}", style="not bold")
        if record["random_weights"]:
            text.append("  (random weights)", style="yellow not bold")
        rows.append(("decode", text))
    if verify := record["verify"]:
        steps = f", {number(verify['decode_steps'])} decode steps" if verify["decode_steps"] else ""
        rows.append(("verify", f"{verify['tokens']} tokens of a sequence in {number(verify['step_ms'])} ms{steps}"))
    stalls = record["stalls"]
    if stalls and stalls["count"]:
        delay = f"{stalls['count']}, {number(stalls['total_ms'])} ms in all, the longest {number(stalls['longest_ms'])} ms"
        rows.append(("stalls", f"{delay}; without them {number(stalls['decode_tok_s'])} tok/s"))
    if record["prefill_tok_s"] is not None:
        first = f", first token after {number(1e3 * record['ttft_s'])} ms" if record["ttft_s"] is not None else ""
        median = " (by the median)" if is_median(record, "prefill_tok_s") else ""
        rows.append(("prefill", f"{number(record['prefill_tok_s'])} tok/s{median}{first}"))
    if record["first_token_s"] is not None:
        rows.append(("ready", f"the first token of all came {number(record['first_token_s'])} s after the process started"))
    if record["bandwidth_share"] is not None:
        rows.append(("bandwidth", f"{record['bandwidth_share']:.1%} of the measured read bandwidth"))
    if record["bits_per_byte"] is not None:
        bits = record["bits_per_byte"]  # text where it is not finite
        rows.append(("bits/byte", f"{bits if isinstance(bits, str) else f'{bits:.3f}'} on the held-out text"))
    if record["memory_gib"]:
        memory = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in record["memory_gib"].items())
        rows.append(("memory GiB", memory))
    return rows


def _text_rows(record: dict[str, Any]) -> list[LabelledText]:
    """The prompt dim and what the model made of it bold, line breaks shown as / ; of a batch the first row."""
    prompt, generated = (_first(record[key]) for key in ("prompt_text", "generated_text"))
    if not generated:
        return []
    cut = generated if len(generated) <= MAX_TEXT else generated[:MAX_TEXT] + "…"
    return [("text", Text.assemble((_one_line(prompt or "")[-MAX_TEXT:], "dim"), (_one_line(cut), "bold")))]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _one_line(text: str) -> str:
    return text.replace("\n", " / ")


def _tightness(tolerance: dict[str, Any]) -> float:
    value, limit = tolerance["value"], tolerance["limit"]
    if not tolerance["passed"] or not all(isinstance(one, (int, float)) for one in (value, limit)):
        return float("inf") if not tolerance["passed"] else 0.0
    return value / limit if limit else value


def _compact(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, (int, float)) else "not finite" if value is None else str(value)


def short_path(path: Path) -> str:
    """Relative where that is a path below here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
