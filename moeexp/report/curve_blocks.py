"""Blocks of figures by one number: the length of the prompt, for how fast it is taken in and how fast decoding goes on behind
it; the tokens of a step; and of other models of the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeexp_runner.pieces import pieces

from moeexp.report.format import number, percent
from moeexp.report.markup import code, escaped, markdown_table
from moeexp.report.records import cell_of, load_records

LONG = "long_prompts_qwen3_5_35b_a3b_int4_h200"
VERIFY = "verify_qwen3_5_35b_a3b_int4_h200"
FAMILY = "family_qwen3_5_122b_a10b_int4_h200"
COMMON: dict[str, Callable[[dict[str, Any]], str]] = {
    "device memory, GiB": lambda record: number(record["memory_gib"].get("device_in_use")),
    "check": lambda record: "off" if record["check"] is None else "passed" if record["check"]["passed"] else "failed",
}
PART = (
    " The check of {named} tokens compared the logits of the last {kept} of them and of the new ones; of those before, expert "
    "choices and what they left in the state."
)


def prefill_by_prompt(results: Path) -> str:
    """The cells `prompt …` of `experiment=fullsize`; nothing until one was measured."""
    columns = {
        "prompt tokens": lambda record: number(record["config"]["prompt_len"]),
        "calls of prefill": lambda record: number(_calls(record["config"])),
        "a graph": lambda record: "yes" if record["config"]["cuda_graph"] == "all" else "no",
        "prefill tok/s": lambda record: number(record["prefill_tok_s"]),
        "time to first token, s": lambda record: number(record["ttft_s"]),
    }
    return _curve(results, "prompt", columns | COMMON)


def decode_by_depth(results: Path) -> str:
    """The cells `depth …`, likewise."""
    columns = {
        "tokens before": lambda record: number(record["config"]["prompt_len"]),
        "their prefill, tok/s": lambda record: number(record["prefill_tok_s"]),
        "decode tok/s": lambda record: number(record["decode_tok_s"]),
        "ms per token, p50": lambda record: number((record["token_latencies_ms"] or {}).get("p50")),
        "of the measured read bandwidth": lambda record: percent(record["bandwidth_share"]),
    }
    return _curve(results, "depth", columns | COMMON)


def verify_steps(results: Path) -> str:
    """The cells `verify …`, which took turns in one process; nothing until they were measured."""
    folder = results / VERIFY
    records = [record for record in load_records([folder]) if record["verify"]] if folder.exists() else []
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tokens of a step": lambda record: number(record["verify"]["tokens"]),
        "ms": lambda record: number(record["verify"]["step_ms"]),
        "decode steps": lambda record: number(record["verify"]["decode_steps"]),
        "decode tok/s": lambda record: number(record["decode_tok_s"]),
        "of the measured read bandwidth": lambda record: percent(record["bandwidth_share"]),
        "check": COMMON["check"],
    }
    records = sorted(records, key=lambda record: record["verify"]["tokens"])
    table = _table(records, columns, "in turns in one process")
    return table + of_a_later_group(records, "tokens", lambda record: record["verify"]["tokens"])


def family(results: Path) -> str:
    """Models of the family beside the one that all other figures are of, a run each; nothing until one was measured."""
    records = load_records([results / FAMILY]) if (results / FAMILY).exists() else []
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "model": lambda record: code(f"model={record['config']['model']['name']}"),
        "decode tok/s": lambda record: number(record["decode_tok_s"]),
        "ms per token, p50": lambda record: number((record["token_latencies_ms"] or {}).get("p50")),
        "of the measured read bandwidth": lambda record: percent(record["bandwidth_share"]),
        "GB a step": lambda record: number(record["bytes_per_token"]["total"] / 1e9),
        "weights, GiB": lambda record: number(record["memory_gib"]["weights"]),
        "weights made and quantised, s": lambda record: number(record["phases_s"]["weights"]),
    }
    return _table(records, columns | COMMON)


def gpus_of(records: Sequence[dict[str, Any]]) -> str:
    """What follows `one`: the name of their GPU, or of each where they are of several."""
    return " or one ".join(dict.fromkeys(record["environment"]["gpu"]["name"] for record in records))


def of_a_later_group(records: Sequence[dict[str, Any]], noun: str, count: Callable[[dict[str, Any]], int]) -> str:
    """Names the runs, each by how many of `noun` it has, that took turns with others than the rest did."""
    groups = {(record["group"] or {}).get("id"): record["started"] for record in reversed(records)}
    first = min(groups, key=lambda group: groups[group], default=None)
    later = [number(count(record)) for record in records if (record["group"] or {}).get("id") != first]
    return f" Those of {_listed(later)} {noun} took theirs in another process, later." if later else ""


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _calls(config: dict[str, Any]) -> int:
    return pieces(config["prompt_len"], config["prefill_chunk"])


def _curve(results: Path, kind: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    folder = results / LONG
    found: Sequence[dict[str, Any]] = load_records([folder]) if folder.exists() else []
    found = [record for record in found if (cell_of(record) or "").startswith(kind) and record["status"] == "ok"]
    found = sorted(found, key=lambda record: record["config"]["prompt_len"])
    return _table(found, columns) + _of_the_last(found)


def _of_the_last(found: Sequence[dict[str, Any]]) -> str:
    """Names the prompts of which not all logits were compared."""
    part = [record["config"] for record in found if record["check"] and record["config"].get("check_logits")]
    if not part:
        return ""
    kept = list(dict.fromkeys(number(config["check_logits"]) for config in part))
    return PART.format(named=_listed([number(config["prompt_len"]) for config in part]), kept=_listed(kept))


def _table(
    found: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], Any]], how: str = "in a process of its own"
) -> str:  # fmt: skip
    if not found:
        return ""
    table = markdown_table(list(columns), [[value(record) for value in columns.values()] for record in found])
    # A record does not tell which GPU of its kind it ran on.
    text = f"{table}\nEach on one {escaped(gpus_of(found))}, {how}."
    unchecked = any(record["check"] is None for record in found)
    return text + " Where the check is off, a run shows that it fits, and publishes no speed." * unchecked
