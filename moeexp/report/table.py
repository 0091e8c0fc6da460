"""The table of runs in Markdown, with its notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeexp.record.streams import fitted
from moeexp.report.conditions import group_name
from moeexp.report.format import (
    APART,
    MEDIAN,
    MEDIAN_NOTE,
    NONE,
    RANDOM,
    RANDOM_WEIGHTS,
    STALLS,
    WEIGHTS,
    is_marked,
    number,
    stalls_text,
)
from moeexp.report.markup import listed, markdown_table
from moeexp.report.records import cell_of, is_median, setting, varying, why

MEASURED = ("decode tok/s", "prefill tok/s", "TTFT ms", "bits/byte", "peak GiB")


def verify_text(record: dict[str, Any]) -> str:
    """A step of several tokens: how long, in how many decode steps."""
    if not (verify := record["verify"]):
        return "–"
    return f"{verify['tokens']}: {number(verify['step_ms'])}, {number(verify['decode_steps'])}"


MORE = {"tokens of a step: ms, decode steps": verify_text, STALLS: stalls_text}


def table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what differs between the configs, then what was measured."""
    cells = [cell_of(record) for record in records]
    # The cells of a design have names, which say more in less room than what each sets.
    named, unique = all(cells), len(set(cells)) == len(cells)
    axes = [] if named and unique else varying(records)
    first = (["cell"] if named else []) + axes
    # Of these a table speaks where a run had any.
    more = {name: text for name, text in MORE.items() if any(text(record) not in ("–", NONE) for record in records)}
    header = [*(first or ["run"]), "status", *MEASURED, *more]
    settings = [
        ([str(cell)] if named else []) + [setting(record, axis) for axis in axes] or [record["id"]]
        for cell, record in zip(cells, records, strict=True)
    ]
    marks = [APART * apart + WEIGHTS * bool(weights) for apart, weights in _against_first(records)]
    return header, [
        [*chosen, *_results(record, mark), *(text(record) for text in more.values())]
        for chosen, record, mark in zip(settings, records, marks, strict=True)
    ]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    header, rows = table(records)
    text, notes = markdown_table(header, rows, len(header) - header.index(MEASURED[0])), footnotes(records)
    return text + ("\n" + listed(notes) if notes else "")


def footnotes(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the table's marks mean, and why each run that is not ok is not; each a line of a length that a terminal and a log can
    hold, as a run's record has the whole."""
    notes = [f"{RANDOM} {RANDOM_WEIGHTS}"] if any(is_marked(record) for record in records) else []
    if any(is_median(record, "prefill_tok_s") for record in records):
        notes.append(f"{MEDIAN} {MEDIAN_NOTE}")
    against = _against_first(records)
    if any(apart for apart, _ in against):
        notes.append(f"{APART} not timed in turns with the first run: run-to-run noise is part of what lies between them")
    unlike = "; ".join(dict.fromkeys(weights for _, weights in against if weights))
    if unlike:
        notes.append(f"{WEIGHTS} not of the first run's quantisation, which is part of what lies between them: {unlike}")
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            name = f"{cell_of(record)} ({record['id']})" if cell_of(record) else record["id"]
            reasons.setdefault(f"{record['status']}: {why(record) or 'no reason recorded'}", []).append(name)
    notes += [f"{', '.join(names)} {reason}" for reason, names in reasons.items()]
    return [fitted(note) for note in notes]


def _against_first(records: Sequence[dict[str, Any]]) -> list[tuple[bool, str]]:
    """Of each: whether it took no turns with the first run of its workload, which is what a reader holds it against, and
    how its weights differ from that one's."""
    from moeexp.config.axes import WORK
    from moeexp.report.runs import machine, unlike_weights

    first: dict[tuple, dict[str, Any]] = {}
    found = []
    for record in records:
        if record["decode_tok_s"] is None:
            found.append((False, ""))
            continue
        work = (machine(record), *(str(record["config"].get(key)) for key in WORK))
        base, group = first.setdefault(work, record), group_name(record)
        apart = record is not base and (group is None or group != group_name(base))
        found.append((apart, unlike_weights(record, base)))
    return found


def _results(record: dict[str, Any], marks: str) -> list[str]:
    memory, ttft = record["memory_gib"] or {}, record["ttft_s"]
    mark = RANDOM if is_marked(record) else ""
    return [
        record["status"],
        number(record["decode_tok_s"]) + mark + marks,
        number(record["prefill_tok_s"]) + MEDIAN * is_median(record, "prefill_tok_s"),
        number(None if ttft is None else 1e3 * ttft),
        number(record["bits_per_byte"]),
        number(memory.get("peak_allocated", memory.get("peak_host"))),
    ]
