"""What two runs must share for their speeds to be comparable, and where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# Clocks coupled among GPUs by choice.
HARMLESS = ("sync boost",)
# Of the samples taken while a run was timed: below this, a reason to slow down passed unnoticed.
NOTICED = 0.05


def throttling(record: dict[str, Any]) -> list[str]:
    """The reasons for which the GPU lowered its clocks while this run was timed."""
    reasons = (record.get("telemetry") or {}).get("throttle_reasons") or {}
    return sorted(name for name, share in reasons.items() if share >= NOTICED and name not in HARMLESS)


def _environment(*path: str) -> Callable[[dict[str, Any]], Any]:
    def get(record: dict[str, Any]) -> Any:
        value: Any = record["environment"]
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return get


def _code(record: dict[str, Any]) -> str | None:
    return record["code_fingerprint"]


def _weights(record: dict[str, Any]) -> str:
    return "random" if record["random_weights"] else "trained"


CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "GPU": _environment("gpu", "name"),
    "driver": _environment("gpu", "driver"),
    "power limit (W)": _environment("gpu_before", "power_limit_w"),
    "CPU": _environment("cpu", "name"),
    "CPU cores": _environment("cpu", "cores"),
    "CPU threads": _environment("cpu", "torch_threads"),
    "torch": _environment("versions", "torch"),
    "triton": _environment("versions", "triton"),
    "CUDA": _environment("cuda"),
    "code": _code,
    "weights": _weights,
    "other processes on the GPU": lambda record: _environment("gpu_other_processes")(record) or None,
    "throttled by": lambda record: ", ".join(throttling(record)) or None,
}


def conditions(record: dict[str, Any]) -> dict[str, Any]:
    return {name: get(record) for name, get in CONDITIONS.items()}


def unlike(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One phrase for each condition in which two records differ; empty for a fair comparison."""
    left, right = conditions(a), conditions(b)
    return [f"{name}: {_text(left[name])} / {_text(right[name])}" for name in CONDITIONS if left[name] != right[name]]


def odd_ones(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each condition that the measured records do not share: its values and which runs have them."""
    measured = [record for record in records if record["decode_tok_s"] is not None]
    lines = []
    for name, get in CONDITIONS.items():
        values = Counter(get(record) for record in measured)
        if len(values) > 1:
            parts = [
                f"{_text(value)} ({_ids([record['id'] for record in measured if get(record) == value])})"
                for value, _ in values.most_common()
            ]
            lines.append(f"unlike conditions, {name}: " + "; ".join(parts))
    return lines


def _ids(ids: Sequence[str], shown: int = 6) -> str:
    more = len(ids) - shown
    return ", ".join(ids[:shown]) + (f" and {more} more" if more > 0 else "")


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
