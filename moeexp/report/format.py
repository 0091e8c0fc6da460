"""Numbers as text, and the marks beside them."""

from __future__ import annotations

from typing import Any

STALLS = "stalls: how many, ms, tok/s without"
NONE = "none"  # of stalls: they were looked for
MEDIAN = "¶"  # marks a figure that an older definition made a median of
APART = "†"  # marks what was not timed in turns with what it is held against
WEIGHTS = "§"  # marks what has weights of another quantisation, where the engine is another too
RANDOM = "*"  # marks what was measured on random weights
MEDIAN_NOTE = "by the median prefill, as older records have it: no tokens over time"
RANDOM_WEIGHTS = "random weights: routing is near uniform there and prefill touches every expert"


def stalls_text(record: dict[str, Any]) -> str:
    """How many stalls, how long in all, and the speed without them; – where that is not known."""
    stalls = record["stalls"]
    if stalls is None:
        return "–"
    if not stalls["count"]:
        return NONE
    return f"{number(stalls['count'])}, {number(stalls['total_ms'])}, {number(stalls['decode_tok_s'])}"


def number(value: Any) -> str:
    """Four significant digits, thousands separated; – where there is nothing."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(part: float | None) -> str:
    """– where there is nothing."""
    return "–" if part is None else f"{100 * part:.0f} %"


def is_marked(record: dict[str, Any]) -> bool:
    return bool(record["random_weights"] and record["decode_tok_s"] is not None)
