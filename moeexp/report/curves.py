"""Blocks of figures by the length of the prompt: how fast it is taken in, and how fast decoding goes on behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeexp_runner.pieces import pieces

from moeexp.report.format import number, percent
from moeexp.report.markup import escaped, markdown_table
from moeexp.report.records import cell_of, load_records

LONG = "long_prompts_qwen3_5_35b_a3b_int4_h200"
COMMON: dict[str, Callable[[dict[str, Any]], str]] = {
    "device memory, GiB": lambda record: number(record["memory_gib"].get("device_in_use")),
    "check": lambda record: "off" if record["check"] is None else "passed" if record["check"]["passed"] else "failed",
}


def prefill_by_prompt(results: Path) -> str:
    """The cells `prompt …` of `experiment=fullsize`; nothing until one was measured."""
    columns = {
        "prompt tokens": lambda record: number(record["config"]["prompt_len"]),
        "calls of prefill": lambda record: number(_calls(record["config"])),
        "prefill tok/s": lambda record: number(record["prefill_tok_s"]),
        "time to first token, s": lambda record: number(record["ttft_s"]),
    }
    return _curve(results, "prompt", columns | COMMON)


def decode_by_depth(results: Path) -> str:
    """The cells `depth …`, likewise."""
    columns = {
        "tokens before": lambda record: number(record["config"]["prompt_len"]),
        "decode tok/s": lambda record: number(record["decode_tok_s"]),
        "ms per token, p50": lambda record: number((record["token_latencies_ms"] or {}).get("p50")),
        "of the measured read bandwidth": lambda record: percent(record["bandwidth_share"]),
    }
    return _curve(results, "depth", columns | COMMON)


def gpus_of(records: Sequence[dict[str, Any]]) -> str:
    """What follows `one`: the name of their GPU, or of each where they are of several."""
    return " and one ".join(dict.fromkeys(record["environment"]["gpu"]["name"] for record in records))


def _calls(config: dict[str, Any]) -> int:
    return pieces(config["prompt_len"], config["prefill_chunk"])


def _curve(results: Path, kind: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    folder = results / LONG
    found: Sequence[dict[str, Any]] = load_records([folder]) if folder.exists() else []
    found = [record for record in found if (cell_of(record) or "").startswith(kind) and record["status"] == "ok"]
    if not found:
        return ""
    found.sort(key=lambda record: record["config"]["prompt_len"])
    table = markdown_table(list(columns), [[value(record) for value in columns.values()] for record in found])
    text = f"{table}\nOne {escaped(gpus_of(found))}, one process each."
    unchecked = any(record["check"] is None for record in found)
    return text + " Where the check is off, a run shows that it fits, and publishes no speed." * unchecked
