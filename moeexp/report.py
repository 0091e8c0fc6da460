"""Reports of records: `python -m moeexp.report DIR… [--to md|html|wandb] [--out FILE]`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeexp.arguments import Parser
from moeexp.conditions import group_name
from moeexp.record import SPEEDS, is_prepared, read_record, write_atomically
from moeexp.streams import fitted

MEASURED = ("decode tok/s", "prefill tok/s", "TTFT ms", "bits/byte", "peak GiB")
STALLS = "stalls: how many, ms, tok/s without"
NONE = "none"  # of stalls: they were looked for
MEDIAN = "¶"  # marks a figure that an older definition made a median of
APART = "†"  # marks what was not timed in turns with what it is held against
WEIGHTS = "§"  # marks what has weights of another quantisation, where the engine is another too
# What Hydra's grammar escapes in a value without quotes.
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
MEDIAN_NOTE = "by the median prefill, as older records have it: no tokens over time"
RANDOM_WEIGHTS = "random weights: routing is near uniform there and prefill touches every expert"


def load_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every `record.json` under the folders, in the order in which the runs started; what was refused comes last.
    `ValueError` if there is none."""
    paths: dict[Path, None] = {}
    for folder in folders:
        found = [folder] if folder.is_file() else sorted(folder.rglob("record.json"))
        if not found:
            raise ValueError(f"{folder} holds no record.json: give a run's or a sweep's folder")
        paths |= dict.fromkeys(path.resolve() for path in found)

    def order(record: dict[str, Any]) -> tuple:
        # A sweep refuses its cells before it runs the first.
        return is_refused(record), in_time(record)

    return sorted(map(read_published, paths), key=order)


def read_published(path: Path) -> dict[str, Any]:
    """A record without the speeds that it may not publish yet: a run that still goes on may have timed before its check."""
    record = read_record(path)
    return record if record["status"] == "ok" else record | dict.fromkeys(SPEEDS)


def is_refused(record: dict[str, Any]) -> bool:
    """Whether its config may not run, so that nothing of it did."""
    return record["status"] == "unsupported" and not is_prepared(record)


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what differs between the configs, then what was measured."""
    cells = [cell_of(record) for record in records]
    # The cells of a design have names, which say more in less room than what each sets.
    named, unique = all(cells), len(set(cells)) == len(cells)
    axes = [] if named and unique else varying(records)
    first = (["cell"] if named else []) + axes
    # Of stalls a table speaks where a run had any.
    stalled = any(stalls_text(record) not in ("–", NONE) for record in records)
    header = [*(first or ["run"]), "status", *MEASURED, *[STALLS] * stalled]
    settings = [
        ([cell] if named else []) + [setting(record, axis) for axis in axes] or [record["id"]]
        for cell, record in zip(cells, records, strict=True)
    ]
    marks = [APART * apart + WEIGHTS * bool(weights) for apart, weights in _against_first(records)]
    return header, [
        [*chosen, *_results(record, mark), *[stalls_text(record)] * stalled]
        for chosen, record, mark in zip(settings, records, marks, strict=True)
    ]


def cell_of(record: dict[str, Any]) -> str | None:
    """What a design that is no grid (a ladder, one factor at a time) calls this run."""
    return (record.get("design") or {}).get("cell")


def markdown(records: Sequence[dict[str, Any]]) -> str:
    header, rows = table(records)
    figures = len(header) - header.index(MEASURED[0])
    rule = [":--"] * (len(header) - figures) + ["--:"] * figures
    lines = [header, rule, *rows]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    notes = footnotes(records)
    return text + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def footnotes(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the table's marks mean, and why each run that is not ok is not."""
    notes = [f"\\* {RANDOM_WEIGHTS}"] if any(_is_marked(record) for record in records) else []
    if any(is_median(record, "prefill_tok_s") for record in records):
        notes.append(f"{MEDIAN} {MEDIAN_NOTE}")
    against = _against_first(records)
    if any(apart for apart, _ in against):
        notes.append(f"{APART} not timed in turns with the first run: run-to-run noise is part of what lies between them")
    unlike = "; ".join(dict.fromkeys(weights for _, weights in against if weights))
    if unlike:
        notes.append(f"{WEIGHTS} not of the first run's quantisation, which is part of what lies between them: {unlike}")
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            name = f"{cell_of(record)} ({record['id']})" if cell_of(record) else record["id"]
            reasons.setdefault(f"{record['status']}: {why(record) or 'no reason recorded'}", []).append(name)
    return notes + [f"{', '.join(names)} {reason}" for reason, names in reasons.items()]


def why(record: dict[str, Any]) -> str | None:
    """One line for a run that is not ok."""
    if record["error"]:
        return " ".join(record["error"]["message"].split())
    failures = (record["check"] or {}).get("failures", [])
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{failures[0]}{more}" if failures else None


def varying(records: Sequence[dict[str, Any]]) -> list[str]:
    """The groups and fields that some command line or sweep set and that differ between the records."""
    keys = dict.fromkeys(key for record in records for key in overrides_of(record))

    def values(key: str) -> set[str]:
        # What a cell that never ran leaves to resolving (`auto`, null) is no other value than what the others resolved.
        return {setting(record, key) for record in records if is_prepared(record) or key in overrides_of(record)}

    return [key for key in keys if len(values(key)) > 1]


def overrides_of(record: dict[str, Any]) -> dict[str, str]:
    pairs = (override.partition("=") for override in record["overrides"])
    return {key.lstrip("+~"): unescaped(value) for key, _, value in pairs if not key.startswith("tracker")}


def unescaped(value: str) -> str:
    """An override's value as one would write it alone: a sweeper hands on `module:function` as `module\\:function`."""
    return value if value[:1] in ("'", '"') else ESCAPED.sub(r"\1", value)


def setting(record: dict[str, Any], key: str) -> str:
    """What was asked for, as it was written, else what the config has."""
    value: Any = overrides_of(record).get(key)
    if value is None:
        value = record["config"]
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = value.get("name", value.get("default"))  # a group
    text = str(value)
    return "–" if value is None else text.lower() if text in ("True", "False") else text


def _against_first(records: Sequence[dict[str, Any]]) -> list[tuple[bool, str]]:
    """Of each: whether it took no turns with the first run of its workload, which is what a reader holds it against, and
    how its weights differ from that one's."""
    from moeexp.runs import WORKLOAD, machine, unlike_weights

    first: dict[tuple, dict[str, Any]] = {}
    found = []
    for record in records:
        if record["decode_tok_s"] is None:
            found.append((False, ""))
            continue
        work = (machine(record), *(str(record["config"].get(key)) for key in WORKLOAD))
        base, group = first.setdefault(work, record), group_name(record)
        apart = record is not base and (group is None or group != group_name(base))
        found.append((apart, unlike_weights(record, base)))
    return found


def _results(record: dict[str, Any], marks: str) -> list[str]:
    memory, ttft = record["memory_gib"] or {}, record["ttft_s"]
    mark = r"\*" if _is_marked(record) else ""
    return [
        record["status"],
        number(record["decode_tok_s"]) + mark + marks,
        number(record["prefill_tok_s"]) + MEDIAN * is_median(record, "prefill_tok_s"),
        number(None if ttft is None else 1e3 * ttft),
        number(record["bits_per_byte"]),
        number(memory.get("peak_allocated", memory.get("peak_host"))),
    ]


def stalls_text(record: dict[str, Any]) -> str:
    """How many stalls, how long in all, and the speed without them; – where that is not known."""
    stalls = record["stalls"]
    if stalls is None:
        return "–"
    if not stalls["count"]:
        return NONE
    return f"{number(stalls['count'])}, {number(stalls['total_ms'])}, {number(stalls['decode_tok_s'])}"


def is_median(record: dict[str, Any], key: str) -> bool:
    """Whether a migrated record has a median where records of today have tokens over time."""
    return record[key] is not None and key in (record["migrated"] or {}).get("medians", ())


def number(value: Any) -> str:
    """Four significant digits, thousands separated; – where there is nothing."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(part: float) -> str:
    return f"{100 * part:.0f} %"


def _is_marked(record: dict[str, Any]) -> bool:
    return bool(record["random_weights"] and record["decode_tok_s"] is not None)


def in_time(record: dict[str, Any]) -> tuple[str, str, int]:
    """Sorts records in the order in which they started, those of a group in that of the sweep: run 10 after run 9."""
    stem, _, number = record["id"].rpartition(".")
    return (record["started"], *((stem, int(number)) if number.isdigit() else (record["id"], 0)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m moeexp.report", description="Report of every record.json under DIR…")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run's or a sweep's folder, or a record")
    parser.add_argument("--to", choices=("md", "html", "wandb"), help="default: by FILE's ending, else md")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write; default: md to stdout, report.html")
    parser.add_argument("--title", default="moeexp report")
    parser.add_argument("--project", help="--to wandb: the project to save in; default: the runs' own")
    parser.add_argument("--entity", help="--to wandb: its entity; default: the runs' own, else the one logged in")
    options = parser.parse_args(arguments)
    ending = options.out.suffix if options.out else ""
    options.to = options.to or {".html": "html", ".htm": "html"}.get(ending, "md")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(arguments)
        return _write(load_records(options.folders), options)
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except (ValueError, RuntimeError, OSError) as error:
        print(fitted(f"error: {error}"), file=sys.stderr)
        return 2


def _write(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> int:
    # Imported here: the end of a sweep needs the table alone.
    if options.to == "wandb":
        from moeexp import wandb_report

        specification = wandb_report.specification(
            records, title=options.title, project=options.project, entity=options.entity
        )
        if options.out is None:
            print(wandb_report.save(specification))
            return 0
        text, out = wandb_report.dump(specification), options.out
    elif options.to == "html":
        from moeexp import html_report

        text, out = html_report.page(records, title=options.title), options.out or Path("report.html")
    else:
        from moeexp import markdown_report

        text, out = markdown_report.document(records), options.out
    if out is None:
        print(text, end="")
    else:
        write_atomically(out, text)
        print(f"{options.to} report of {len(records)} runs: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
