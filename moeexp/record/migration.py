"""Records of earlier schemas, read as the present one.

A step takes a record of one schema to the next and is a pure function of plain values; a file is never written back. The
names of schemas are spelled out here and pinned by stored files under tests/data/. What was measured under an older
definition is computed anew where the samples allow it, and else dropped or marked under `migrated`: two definitions are
never compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeexp_runner import stalls

from moeexp.record import renamed

# No last-level cache is larger: the streaming read that a bandwidth was measured with is beyond any cache at this size.
BEYOND_CACHES = 256 * 2**20
MOST_AHEAD = 64  # steps of a loop, in the versions that wrote schema 1


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """The record under the present schema; one that has it, or a schema that nobody knows, comes back as it is.

    `ValueError` for a record that is not what its schema says."""
    while (step := STEPS.get(data.get("schema"))) is not None:
        try:
            data = step(data)
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"it is no record of schema={data['schema']!r} ({what})") from error
    return data


def from_1_to_2(old: dict[str, Any]) -> dict[str, Any]:
    """Throughput becomes tokens over time: it was one over the median where the host fed each token back. Energy per
    token had prefill in it, the floor of several sequences assumed distinct experts, and a graph's kernels were counted
    in an eager step: all three are dropped."""
    new = old | {"schema": "moeexp.record/2", "joules_per_token": None}
    new |= dict.fromkeys(("process", "full_config", "identity", "stalls", "prefill_latencies_ms", "ttft_latencies_ms", "energy"))
    config, latencies, floor = old["config"], old["token_latencies_ms"], old.get("bytes_per_token")
    if config.get("cuda_graph"):
        new["kernels_per_token"] = None
    if floor:
        unknown = {"counted": False, "distinct_experts": None, "cache_bytes": None}
        new["bytes_per_token"] = floor | unknown if config["batch"] == 1 else None
    if old["decode_tok_s"] is not None:
        new["decode_tok_s"] = 1e3 * config["batch"] / latencies["mean"]
        new["stalls"] = _stalls(config, latencies)
    new["bandwidth_share"] = _bandwidth_share(new) if old.get("bandwidth_share") is not None else None
    if old.get("time_split") and latencies:
        new["time_split"] = _time_split(old["time_split"], latencies)
    medians = ["prefill_tok_s"] if old["prefill_tok_s"] is not None else []
    new["migrated"] = {"from": "moeexp.record/1", "medians": medians}
    return new


def _stalls(config: dict[str, Any], latencies: dict[str, Any]) -> dict[str, Any] | None:
    """Where the samples are whole and the generations' lengths are known: without an end-of-text all are equal."""
    samples, length = latencies["samples"], config["new_tokens"] - 1
    if config["eos"] is not False or length < 1 or len(samples) != latencies["n"] or len(samples) % length:
        return None
    ahead = config["loop_ahead"] if config["cuda_graph"] in ("loop", "all") else 1
    if not 1 <= ahead <= MOST_AHEAD:  # of no run
        return None
    return stalls.find(samples, [length] * (len(samples) // length), ahead, config["batch"])


def _bandwidth_share(record: dict[str, Any]) -> float | None:
    floor, batch = record["bytes_per_token"], record["config"]["batch"]
    if not floor or record["decode_tok_s"] is None or floor["total"] <= BEYOND_CACHES:
        return None
    return floor["total"] * record["decode_tok_s"] / batch / (1e9 * floor["read_bandwidth_gb_s"])


def _time_split(split: dict[str, Any], latencies: dict[str, Any]) -> dict[str, Any]:
    """A token's time was its median where its speed was; what is no work of the GPU's waits for the host."""
    wall = round(1e3 * latencies["mean"], 3)
    gpu = split["kernels_us"] + split["copies_us"] + split["gaps_us"]
    return split | {"wall_us": wall, "host_us": round(max(0.0, wall - gpu), 3)}


def from_2_to_3(old: dict[str, Any]) -> dict[str, Any]:
    """Names alone changed."""
    return renamed.record(old) | {"schema": "moeexp.record/3"}


STEPS: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "moeexp.record/1": from_1_to_2,
    "moeexp.record/2": from_2_to_3,
}
