"""Hydra's composition errors in one line each."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from moeexp.config.axes import TABLE
from moeexp.record import renamed, streams
from moeexp.record.paths import expanded

HELP = "`python -m moeexp --help` lists groups and fields"


def explain(error: BaseException) -> str:
    """One line out of Hydra's several: what was wrong, what is allowed, what to do."""
    if isinstance(error, OverrideParseException):
        hint = """quote a value with special characters twice, as in 'prompt="1, 2"'"""
        return f"{error.override!r} is not of the form key=value that Hydra reads; {hint}"
    ambiguous = re.search(r"Ambiguous value for argument '(.+?)'\s", f"{error} ")
    if ambiguous:
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]!r} may be one value or several: -m sweeps over several, and '{key}=\"{value}\"' in quotes "
            "twice is one"
        )
    plugin = re.search(r"hydra_plugins\.hydra_(optuna|submitit|ray)_", str(error))
    if plugin and isinstance(error, (ImportError, RuntimeError)):
        return f"the Hydra plugin for {plugin[1]} is not installed here: pip install 'moeexp[{plugin[1]}]'"
    if not isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        return f"Hydra cannot read these arguments ({type(error).__name__}: {error}); {HELP}"
    text = str(error).split("Config search path")[0]
    missing_group = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':((?:\s+\S+)*)", text)
    if missing_group:
        choice, group, options = missing_group.groups()
        value = choice.removeprefix(f"{group}/")
        return f"{group}={value} is not a choice of {group}; allowed: {', '.join(options.split())}"
    in_file = re.search(r"(In '[^']+'): [\s\S]*Key '(\w+)' not in 'Config'", text)
    if in_file and renamed.is_old(in_file[2]):
        return f"{in_file[1]}: {renamed.said(in_file[2])}"
    unknown_key = re.search(r"Could not (?:override|append to config[^']*|append) '?\+?([\w./@]+)", text)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if unknown_key and "not in" in str(cause):
        return f"there is no setting {unknown_key[1]}{_suggestion(unknown_key[1])}; {HELP}"
    value = re.search(r"Value '?(.*?)'? of type '\w+' could not be converted to (\w+)", str(cause))
    if value and (key := getattr(cause, "full_key", None)):
        return f"{key}={value[1]} is not of type {value[2]}; {HELP}"
    if cause is not error:
        text += f"\n{cause}"
    noise = ("full_key", "object_type", "reference_type")
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise))


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, TABLE, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


class Parser(argparse.ArgumentParser):
    """`parse_args` raises `ValueError` where argparse would print its usage and exit. `type=Path` expands `~`."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.register("type", Path, _path)
        streams.prepare()

    def error(self, message: str) -> NoReturn:
        raise ValueError(streams.fitted(f"{message}; {self.prog} --help says what there is"))


def answered(command: Callable[[], int]) -> int:
    """The exit code of a command: its own, 2 with one line for what it was given, 130 for an interrupt."""
    try:
        return command()
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(streams.fitted(f"error: {error}"), file=sys.stderr)
        return 2


def _path(text: str) -> Path:
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
