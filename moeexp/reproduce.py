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
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from moeexp import schema
from moeexp.arguments import Parser
from moeexp.composition_error import explain
from moeexp.conditions import LOAD, unlike
from moeexp.markdown_report import times
from moeexp.record import full_config, plain
from moeexp.report import percent, read_published
from moeexp.runs import GROUPS, HOUSEKEEPING
from moeexp.statistics import RUN_TO_RUN, ratio, speed_of
from moeexp.streams import fitted

AGREES, DIFFERS, INVALID = 0, 1, 2
LONGEST_ARGUMENT = 128_000  # bytes; Linux takes 131,071
STDERR = 2  # what the run prints is not the answer
# Housekeeping that decides what is published, and from how much.
RUN_AS_IT_WAS = ("check", "repeats", "eval_bytes", "min_samples", "min_time_s", "artifact")
# On other hardware, or where others used it too, a speed is not judged at all.
HARDWARE = ("GPU", "CPU", "CPU cores", "CPU threads", "power limit (W)", "throttled by", "other processes on the GPU", LOAD)


def command_of(record: dict[str, Any]) -> str:
    """A command line that runs this config, whatever sweep or recipe it came from. `ValueError` as `arguments_of`."""
    return shlex.join(["python", "-m", "moeexp", *arguments_of(record)])


def arguments_of(record: dict[str, Any]) -> list[str]:
    """The arguments that turn the defaults into this record's config, with the user's own config folder if it had one.

    `ValueError` for a config of which a group no longer exists."""
    own = _config_dir(record["command"])
    return (["--config-dir", own] if own else []) + overrides_of(record["config"], own)


def _config_dir(command: Sequence[str]) -> str | None:
    for flag, value in zip(command, [*command[1:], ""], strict=True):
        if flag in ("--config-dir", "-cd"):
            return value
        if flag.startswith("--config-dir="):
            return flag.partition("=")[2]
    return None


def overrides_of(config: dict[str, Any], config_dir: str | None = None) -> list[str]:
    """Overrides alone. Housekeeping is left out."""
    chosen = {group: config[group]["name"] for group in GROUPS} | {"ops": config["ops"]["default"]}
    defaults = _defaults()
    search = (f"hydra.searchpath=[{_hydra('file://' + str(Path(config_dir).absolute()))}]",) if config_dir else ()
    groups = {group: name for group, name in chosen.items() if name != defaults[group]}
    composed = _composed(tuple(f"{group}={name}" for group, name in chosen.items()) + search)
    overrides = [f"{group}={name}" for group, name in groups.items()]
    for key, value in config.items():
        if key not in HOUSEKEEPING or key in RUN_AS_IT_WAS:
            overrides += _differences(key, composed.get(key), value)
    return overrides


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    try:
        return plain(schema.compose(overrides))
    except Exception as error:  # Hydra's errors share no base with ours
        raise ValueError(f"the record's config no longer composes: {explain(error)}") from error


@cache
def _defaults() -> dict[str, str]:
    config = _composed(())
    return {group: config[group]["name"] for group in GROUPS} | {"ops": config["ops"]["default"]}


def _differences(key: str, default: Any, value: Any) -> list[str]:
    if default == value or key == "model.architecture":
        return []  # shapes follow from the model's name or its snapshot; as resolved they have other names
    if isinstance(default, dict) and isinstance(value, dict):
        return [one for name, item in value.items() for one in _differences(f"{key}.{name}", default.get(name), item)]
    if (key, default, value) in DERIVED:
        return []
    return [f"{key}={_hydra(value)}"]


# What resolving alone makes of a default, given in neither command.
DERIVED = [("cuda_graph", True, "decode")]


def _hydra(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if value and all(c.isalnum() or c in "_-./:" for c in value) and value[0].isalpha() and value.lower() not in WORDS:
        return value
    return QuotedString(value, Quote.double).with_quotes()


WORDS = ("null", "true", "false", "yes", "no", "on", "off", "nan", "inf")


def find(path: Path) -> Path:
    """A record, or the record of a run's folder."""
    file = path / "record.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no record: give a record.json or the folder of one run")
    return file


def run_again(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs the record's config in a process of its own. `RuntimeError` if that left no record."""
    overrides = [*arguments_of(record), "tracker.mode=disabled", f"hydra.run.dir={_hydra(str(folder))}"]
    longest = max(overrides, key=len)
    if len(longest.encode()) > LONGEST_ARGUMENT:
        key = longest.partition("=")[0]
        raise ValueError(f"{key} has {len(longest)} characters, more than a command line can hold: it is in the record's config")
    print("$ " + shlex.join(["python", "-m", "moeexp", *overrides]), file=sys.stderr)
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
    parser = Parser(prog="python -m moeexp.reproduce", description="Run a record again and say whether it agrees.")
    parser.add_argument("record", metavar="RECORD", type=Path, help="a record.json, or the folder of one run")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the new run's folder; default: outputs/reproduce/…")
    default = f"{RUN_TO_RUN['cpu']} on a CPU, {RUN_TO_RUN['cuda']} on a GPU and more as far as it waits for the host"
    parser.add_argument("--tolerance", type=float, help=f"run-to-run noise in the speed ratio; default {default}")
    try:
        options = parser.parse_args(arguments)
        if options.tolerance is not None and not options.tolerance >= 0:
            raise ValueError(f"--tolerance {options.tolerance} is not a part of a ratio: give 0 or more")
        path = find(options.record)
        old = read_published(path)
        old["config"] = full_config(old, path)
        stamp = f"{datetime.now():%Y-%m-%d-%H-%M-%S}-{secrets.token_hex(3)}"
        folder = options.out or Path("outputs") / "reproduce" / stamp
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty: give a new folder")
        new = run_again(old, folder)
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(fitted(f"error: {error}"), file=sys.stderr)
        return INVALID
    agree, lines = judge(old, new, tolerance=options.tolerance)
    print("\n".join(lines))
    print(f"{'it agrees' if agree else 'it does NOT agree'}; record {os.path.relpath(folder / 'record.json')}")
    return AGREES if agree else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
