"""A combined Markdown table of records: `python -m moeexp.report DIR…`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeexp.record import read_record

GROUPS = ("model", "quant", "ops", "sampler")
RANDOM_WEIGHTS = "random weights: routing is near uniform there and prefill touches every expert"


def load_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Every `record.json` under the folders, in the order in which the runs started. `ValueError` where there is none."""
    paths: dict[Path, None] = {}
    for folder in folders:
        found = [folder] if folder.is_file() else sorted(folder.rglob("record.json"))
        if not found:
            raise ValueError(f"{folder} holds no record.json: give a run's or a sweep's folder")
        paths |= dict.fromkeys(path.resolve() for path in found)
    return sorted(map(read_record, paths), key=lambda record: (record["started"], _numbered(record["id"])))


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what differs between the configs, then what was measured."""
    axes = varying(records)
    header = [*([axis.removesuffix(".name") for axis in axes] or ["run"]), "status", "decode tok/s", "prefill tok/s", "TTFT ms", "bits/byte", "peak GiB"]
    return header, [[*_settings(record, axes), *_results(record)] for record in records]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    header, rows = table(records)
    left = len(header) - 5  # settings and status are text; the measured columns are numbers
    lines = [header, [":--"] * left + ["--:"] * 5, *rows]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    notes = footnotes(records)
    return text + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def footnotes(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the table's marks mean, and why each run that is not ok is not."""
    notes = [f"\\* {RANDOM_WEIGHTS}"] if any(_is_marked(record) for record in records) else []
    for record in records:
        reason = why(record)
        if record["status"] != "ok" and reason:
            notes.append(f"{record['id']} {record['status']}: {reason}")
    return notes


def why(record: dict[str, Any]) -> str | None:
    """One line for a run that is not ok."""
    if record["error"]:
        return " ".join(record["error"]["message"].split())
    gates = [gate for part in (record["check"] or {}).get("parts", []) for gate in part["gates"] if not gate["passed"]]
    return ", ".join(f"{gate['gate']} {number(gate['value'])} > {number(gate['limit'])}" for gate in gates[:3]) or None


def varying(records: Sequence[dict[str, Any]]) -> list[str]:
    """Config keys with more than one value; of a group only its name, where that tells the records apart."""
    flat = [_flatten(record["config"]) for record in records]
    keys = [key for key in dict.fromkeys(key for config in flat for key in config) if not key.startswith("tracker.")]
    differ = [key for key in keys if len({str(config.get(key)) for config in flat}) > 1]
    result = []
    for key in differ:
        group = key.split(".")[0]
        named = f"{group}.name" in differ and key != f"{group}.name"
        if not (group in GROUPS and named and _follows(flat, f"{group}.name", key)):
            result.append(key)
    return result


def _follows(flat: list[dict[str, Any]], name: str, key: str) -> bool:
    """Whether `name` determines `key` in these configs."""
    pairs = {(str(config.get(name)), str(config.get(key))) for config in flat}
    return len(pairs) == len({first for first, _ in pairs})


def _settings(record: dict[str, Any], axes: list[str]) -> list[str]:
    flat = _flatten(record["config"])
    return [_show(flat.get(axis)) for axis in axes] if axes else [record["id"]]


def _results(record: dict[str, Any]) -> list[str]:
    memory, ttft = record["memory_gib"] or {}, record["ttft_s"]
    mark = r"\*" if _is_marked(record) else ""
    return [
        record["status"],
        number(record["decode_tok_s"]) + mark,
        number(record["prefill_tok_s"]),
        number(None if ttft is None else 1e3 * ttft),
        number(record["bits_per_byte"]),
        number(memory.get("device_peak", memory.get("allocated_peak"))),
    ]


def number(value: Any) -> str:
    """Four significant digits, thousands separated; – where there is nothing."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _is_marked(record: dict[str, Any]) -> bool:
    return bool(record["random_weights"] and record["decode_tok_s"] is not None)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _show(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _numbered(id: str) -> tuple[str, int]:
    """Sorts run 10 of a sweep after run 9."""
    stem, _, number = id.rpartition(".")
    return (stem, int(number)) if number.isdigit() else (id, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    folders = list(sys.argv[1:] if arguments is None else arguments)
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: python -m moeexp.report DIR…   (prints a Markdown table of every record.json under DIR…)")
        return 0 if folders else 2
    try:
        print(markdown(load_records([Path(folder) for folder in folders])), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
