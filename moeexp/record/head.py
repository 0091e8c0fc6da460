"""The first lines of a record, which say what it is of: a sweep looks at thousands."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from moeexp.record.json_file import read_bytes
from moeexp.record.names import DATE, ID, STATUSES
from moeexp.record.record import SCHEMAS, read_record
from moeexp.record.text import brief

# These stand first in the file; see `moeexp.record.record.KEYS`.
HEAD = ("id", "config_hash", "code_fingerprint", "status", "started", "finished")
HEAD_LINE = re.compile(r'^ "(\w+)": (null|"[^"]*"),$', re.MULTILINE)


def head(path: Path) -> dict[str, Any]:
    """{id, config_hash, code_fingerprint, status, started, finished} from a record's first lines. `ValueError` (one line)
    where these are not a record's, or of a schema that is not read, `FileNotFoundError`. A sweep looks at thousands, and a
    record has up to 200 KB: what is further down may be damaged."""
    text = read_bytes(path, 1024).decode("utf-8", errors="ignore")
    pairs = {key: None if value == "null" else value.strip('"') for key, value in HEAD_LINE.findall(text)}
    if pairs.get("schema") not in SCHEMAS or not set(HEAD) <= set(pairs):
        raise ValueError(f"{path} does not begin as a record: remove it, or run again")
    for key, allowed in (("id", ID), ("started", DATE), ("finished", DATE)):
        value = pairs[key]
        if not (value is None and key == "finished") and not _is(allowed, key, value):
            raise ValueError(f"{path} has {key}={brief(value)}, which no record has: remove it, or run again")
    if pairs["status"] not in STATUSES:
        raise ValueError(f"{path} has status={brief(pairs['status'])}; allowed: {', '.join(STATUSES)}; remove it, or run again")
    if pairs["status"] == "running":  # few do: whether it still runs is said further down
        pairs["status"] = read_record(path)["status"]
    return {key: pairs[key] for key in HEAD}


def _is(pattern: re.Pattern[str], key: str, value: str | None) -> bool:
    if value is None or not pattern.fullmatch(value):
        return False
    try:
        return key == "id" or bool(datetime.fromisoformat(value))
    except ValueError:  # a month 13
        return False
