"""What a search over configs maximises."""

from __future__ import annotations

from typing import Any


def objective(record: dict[str, Any]) -> float:
    """Decode tokens per second of a run that ended `ok` with its check passed; 0.0 of every other.

    0 and not -inf: a config that did not compute the function produced no token of it, and a sampler that fits densities
    to the values needs them finite."""
    passed = bool((record["check"] or {}).get("passed"))
    speed = record["decode_tok_s"]
    return float(speed) if record["status"] == "ok" and passed and speed is not None else 0.0
