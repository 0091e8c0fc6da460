"""`python -m moeexp.compare A B`: what differs between two records, and which is faster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeexp.config.axes import KEPT_APART
from moeexp.config.errors import Parser, answered
from moeexp.record.text import one_line
from moeexp.report.conditions import conditions, differing
from moeexp.report.format import MEDIAN, MEDIAN_NOTE, number, percent
from moeexp.report.intervals import speed_of
from moeexp.report.ratios import LATE, times
from moeexp.report.records import find, is_median, read_published, why
from moeexp.report.runs import as_text, gain, runs_of, settings_text

TOP_KERNELS = 15
# Of a phase or a kernel, a change below this is noise that nobody looks for.
SMALL = 0.05
WIDE = 60  # characters of a column; what is longer stands out of it

Line = tuple[str, str, str]


def explain(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The whole comparison as text; only what differs is listed."""
    parts: dict[str, list[Line]] = {
        "config": _nested(a["config"], b["config"], skip=KEPT_APART),
        "conditions": _conditions(a, b),
        "environment": _nested(a["environment"] or {}, b["environment"] or {}, skip=("gpu_before", "gpu_after")),
        "ops": _nested(a["ops"] or {}, b["ops"] or {}),
        "check": _checks(a, b),
        "phases, seconds": _changed(a["phases_s"] or {}, b["phases_s"] or {}),
        "memory, GiB": _changed(a["memory_gib"] or {}, b["memory_gib"] or {}),
        "measured": _measured(a, b),
    }
    if a.get("time_split") or b.get("time_split"):
        parts |= {"time split, µs per token": _time_split(a, b), "kernels, µs per token": _kernels(a, b)}
    text = f"A  {_name(a)}\nB  {_name(b)}\n"
    for title, lines in parts.items():
        text += f"\n{title}" + ("\n" + _columns(lines) if lines else ": the same\n")
    marked = any(is_median(record, key) for record in (a, b) for key in MEASURED)
    return text + "\n" + verdict(a, b) + "\n" + f"{MEDIAN} {MEDIAN_NOTE}\n" * marked


def verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """One or two lines: B's speed over A's, its interval, and how far to trust it."""
    before, after = speed_of(a), speed_of(b)
    if before is None or after is None:
        silent = [name for name, speed in (("A", before), ("B", after)) if speed is None]
        return f"no speeds to compare: {' and '.join(silent)} publishes none"
    # Of a pair that differs in nothing the difference is the finding, not the noise that its repeats show.
    one, two = (replace(run, speed=speed) for run, speed in zip(runs_of([a, b]), (before, after), strict=True))
    found = gain(two, one)
    lines = [f"decode: B has {times(found, marked=False, beside=True)} of A's speed: {found.phrase}"]
    if found.doubt:
        lines.append(LATE)
    if one.workload != two.workload:
        lines.append(f"not the same work: A {settings_text(one.workload)}; B {settings_text(two.workload)}")
    if not found.in_turns:
        lines.append(f"not timed in turns: the interval allows for run-to-run noise of {percent(found.run_to_run)}")
    if found.weights:
        lines.append(f"the weights differ in quantisation ({found.weights}): the ratio is not the engine's alone")
    unlike = differing(a, b)
    if unlike:
        lines.append(f"unlike conditions ({', '.join(unlike)}): the ratio is not the settings' alone")
    return "\n".join(map(one_line, lines))


def _conditions(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    unlike = differing(a, b)
    left, right = ({name: conditions(one)[name] for name in unlike} for one in (a, b))
    return _flat(left, right)


def _name(record: dict[str, Any]) -> str:
    reason = f": {why(record)}" if record["status"] != "ok" else ""
    return one_line(f"{record['id']}, {record['status']}{reason}, started {record['started']}")


def _nested(a: dict[str, Any], b: dict[str, Any], skip: Sequence[str] = ()) -> list[Line]:
    left = dict(_leaves({key: value for key, value in a.items() if key not in skip}))
    right = dict(_leaves({key: value for key, value in b.items() if key not in skip}))
    return _flat(left, right)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _flat(left: dict[str, Any], right: dict[str, Any]) -> list[Line]:
    keys = dict.fromkeys([*left, *right])
    return [(key, _text(left, key), _text(right, key)) for key in keys if left.get(key) != right.get(key)]


def _text(values: dict[str, Any], key: str) -> str:
    return as_text(values[key]) if key in values else "–"


def _changed(left: dict[str, float], right: dict[str, float]) -> list[Line]:
    """Numbers that differ by more than SMALL of the larger."""
    lines = []
    for key in dict.fromkeys([*left, *right]):
        x, y = left.get(key), right.get(key)
        if x is None or y is None or abs(x - y) > SMALL * max(abs(x), abs(y)):
            lines.append((key, number(x), number(y)))
    return lines


def _checks(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """Verdicts, and each tolerance's value where it changed by more than SMALL."""
    left, right = _tolerances(a), _tolerances(b)
    verdicts = _flat({"passed": (a["check"] or {}).get("passed")}, {"passed": (b["check"] or {}).get("passed")})
    return verdicts + _changed(left, right)


def _tolerances(record: dict[str, Any]) -> dict[str, float]:
    parts = (record["check"] or {}).get("parts", [])
    rows = [row for part in parts for row in part["tolerances"]]
    # A value that is not finite is text in a record.
    return {row["tolerance"]: float(row["value"]) for row in rows if row["value"] is not None}


def _time_split(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    left, right = (
        {key: value for key, value in (record.get("time_split") or {}).items() if isinstance(value, (int, float))}
        for record in (a, b)
    )
    return _changed(left, right)


def _kernels(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """The kernels whose time changed most."""
    left, right = (
        {kernel["name"]: kernel["us"] for kernel in (record.get("time_split") or {}).get("by_kernel") or []} for record in (a, b)
    )
    lines = _changed(left, right)
    lines.sort(key=lambda line: -abs((left.get(line[0]) or 0.0) - (right.get(line[0]) or 0.0)))
    return lines[:TOP_KERNELS]


MEASURED = ("decode_tok_s", "prefill_tok_s", "ttft_s", "bits_per_byte", "bandwidth_share", "kernels_per_token",
            "joules_per_token")  # fmt: skip


# Of `stalls`, what is shown where a run had any.
STALLED = {"count": "how many", "total_ms": "ms in all", "longest_ms": "longest ms", "decode_tok_s": "tok/s without"}


def _figure(record: dict[str, Any], key: str) -> str:
    return number(record[key]) + MEDIAN * is_median(record, key)


def _measured(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    lines = [(key, _figure(a, key), _figure(b, key)) for key in MEASURED if a[key] is not None or b[key] is not None]
    left, right = a["stalls"] or {}, b["stalls"] or {}
    if left.get("count") or right.get("count"):
        lines += [(f"stalls: {name}", number(left.get(key)), number(right.get(key))) for key, name in STALLED.items()]
    left, right = a["token_latencies_ms"] or {}, b["token_latencies_ms"] or {}
    if left or right:
        lines += [(f"{p} ms", number(left.get(p)), number(right.get(p))) for p in ("p50", "p90", "p99")]
    if a["generated_ids"] and b["generated_ids"]:
        same = "the same" if a["generated_ids"] == b["generated_ids"] else "other tokens"
        lines.append(("generated", "", same))
    return lines


def _columns(lines: Sequence[Line]) -> str:
    lines = [(one_line(key), one_line(x), one_line(y)) for key, x, y in lines]
    first, second = (min(WIDE, max(len(line[column]) for line in lines)) for column in (0, 1))
    return "".join(f"  {key:<{first}}  {x:<{second}}  {y}".rstrip() + "\n" for key, x, y in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m moeexp.compare", description="What differs between two records, and how much.")
    parser.add_argument("a", metavar="A", type=Path, help="a record.json, or the folder of one run")
    parser.add_argument("b", metavar="B", type=Path)
    options = parser.parse_args(arguments)
    print(explain(read_published(find(options.a)), read_published(find(options.b))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
