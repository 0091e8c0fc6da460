"""Records as one self-contained HTML file: no network, no library, readable on a phone.

The page is drawn here, in HTML and SVG; its script only filters, sorts and shows the records that it carries.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from moeexp.report import format, processes
from moeexp.report import records as report_records
from moeexp.report import table as report_table
from moeexp.report.command_line import code_of, command_of, config_dir, given_of
from moeexp.report.conditions import odd_ones
from moeexp.report.html import table
from moeexp.report.html.sections import SECTIONS, label_of
from moeexp.report.ratios import by_medians, three
from moeexp.report.runs import Run, gain, runs_of
from moeexp.report.tables import Table

ASSETS = Path(__file__).with_name("assets")
# Nothing may be fetched, whatever a record's text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(records: Sequence[dict[str, Any]], *, title: str) -> str:
    """The whole file. Runs are ranked by decode speed; those without one come after them, and last what never ran."""
    runs = runs_of(records)
    ranked = sorted(runs, key=lambda run: (not run.prepared, -run.speed.tok_s if run.speed else 0.0))
    sections = [(name, text) for name, draw in SECTIONS.items() if (text := draw(runs, ranked))]
    sections = [("Ranking", table.ranking(ranked)), *sections, ("Runs", _runs(ranked))]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(f'<h2 id="{_anchor(name)}">{escape(name)}</h2>{text}' for name, text in sections)
    carried = json.dumps([run.record for run in ranked], allow_nan=False, separators=(",", ":"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
{_subtitle(records)}
<nav>{links}</nav></header>
{_tiles(runs, ranked)}
{_flags(records)}
{body}
<script type="application/json" id="records">{carried.replace("<", chr(92) + "u003c")}</script>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _subtitle(records: Sequence[dict[str, Any]]) -> str:
    commands = dict.fromkeys(shlex.join(record["command"]) for record in records)
    shown = "".join(f"<div><code>{escape(command)}</code></div>" for command in list(commands)[:5])
    more = f'<div class="soft">and {len(commands) - 5} more commands</div>' if len(commands) > 5 else ""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    started = escape(min(record["started"] for record in records))
    return f'<div class="soft">{len(records)} runs, started {started}; made {made}</div>{shown}{more}'


def _tiles(runs: Sequence[Run], ranked: Sequence[Run]) -> str:
    statuses = Counter(run.record["status"] for run in runs)
    counted = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    tiles = [(counted, f"of {len(runs)} runs")]
    best = ranked[0]
    if best.speed:
        tiles.insert(0, _fastest(best, processes.processes(runs)))
        same = [run for run in runs if run.speed and run.workload == best.workload]
        if same[0] is not best:
            found = gain(best, same[0])
            spread = f", 95 % interval {three(found.low)} to {three(found.high)}: {found.phrase}" if found.low else ""
            spread += f"; by medians {by_medians(found)}" if found.medians else ""
            spread += "" if found.in_turns else "; not timed in turns"
            tiles.insert(1, (f"× {three(found.value)}", f"over the first, {label_of(same[0])}{spread}"))
    machines = dict.fromkeys(_machine(run.record) for run in [run for run in runs if run.prepared] or runs)
    tiles.append((next(iter(machines)), "and others, see Environment" if len(machines) > 1 else "measured on"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
    ) + "</div>"  # fmt: skip


def _fastest(best: Run, repeated: Sequence[processes.Processes]) -> tuple[str, str]:
    """Of a config that ran in several processes their median; of another what its one process had."""
    of_best = next((one for one in repeated if best in one.runs), None)
    if of_best is None:
        return f"{format.number(best.speed.tok_s)} tok/s", f"fastest decode, one process: {label_of(best)}"
    middle, least, most = of_best.figure(lambda record: record["decode_tok_s"])
    spread = f"median of {of_best.count} processes [{format.number(least)}, {format.number(most)}]"
    return f"{format.number(middle)} tok/s", f"fastest decode, {spread}: {of_best.label or label_of(best)}"


def _machine(record: dict[str, Any]) -> str:
    environment = record["environment"] or {}
    gpu, cpu = environment.get("gpu") or {}, environment.get("cpu") or {}
    return gpu.get("name") or (f"CPU, threads: {cpu['torch_threads']}" if cpu else "machine not recorded")


def _flags(records: Sequence[dict[str, Any]]) -> str:
    # What a ratio is not is marked in each table.
    marks = (format.APART, format.WEIGHTS, format.MEDIAN)
    notes = [note for note in report_table.footnotes(records) if not note.startswith(marks)]
    lines = odd_ones(records) + [note.removeprefix("\\* ") for note in notes]
    return f'<ul class="flags">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _runs(ranked: Sequence[Run]) -> str:
    return "".join(_run(run, index) for index, run in enumerate(ranked))


def _run(run: Run, index: int) -> str:
    record = run.record
    speed = f"{format.number(record['decode_tok_s'])} tok/s" if record["decode_tok_s"] is not None else ""
    why = report_records.why(record) if record["status"] != "ok" else None
    said = [why] * bool(why) + record["notes"]
    parts = [f'<p class="soft">{escape(line)}</p>' for line in said]
    parts.append(_command(record))
    parts += [_gates(record), _kernels(record)]
    parts.append(f'<details data-record="{index}"><summary>record {escape(run.id)}</summary><pre></pre></details>')
    status = record["status"]
    return (
        f'<details data-run="{escape(run.id)}"><summary><span class="status {escape(status)}">{escape(status)}</span> '
        f"{escape(label_of(run))} <span class=soft>{escape(speed)}</span></summary>{''.join(parts)}</details>"
    )


def _command(record: dict[str, Any]) -> str:
    """The command that runs this config; of a config that this version cannot compose, the one that was given, unless that
    could do more than choose settings. What names code is marked."""
    try:
        trust = config_dir(record) is None  # deriving a command reads the config files in it, and nothing else
        command, named = command_of(record, trust=trust), "; ".join(code_of(record))
    except ValueError as error:
        try:
            command, named = given_of(record), f"As it was given; {error}"
        except ValueError as refusal:
            return f'<p class="soft">{escape(f"{error}; {refusal}")}</p>'
    else:
        named = f"Run it only if you trust who wrote the record: {named}" if named else ""
    return f'<p class="soft">{escape(named)}</p>' * bool(named) + f'<pre class="command">{escape(command)}</pre>'


def _gates(record: dict[str, Any]) -> str:
    parts = (record["check"] or {}).get("parts", [])
    rows = [
        [gate["gate"], gate["where"], format.number(gate["value"]), format.number(gate["limit"]), _verdict(gate)]
        for part in parts
        for gate in part["gates"]
    ]
    return table.render(Table(["gate", "worst at", "value", "limit", "verdict"], rows)) if rows else ""


def _verdict(gate: dict[str, Any]) -> str:
    return "passed" if gate["passed"] else "FAILED"


def _kernels(record: dict[str, Any]) -> str:
    kernels = (record.get("time_split") or {}).get("by_kernel") or []
    rows = [[kernel["name"], format.number(kernel["calls"]), format.number(kernel["us"])] for kernel in kernels]
    return table.render(Table(["kernel", "calls per token", "µs per token"], rows)) if rows else ""
