"""What a search over configs maximises."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moeexp.record import streams
from moeexp.record.record import read_record


def objective(record: dict[str, Any]) -> float:
    """Decode tokens per second of a run that ended `ok` with its check passed; 0.0 of every other.

    0 and not -inf: a config that did not compute the function produced no token of it, and a sampler that fits densities
    to the values needs them finite."""
    passed = bool((record["check"] or {}).get("passed"))
    speed = record["decode_tok_s"]
    return float(speed) if record["status"] == "ok" and passed and speed is not None else 0.0


def objective_of(path: Path) -> float:
    """Of the record at `path`. One that cannot be read says so, and is 0.0: the search goes on."""
    try:
        return objective(read_record(path))
    except (ValueError, OSError) as error:
        print(streams.fitted(f"{error}; it counts as 0 tok/s"), file=sys.stderr)
        return 0.0
