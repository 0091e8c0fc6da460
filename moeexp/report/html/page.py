"""Records as one self-contained HTML file: no network, no library, readable on a phone.

The page is drawn here, in HTML and SVG; its script only filters, sorts and shows the records that it carries.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moeexp.report import format, processes
from moeexp.report import records as report_records
from moeexp.report import table as report_table
from moeexp.report.command_line import code_of, command_of, config_dir, given_of
from moeexp.report.conditions import odd_ones
from moeexp.report.html import table
from moeexp.report.html.sections import SECTIONS, label_of
from moeexp.report.html.template import carried, joined, render
from moeexp.report.ratios import by_medians, three
from moeexp.report.runs import Run, gain, runs_of
from moeexp.report.tables import Table

ASSETS = Path(__file__).with_name("assets")


def page(records: Sequence[dict[str, Any]], *, title: str) -> str:
    """The whole file. Runs are ranked by decode speed; those without one come after them, and last what never ran."""
    runs = runs_of(records)
    ranked = sorted(runs, key=lambda run: (not run.prepared, -run.speed.tok_s if run.speed else 0.0))
    drawn = [(name, text) for name, draw in SECTIONS.items() if (text := draw(runs, ranked))]
    drawn = [("Ranking", table.ranking(ranked)), *drawn, ("Runs", joined(map(_run, ranked, range(len(ranked)))))]
    style, script = _asset("report.css"), _asset("report.js")
    return str(render(
        "page",
        policy=_policy(style, script),
        title=title,
        style=style,
        script=script,
        count=len(records),
        started=min(record["started"] for record in records),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commands=list(dict.fromkeys(shlex.join(record["command"]) for record in records)),
        sections=[(name, name.lower().replace(" ", "-"), text) for name, text in drawn],
        tiles=_tiles(runs, ranked),
        flags=_flags(records),
        carried=carried([run.record for run in ranked]),
    )) + "\n"  # fmt: skip


def _asset(name: str) -> Markup:
    """Of our own, as it is."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Nothing may be fetched, and no style or script but ours has an effect, whatever a record's text holds."""
    known = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
             for name, text in (("style-src", style), ("script-src", script))}  # fmt: skip
    allowed = "; ".join(f"{name} 'sha256-{digest}'" for name, digest in known.items())
    return f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"


def _tiles(runs: Sequence[Run], ranked: Sequence[Run]) -> list[tuple[str, str]]:
    statuses = Counter(run.record["status"] for run in runs)
    counted = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    tiles = [(counted, f"of {len(runs)} runs")]
    best = ranked[0]
    if best.speed:
        tiles.insert(0, _fastest(best, processes.processes(runs)))
        same = [run for run in runs if run.speed and run.workload == best.workload]
        if same[0] is not best:
            found = gain(best, same[0])
            spread = ""
            if found.low is not None and found.high is not None:
                spread = f", 95 % interval {three(found.low)} to {three(found.high)}: {found.phrase}"
            spread += f"; by medians {by_medians(found)}" if found.medians else ""
            spread += "" if found.in_turns else "; not timed in turns"
            tiles.insert(1, (f"× {three(found.value)}", f"over the first, {label_of(same[0])}{spread}"))
    machines = dict.fromkeys(_machine(run.record) for run in [run for run in runs if run.prepared] or runs)
    tiles.append((next(iter(machines)), "and others, see Environment" if len(machines) > 1 else "measured on"))
    return tiles


def _fastest(best: Run, repeated: Sequence[processes.Processes]) -> tuple[str, str]:
    """Of a config that ran in several processes their median; of another what its one process had."""
    of_best = next((one for one in repeated if best in one.runs), None)
    if of_best is None:
        return f"{format.number(best.timed.tok_s)} tok/s", f"fastest decode, one process: {label_of(best)}"
    figure = of_best.figure(lambda record: record["decode_tok_s"])
    assert figure is not None, "each of these runs has a speed"
    middle, least, most = figure
    spread = f"median of {of_best.count} processes [{format.number(least)}, {format.number(most)}]"
    return f"{format.number(middle)} tok/s", f"fastest decode, {spread}: {of_best.label or label_of(best)}"


def _machine(record: dict[str, Any]) -> str:
    environment = record["environment"] or {}
    gpu, cpu = environment.get("gpu") or {}, environment.get("cpu") or {}
    return gpu.get("name") or (f"CPU, threads: {cpu['torch_threads']}" if cpu else "machine not recorded")


def _flags(records: Sequence[dict[str, Any]]) -> list[str]:
    # What a ratio is not is marked in each table.
    marks = (format.APART, format.WEIGHTS, format.MEDIAN)
    notes = [note for note in report_table.footnotes(records) if not note.startswith(marks)]
    return odd_ones(records) + [note.removeprefix(f"{format.RANDOM} ") for note in notes]


def _run(run: Run, index: int) -> Markup:
    record = run.record
    reason = report_records.why(record) if record["status"] != "ok" else None
    command, named = _command(record)
    return render(
        "run",
        id=run.id,
        index=index,
        status=record["status"],
        label=label_of(run),
        speed=f"{format.number(record['decode_tok_s'])} tok/s" if record["decode_tok_s"] is not None else "",
        said=[reason] * bool(reason) + record["notes"],
        command=command,
        named=named,
        tables=joined(table.table(one) for one in (_tolerances(record), _kernels(record)) if one.rows),
    )


def _command(record: dict[str, Any]) -> tuple[str | None, str]:
    """The command that runs this config, and a word on it; of a config that this version cannot compose, the one that was
    given, unless that could do more than choose settings. What names code is marked."""
    try:
        trust = config_dir(record) is None  # deriving a command reads the config files in it, and nothing else
        command, named = command_of(record, trust=trust), "; ".join(code_of(record))
    except ValueError as error:
        try:
            return given_of(record), f"As it was given; {error}"
        except ValueError as refusal:
            return None, f"{error}; {refusal}"
    return command, f"Run it only if you trust who wrote the record: {named}" if named else ""


def _tolerances(record: dict[str, Any]) -> Table:
    rows = [
        [row["tolerance"], row["where"], format.number(row["value"]), format.number(row["limit"]), _verdict(row)]
        for part in (record["check"] or {}).get("parts", [])
        for row in part["tolerances"]
    ]
    return Table(["tolerance", "worst at", "value", "limit", "verdict"], rows)


def _verdict(row: dict[str, Any]) -> str:
    return "passed" if row["passed"] else "FAILED"


def _kernels(record: dict[str, Any]) -> Table:
    kernels = (record.get("time_split") or {}).get("by_kernel") or []
    rows = [[kernel["name"], format.number(kernel["calls"]), format.number(kernel["us"])] for kernel in kernels]
    return Table(["kernel", "calls per token", "µs per token"], rows)
