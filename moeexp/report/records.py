"""Finding and reading records."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moeexp.record.published import withheld
from moeexp.record.record import is_prepared, read_record

# What Hydra's grammar escapes in a value without quotes.
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def load_records(folders: Sequence[Path], *, left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """Every `record.json` under the folders, in the order in which the runs started; what was refused comes last.
    `left_out` gets a line for each damaged one. `ValueError` if there is none, and without `left_out` for a damaged one."""
    paths: list[Path] = []
    for folder in folders:
        found = [folder] if folder.is_file() else sorted(folder.rglob("record.json"))
        if not found:
            raise ValueError(f"{folder} holds no record.json: give a run's or a sweep's folder")
        paths += found

    def order(record: dict[str, Any]) -> tuple:
        # A sweep refuses its cells before it runs the first.
        return is_refused(record), in_time(record)

    records, damaged = read_all(each_once(paths), read_published)
    if damaged and left_out is None:
        raise ValueError(damaged[0])
    if left_out is not None:
        left_out += damaged
    return sorted(records.values(), key=order)


def each_once(paths: Iterable[Path]) -> list[Path]:
    """Links resolved, also those that lead nowhere or to themselves."""
    return list(dict.fromkeys(Path(os.path.realpath(path)) for path in paths))


def read_all(paths: Iterable[Path], read: Callable[[Path], dict[str, Any]]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The records that can be read, and a line for each of the others."""
    found, damaged = {}, []
    for path in paths:
        try:
            found[path] = read(path)
        except FileNotFoundError:
            damaged.append(f"{path} is a link to a record that is not there: remove it, or run again")
        except ValueError as error:
            damaged.append(str(error))
    return found, damaged


def read_published(path: Path) -> dict[str, Any]:
    """A record without what it may not publish: a run that still goes on may have timed before its check."""
    record = read_record(path)
    return record | withheld(record)


def is_refused(record: dict[str, Any]) -> bool:
    """Whether its config may not run, so that nothing of it did."""
    return record["status"] == "unsupported" and not is_prepared(record)


def cell_of(record: dict[str, Any]) -> str | None:
    """What a design that is no grid (a ladder, one factor at a time) calls this run."""
    return (record.get("design") or {}).get("cell")


def why(record: dict[str, Any]) -> str | None:
    """One line for a run that is not ok."""
    if record["error"]:
        return " ".join(record["error"]["message"].split())
    failures = (record["check"] or {}).get("failures", [])
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{failures[0]}{more}" if failures else None


def varying(records: Sequence[dict[str, Any]]) -> list[str]:
    """The groups and fields that some command line or sweep set and that differ between the records."""
    given = [overrides_of(record) for record in records]
    keys = dict.fromkeys(key for overrides in given for key in overrides)

    def values(key: str) -> set[str]:
        # What a cell that never ran leaves to resolving (`auto`, null) is no other value than what the others resolved.
        pairs = zip(records, given, strict=True)
        return {setting(record, key, overrides) for record, overrides in pairs if is_prepared(record) or key in overrides}

    return [key for key in keys if len(values(key)) > 1]


def overrides_of(record: dict[str, Any]) -> dict[str, str]:
    pairs = (override.partition("=") for override in record["overrides"])
    return {key.lstrip("+~"): unescaped(value) for key, _, value in pairs if not key.startswith("tracker")}


def unescaped(value: str) -> str:
    """An override's value as one would write it alone: a sweeper hands on `module:function` as `module\\:function`."""
    return value if value[:1] in ("'", '"') else ESCAPED.sub(r"\1", value)


def setting(record: dict[str, Any], key: str, overrides: dict[str, str] | None = None) -> str:
    """What was asked for, as it was written, else what the config has. `overrides`: the record's, where many are asked."""
    value: Any = (overrides_of(record) if overrides is None else overrides).get(key)
    if value is None:
        value = record["config"]
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = value.get("name", value.get("default"))  # a group
    text = str(value)
    return "–" if value is None else text.lower() if text in ("True", "False") else text


def is_median(record: dict[str, Any], key: str) -> bool:
    """Whether a migrated record has a median where records of today have tokens over time."""
    return record[key] is not None and key in (record["migrated"] or {}).get("medians", ())


def in_time(record: dict[str, Any]) -> tuple[str, str, int]:
    """Sorts records in the order in which they started, those of a group in that of the sweep: run 10 after run 9."""
    stem, _, number = record["id"].rpartition(".")
    return (record["started"], *((stem, int(number)) if number.isdigit() else (record["id"], 0)))


def find(path: Path) -> Path:
    """A record, or the record of a run's folder."""
    file = path / "record.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no record: give a record.json or the folder of one run")
    return file
