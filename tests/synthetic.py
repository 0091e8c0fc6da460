"""Records with the real schema and made-up figures, for the tests of reports."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.record.record import Record, latency_summary, plain

ENVIRONMENT = {
    "python": "3.12.3",
    "versions": {"moeexp": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
    "cuda": "13.0",
    "cpu": {"name": "a CPU", "cores": 16, "torch_threads": 16},
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.159.04"},
    "gpu_before": {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 120.0, "power_limit_w": 700.0, "temperature_c": 39},
    "gpu_after": {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 450.0, "power_limit_w": 700.0, "temperature_c": 52},
}
TIME_SPLIT = {
    "wall_us": 300.0, "kernels_us": 210.0, "copies_us": 5.0, "gaps_us": 25.0, "host_us": 60.0, "kernels": 64,
    "by_kernel": [{"name": "moe_gate_up<int4>", "calls": 40, "us": 90.0}, {"name": "gdn_decode", "calls": 30, "us": 60.0}],
}  # fmt: skip

TELEMETRY = {
    "kind": "cuda", "n": 3, "interval_s": 0.1, "throttle_reasons": {"software power cap": 0.333},
    "sm_mhz": {"min": 1410, "median": 1980, "max": 1980}, "power_w": {"min": 300.0, "median": 510.0, "max": 520.0},
    "samples": [{"t_s": 0.0, "sm_mhz": 1980, "power_w": 510.0, "reasons": 0}],
}  # fmt: skip


def stalls(count: int, ms_each: float, tok_s: float) -> dict[str, Any]:
    """As a record has them, of a run that would decode at `tok_s` without them."""
    return {
        "count": count, "total_ms": count * ms_each, "longest_ms": ms_each, "pace_ms": 1e3 / tok_s, "ahead": 1,
        "decode_tok_s": tok_s,
    }  # fmt: skip


@functools.cache
def config(overrides: tuple[str, ...]) -> str:
    return json.dumps(plain(resolve(compose(["model=nano", *overrides]), cuda_available=False)))


def record(
    *overrides: str,
    id: str = "ab.0",
    status: str = "ok",
    ms: float = 1.0,
    rounds: int = 5,
    samples: Sequence[float] | None = None,
    seed: int = 0,
    noise: float = 0.01,
    device: str = "cuda",
    **values: Any,
) -> dict[str, Any]:
    """A finished record whose tokens take about `ms` each, or exactly `samples`; other keys as in a record. `device` is
    what it says to have run on."""
    run = Record(Path("nowhere"), id=id, config=json.loads(config(overrides)), command=["python", "-m", "moeexp", "-m"])
    run.data["config"]["device"] = device
    environment = ENVIRONMENT if device == "cuda" else ENVIRONMENT | dict.fromkeys(("gpu", "gpu_before", "gpu_after"))
    run.set(overrides=list(overrides), random_weights=False, code_fingerprint="c0de", environment=environment)
    passed = status not in ("incorrect", "failed", "unsupported")
    tolerance = {"tolerance": "float32.logits", "value": 2e-6, "limit": 1e-4, "passed": passed, "where": "all"}
    parts = [{"name": "float32", "passed": passed, "tolerances": [tolerance]}]
    run.set(check={"passed": passed, "parts": parts, "failures": [] if passed else ["float32.logits at all"]})
    if samples is None:
        samples = ms * np.random.default_rng(seed).lognormal(0.0, noise, rounds * 40)
    run.latencies_ms = [float(sample) for sample in samples]
    run.set(
        decode_tok_s=1e3 * run.data["config"]["batch"] / float(np.mean(run.latencies_ms)),
        prefill_tok_s=9000.0,
        ttft_s=0.01,
        generated_ids=[[1, 2, 3]],
        bytes_per_token={"weights": 4_000_000, "total": 5_000_000, "read_bandwidth_gb_s": 3011.0},
        bandwidth_share=0.01,
        kernels_per_token=64,
        memory_gib={"weights": 10.0, "state": 0.5, "device_in_use": 14.0},
        phases_s={"weights": 1.0, "benchmark": 2.0},
    )
    run.write = lambda: None  # type: ignore[method-assign]  kept in memory
    run.finish(status, error=values.pop("error", None))
    run.data["started"] = values.pop("started", "2026-01-01T00:00:00+00:00")
    run.data["token_latencies_ms"] = latency_summary(run.latencies_ms) if run.latencies_ms else None
    return copy.deepcopy(run.data | values)  # what a test changes is its own


def refused(*overrides: str, id: str = "ab.0", message: str = "not here", **values: Any) -> dict[str, Any]:
    """As a sweep records a cell that may not run: the config as it was composed, no environment, nothing measured."""
    config = plain(compose(["model=nano", *overrides]))
    run = Record(Path("nowhere"), id=id, config=config, command=["python", "-m", "moeexp", "-m"], overrides=list(overrides))
    run.write = lambda: None  # type: ignore[method-assign]  kept in memory
    error = {"type": "ValueError", "message": message, "phase": None, "traceback": None}
    run.finish("unsupported", error=values.pop("error", error))
    run.data["started"] = "2026-01-01T00:00:00+00:00"
    return copy.deepcopy(run.data | values)  # what a test changes is its own


def load(cores: float, of: int = 16) -> dict[str, Any]:
    """The telemetry of a run beside which other processes kept so many cores busy."""
    return {"kind": "cpu", "n": 0, "other_load": {"cores": cores, "of": of}}


def grid(speeds: dict[tuple[str, ...], float], **values: Any) -> list[dict[str, Any]]:
    """{overrides: ms per token} -> records in that order."""
    return [
        record(*overrides, id=f"ab.{index}", ms=ms, seed=index, **values) for index, (overrides, ms) in enumerate(speeds.items())
    ]


def write(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    """As a sweep leaves them."""
    for index, one in enumerate(records):
        (folder / str(index)).mkdir(parents=True)
        (folder / str(index) / "record.json").write_text(json.dumps(one))
    return folder
