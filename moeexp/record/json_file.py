"""A JSON file that may be anyone's: bounded in size and depth, strict in its numbers and keys, and never waited for."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from moeexp.record.text import brief

MAX_BYTES = 8_000_000
MAX_DEPTH = 32
MAX_INT = 10**100  # beyond it a number cannot be shown


def read_bytes(path: Path, most: int) -> bytes:
    """At most the first `most` bytes. `ValueError` for what is no regular file, which could keep a reader waiting, or cannot
    be read; `FileNotFoundError` where nothing is."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{path} is no regular file: remove it")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(most)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): mend or remove it") from error


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """What the file holds. `ValueError` (one line) for anything but strict JSON of sane size, `FileNotFoundError`."""
    data = read_bytes(path, most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, and no record has: remove it")
    try:
        return parsed(data)
    except ValueError as error:
        raise ValueError(f"{path} is {error}: remove it, or run again") from error


def parsed(data: bytes, *, constants: bool = False) -> Any:
    """`ValueError` for anything but strict JSON in UTF-8: "not UTF-8", "nested deeper than …". `constants`: NaN and Infinity
    are let through, for who can name what they stand in the place of."""
    try:
        refuse = None if constants else _refuse
        found = json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=_table)
        _check_values(found, constants)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # JSON's, UTF-8's and our own
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON that is read here ({error})"
        raise ValueError(what) from error
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"the key {brief(twice)} comes twice in one table")
    return table


def _check_values(data: Any, constants: bool) -> None:
    """Without recursion, as the depth is what it looks at."""
    waiting: list[tuple[str, Any, int]] = [("", [data], 0)]
    while waiting:
        where, container, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RecursionError
        for key, value in container.items() if type(container) is dict else enumerate(container):
            kind = type(value)
            if kind is dict or kind is list:
                waiting.append((f"{where}.{key}" if depth else "", value, depth + 1))
            elif (kind is float and not (constants or math.isfinite(value))) or (kind is int and not -MAX_INT < value < MAX_INT):
                raise ValueError(f"{where}.{key} is {brief(value)}, beyond what a number can be".removeprefix("."))
