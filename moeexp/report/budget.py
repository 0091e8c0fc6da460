"""The budget of a decode step as rows of tables: what it must move, how long that takes at least, and how long it took."""

from __future__ import annotations

import re
from typing import Any

from moeexp.report.format import number

KERNELS = ("op", "kernel", "calls", "MB", "floor µs", "µs", "share", "× floor", "adds µs", "activations KB")
LAYERS = ("layer", "count", "MB each", "its bytes, µs", "adds µs each", "beyond its bytes, µs", "in all, µs")
SUMMED = ("calls", "bytes", "activations", "us", "adds_us")
NAMES = {"linear_attention": "delta net", "full_attention": "attention"}
NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::")
LONG = 40  # characters of a kernel's name
CONCURRENT = 1.02  # times the time in which kernels run, from which on their sum says that they run together


def has_budget(record: dict[str, Any]) -> bool:
    """Whether all that its tables need is there."""
    floor = record["bytes_per_token"] or {}
    return bool(record.get("step_budget") and record.get("time_split") and floor.get("read_bandwidth_gb_s"))


def kernel_rows(record: dict[str, Any]) -> list[list[str]]:
    """Cells under KERNELS: the rows of the budget, their sum, and what else a step's time is."""
    rows, split = record["step_budget"]["rows"], record["time_split"]
    whole = {"op": "sum of kernels", "kernel": ""} | {key: sum(row[key] for row in rows) for key in SUMMED}
    lines = [_kernel(row, whole["us"], record) for row in (*rows, whole)]
    rest = {"copies": "copies_us", "gaps": "gaps_us", "host": "host_us", "wall": "wall_us"}
    return lines + [[name, *[""] * 7, _tenths(split[key]), ""] for name, key in rest.items()]


def layer_rows(record: dict[str, Any]) -> list[list[str]]:
    """Cells under LAYERS; none where kernels were not found to be of layers."""
    found = []
    for part in record["step_budget"]["layers"] or ():
        each, floor = part["adds_us"] / part["count"], _floor(part["bytes"], record) / part["count"]
        figures = map(_tenths, (part["bytes"] / part["count"] / 1e6, floor, each, each - floor, part["adds_us"]))
        found.append([NAMES.get(part["name"], part["name"]), number(part["count"]), *figures])
    return found


def kernel_notes(record: dict[str, Any]) -> list[str]:
    """What the columns mean, and what a reader must know of these figures."""
    budget, floor, split = record["step_budget"], record["bytes_per_token"], record["time_split"]
    total, adds = (sum(row[key] for row in budget["rows"]) for key in ("us", "adds_us"))
    experts = floor.get("distinct_experts")
    of_experts = f", of {number(experts)} distinct experts a layer" if experts else ""
    notes = [
        f"MB: what memory must deliver in a step, weights with scales, state and KV cache{of_experts}. Activations come from a "
        f"cache. Floor: MB over the {number(floor['read_bandwidth_gb_s'])} GB/s that a large read reached in this run. Share: of "
        "the sum of kernels. Adds: without the time in which a kernel that started earlier still ran. Kernels are timed in a "
        "profiled pass, the wall without a profiler."
    ]
    if total > CONCURRENT * adds:
        notes.append(
            "Kernels overlap: one that starts early (PDL) waits for those before it, and its µs count from its start. They add "
            f"up to {_tenths(total)} µs where a step takes {_tenths(split['wall_us'])} µs; what each adds leaves the waiting out."
        )
    if any(row["kernel"] is None for row in budget["rows"]):
        notes.append("A row without a kernel: bytes of an op that no kernel known to be its own was seen for.")
    if budget["layers"] is None:
        notes.append(
            "The kernels do not come in the order of the model's ops, so that none is said to be of one, nor of a layer."
        )
    return notes


def _kernel(row: dict[str, Any], total: float, record: dict[str, Any]) -> list[str]:
    size, us, activations = row["bytes"], row["us"], row["activations"]
    floor = _floor(size, record)
    return [
        row["op"] or "–", "–" if row["kernel"] is None else short(row["kernel"]), number(row["calls"]),
        _tenths(size / 1e6) if size else "–", _tenths(floor) if size else "–", _tenths(us),
        f"{100 * us / total:.1f} %" if total else "–", _tenths(us / floor) if size and us else "–", _tenths(row["adds_us"]),
        _tenths(activations / 1e3) if activations else "–",
    ]  # fmt: skip


def _tenths(value: float) -> str:
    return f"{value:,.1f}"


def _floor(size: int, record: dict[str, Any]) -> float:
    """Microseconds."""
    return size / record["bytes_per_token"]["read_bandwidth_gb_s"] / 1e3


def short(name: str) -> str:
    """A kernel's name without the namespaces that torch's share."""
    bare = NOISE.sub("", name)
    return bare if len(bare) <= LONG else bare[: LONG - 1] + "…"
