"""`python -m moeexp.reproduce RECORD`: the run again, in a folder of its own, and whether it agrees.

0 it agrees, 1 it does not, 2 it cannot be run here.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from moeexp.config.errors import Parser, answered
from moeexp.config.recorded import LONGEST_ARGUMENT
from moeexp.record.record import full_config
from moeexp.record.text import visible
from moeexp.report.command_line import arguments_of, hydra_value
from moeexp.report.conditions import LOAD, unlike
from moeexp.report.format import percent
from moeexp.report.intervals import RUN_TO_RUN, ratio, speed_of
from moeexp.report.ratios import times
from moeexp.report.records import find, read_published

AGREES, DIFFERS, INVALID = 0, 1, 2
STDERR = 2  # what the run prints is not the answer
# On other hardware, or where others used it too, a speed is not judged at all.
HARDWARE = (
    "GPU",
    "CPU",
    "CPU cores",
    "CPU threads",
    "power limit (W)",
    "throttled by",
    "other processes on the GPU",
    LOAD,
)


def read(path: Path) -> dict[str, Any]:
    """The record at `path`, anyone's, with its whole config. `ValueError` (one line) for what is no whole record."""
    file = find(path)
    record = read_published(file)
    record["config"] = full_config(record, file)
    return record


def run_again(record: dict[str, Any], folder: Path, *, trust: bool = False) -> dict[str, Any]:
    """Runs the record's config in a process of its own. `ValueError` as `arguments_of`; `RuntimeError` if it left no record."""
    overrides = [
        *arguments_of(record, trust=trust),
        *["artifact_trust=true"] * (record["config"].get("artifact") is not None),  # named, and so trusted
        "tracker.mode=disabled",
        f"hydra.run.dir={hydra_value(str(folder))}",
    ]
    longest = max(overrides, key=len)
    if len(longest.encode()) > LONGEST_ARGUMENT:
        key = longest.partition("=")[0]
        raise ValueError(f"{key} has {len(longest)} characters, more than a command line can hold: it is in the record's config")
    print("$ " + visible(shlex.join(["python", "-m", "moeexp", *overrides]), lines=True), file=sys.stderr)
    code = subprocess.run([sys.executable, "-m", "moeexp", *overrides], stdout=STDERR).returncode
    if code == 130:
        raise KeyboardInterrupt
    again = folder / "record.json"
    if code == INVALID or not again.is_file():
        raise RuntimeError(f"it could not be run here (exit code {code}, see above)")
    return read_published(again)


def judge(old: dict[str, Any], new: dict[str, Any], *, tolerance: float | None = None) -> tuple[bool, list[str]]:
    """Whether the second run says what the first did, and a line for each thing compared.

    `tolerance`: the run-to-run noise to allow for, as a part of the speed ratio; None: that of the device."""
    differing = unlike(old, new)
    lines = [f"unlike conditions  {phrase}" for phrase in differing]
    same_status = old["status"] == new["status"]
    lines.append(_line("status", same_status, f"{old['status']} → {new['status']}"))
    same_ids = old["generated_ids"] == new["generated_ids"]
    if old["generated_ids"] and new["generated_ids"]:
        lines.append(_line("tokens", same_ids, _tokens(old["generated_ids"], new["generated_ids"])))
    agree = same_status and same_ids
    before, after = speed_of(old), speed_of(new)
    if before is None or after is None:
        if (before is None) != (after is None):
            lines.append(_line("decode speed", False, "only one of the two publishes one"))
            agree = False
        return agree, lines
    if tolerance is not None:
        before, after = (replace(speed, run_to_run=tolerance) for speed in (before, after))
    found = ratio(after, before)
    text = f"{before.tok_s:.4g} → {after.tok_s:.4g} tok/s, {times(found, marked=False)}, {found.phrase}"
    if any(phrase.partition(":")[0] in HARDWARE for phrase in differing):
        return agree, [*lines, f"{'decode speed':<18} {text}; not judged under unlike conditions"]
    # The second for runs too short to have an interval.
    near = found.verdict == "no difference" or abs(math.log(found.value)) <= math.log1p(found.run_to_run)
    return agree and near, [*lines, _line("decode speed", near, f"{text}; {percent(found.run_to_run)} allowed for")]


def _tokens(old: list[list[int]], new: list[list[int]]) -> str:
    for row, (a, b) in enumerate(zip(old, new, strict=False)):
        for index, (left, right) in enumerate(zip(a, b, strict=False)):
            if left != right:
                return f"row {row} differs from token {index} on: {left} → {right}"
    same = [len(row) for row in old] == [len(row) for row in new]
    return f"{sum(map(len, old))} equal" if same else "equal as far as both go; another number of them"


def _line(what: str, agrees: bool, text: str) -> str:
    return f"{what:<18} {'agrees' if agrees else 'DIFFERS'}  {text}"


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m moeexp.reproduce", description="Run a record again and say whether it agrees.")
    parser.add_argument("record", metavar="RECORD", type=Path, help="a record.json, or the folder of one run")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the new run's folder; default: outputs/reproduce/…")
    parser.add_argument("--trust", action="store_true", help="run code that the record names: ops, config files, an artifact")
    default = f"{RUN_TO_RUN['cpu']} on a CPU, {RUN_TO_RUN['cuda']} on a GPU and more as far as it waits for the host"
    parser.add_argument("--tolerance", type=float, help=f"run-to-run noise in the speed ratio; default {default}")
    options = parser.parse_args(arguments)
    if options.tolerance is not None and not options.tolerance >= 0:
        raise ValueError(f"--tolerance {options.tolerance} is not a part of a ratio: give 0 or more")
    old = read(options.record)
    stamp = f"{datetime.now():%Y-%m-%d-%H-%M-%S}-{secrets.token_hex(3)}"
    folder = options.out or Path("outputs") / "reproduce" / stamp
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty: give a new folder")
    new = run_again(old, folder, trust=options.trust)
    agree, lines = judge(old, new, tolerance=options.tolerance)
    print("\n".join(map(visible, lines)))
    print(f"{'it agrees' if agree else 'it does NOT agree'}; record {os.path.relpath(folder / 'record.json')}")
    return AGREES if agree else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
