"""What two runs must share for their speeds to be comparable, and where they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# Clocks coupled among GPUs by choice.
HARMLESS = ("sync boost",)
# Of the samples taken while a run was timed: below this, a reason to slow down passed unnoticed.
NOTICED = 0.05
# Two runs of which other processes left one more than this many times the CPU that they left the other were not under the
# same load. Up to there it is within the run-to-run noise of a CPU (`statistics.RUN_TO_RUN`).
UNLIKE_LOAD = 4 / 3
# What of a record's `group` is the same for all of its runs and for no others.
GROUP_KEYS = ("id", "name", "members", "runs", "order")
# Conditions that an older record tells in part or not at all: what it does not tell is not unlike anything.
IN_PART = ("weights", "held-out text", "tokenizer")
PARTS = (None, "trained", "random")
DIGITS = 12  # shown, of a digest
LOAD = "load of other processes (cores per core)"


def throttling(record: dict[str, Any]) -> list[str]:
    """The reasons for which the GPU lowered its clocks while this run was timed."""
    reasons = (record.get("telemetry") or {}).get("throttle_reasons") or {}
    return sorted(name for name, share in reasons.items() if share >= NOTICED and name not in HARMLESS)


def group_name(record: dict[str, Any]) -> str | None:
    """Names the runs that were timed in turns with this one; None if it ran by itself."""
    group = record.get("group") or {}
    name = next((group[key] for key in GROUP_KEYS if isinstance(group.get(key), (str, list)) and group[key]), None)
    return None if name is None else f"{name}"


def other_load(record: dict[str, Any]) -> float | None:
    """Cores' worth of work that other processes did while this run was timed, per core that it could use; None where that
    is not known, as in older records."""
    seen = (record.get("telemetry") or {}).get("other_load")
    return round(seen["cores"] / seen["of"], 2) if seen else None


def cpu_left(load: float) -> float:
    """Of each core, by other processes. Beside those that want all of it a run has still got its turn."""
    return max(1 - load, 0.01)


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
    """Where they come from; with the seed or the first digits of their digest, unless the record is too old to tell."""
    known = (record.get("identity") or {}).get("weights")
    if record["random_weights"]:
        return "random" if known is None else f"random, seed {known['seed']}"
    return "trained" if known is None else f"trained {known['sha256'][:DIGITS]}"


def _file(name: str) -> Callable[[dict[str, Any]], str | None]:
    """The first digits of a file's digest; None where none was read, or the record is too old to tell."""

    def get(record: dict[str, Any]) -> str | None:
        return ((record.get("identity") or {}).get(name) or "")[:DIGITS] or None

    return get


def _allocator_settings(record: dict[str, Any]) -> str | None:
    """Beside the backend, which is an axis."""
    allocator = ((record.get("identity") or {}).get("software") or {}).get("allocator") or {}
    return ",".join(allocator.get("settings") or ()) or None


def _threads(record: dict[str, Any]) -> int | None:
    """Of a run on a CPU. Those of a GPU's host load its weights and decode nothing."""
    return None if _environment("gpu")(record) else _environment("cpu", "torch_threads")(record)


CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "GPU": _environment("gpu", "name"),
    "driver": _environment("gpu", "driver"),
    "power limit (W)": _environment("gpu_before", "power_limit_w"),
    "CPU": _environment("cpu", "name"),
    "CPU cores": _environment("cpu", "cores"),
    "CPU threads": _threads,
    "torch": _environment("versions", "torch"),
    "triton": _environment("versions", "triton"),
    "CUDA": _environment("cuda"),
    "code": _code,
    "weights": _weights,
    "held-out text": _file("heldout"),
    "tokenizer": _file("tokenizer"),
    "allocator settings": _allocator_settings,
    "other processes on the GPU": lambda record: _environment("gpu_other_processes")(record) or None,
    "throttled by": lambda record: ", ".join(throttling(record)) or None,
    LOAD: other_load,
}


def conditions(record: dict[str, Any]) -> dict[str, Any]:
    return {name: get(record) for name, get in CONDITIONS.items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of the conditions in which two records differ."""
    left, right = conditions(a), conditions(b)
    return [name for name in CONDITIONS if not _alike(name, left[name], right[name])]


def unlike(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One phrase for each condition in which two records differ; empty for a fair comparison."""
    left, right = conditions(a), conditions(b)
    return [f"{name}: {_text(left[name])} / {_text(right[name])}" for name in differing(a, b)]


def odd_ones(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each condition that the measured records do not share: its values and which runs have them."""
    measured = [record for record in records if record["decode_tok_s"] is not None]
    lines = []
    for name, get in CONDITIONS.items():
        get = _levels(measured) if name == LOAD else _told(get, measured) if name in IN_PART else get
        values = Counter(value for value in map(get, measured) if value is not None or name not in IN_PART)
        if len(values) > 1:
            parts = [
                f"{_text(value)} ({_ids([record['id'] for record in measured if get(record) == value])})"
                for value, _ in values.most_common()
            ]
            lines.append(f"unlike conditions, {name}: " + "; ".join(parts))
    return lines


def _alike(name: str, x: Any, y: Any) -> bool:
    if name == LOAD:  # no two are ever equal, and an older record does not tell
        return x is None or y is None or max(cpu_left(x), cpu_left(y)) <= UNLIKE_LOAD * min(cpu_left(x), cpu_left(y))
    return x == y or (name in IN_PART and _covers(x, y))


def _covers(x: str | None, y: str | None) -> bool:
    """Whether one tells less than the other and no other thing: nothing at all, or `trained` beside `trained 3f2a…`."""
    return any(less in PARTS and (less is None or more is None or more.startswith(less)) for less, more in ((x, y), (y, x)))


def _told(get: Callable[[dict[str, Any]], Any], records: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], Any]:
    """Takes a record that tells less to be like the one value that says more, where there is only one."""
    values = set(map(get, records))

    def fuller(record: dict[str, Any]) -> Any:
        value = get(record)
        more = [other for other in values if other not in PARTS and value in PARTS and _covers(value, other)]
        return more[0] if len(more) == 1 else value

    return fuller


def _levels(records: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], str | None]:
    """Sorts a record by whether its load is like the lowest of all. One that does not tell counts as like it."""
    loads = [load for record in records if (load := other_load(record)) is not None]
    least = min(loads, default=None)

    def level(record: dict[str, Any]) -> str | None:
        low = _alike(LOAD, other_load(record), least)
        same = [load for load in loads if _alike(LOAD, load, least) == low]
        return " to ".join(dict.fromkeys(f"{end:g}" for end in (min(same), max(same)))) if loads else None

    return level


def _ids(ids: Sequence[str], shown: int = 6) -> str:
    more = len(ids) - shown
    return ", ".join(ids[:shown]) + (f" and {more} more" if more > 0 else "")


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
