"""One table of launch parameters per GPU architecture: `tuned/<architecture>.json`, and `tuned/default.json` for the rest.

    lookup("gemv", "int4/12352x2048", arch)  ->  {"BLOCK_N": 16, "TILES": 1, "CACHE": ".cg", …}
    source("gemv", "int4/12352x2048", arch)  ->  "sm_90"

A key is a shape class, general parts first. A row serves every key that it begins: `int4` serves `int4/12352x2048` unless
that has a row of its own, and the row `""` serves all. The architecture's table is asked first, with all parts, then with
fewer; then the default table likewise. So a GPU without a table runs on the defaults, and on an unlisted shape every GPU
does. Nothing is measured at run time: `python -m moeexp_kernels.bench tune` measures and writes the architecture's table.

Kernels look rows up while their op is traced, so nothing here touches a tensor. On the CPU (Triton's interpreter) the
architecture is "cpu", which has no table, and CUDA is never asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[1] / "tuned"
DEFAULT = "default"
ABOUT = "_about"  # the one entry of a table that is no op: where its rows were measured

LaunchParameters = dict[str, Any]
OVERRIDES: dict[tuple[str, str], LaunchParameters] = {}  # empty but within `override`
ASKED: list[set[tuple[str, str]]] = []  # empty but within `asked`


@cache
def _cuda_architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """An H100 or H200 is "sm_90"; a device that is no CUDA device is "cpu"."""
    if device.type != "cuda":
        return device.type
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


def current_architecture() -> str:
    """That of the current CUDA device, or "cpu" where there is none."""
    return architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def table(name: str) -> dict[str, dict[str, LaunchParameters]]:
    """`tuned/<name>.json` as {op: {key: row}}; empty where there is no such file."""
    return {op: rows for op, rows in _contents(name).items() if op != ABOUT}


def provenance(name: str) -> dict[str, Any]:
    """What `tuned/<name>.json` says of itself; empty where there is no such file."""
    return _contents(name).get(ABOUT, {})


def _contents(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _prefixes(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


@cache
def _find(op: str, key: str, arch: str) -> tuple[str, str, LaunchParameters] | None:
    """(table's name, key of the row, row) that serves `key`, or None."""
    for name in (arch, DEFAULT):
        rows = table(name).get(op, {})
        for prefix in _prefixes(key):
            if prefix in rows:
                return name, prefix, rows[prefix]
    return None


def lookup(op: str, key: str, arch: str | None = None, *, rule: LaunchParameters | None = None) -> LaunchParameters:
    """The row that serves `key` of `op` on `arch` (None: the current device's). Not to be changed by the caller.

    rule: what the op computes itself for shapes without a row; without one a missing row is a `LookupError`."""
    for found_so_far in ASKED:
        found_so_far.add((op, key))
    for prefix in _prefixes(key) if OVERRIDES else ():
        if (op, prefix) in OVERRIDES:
            return OVERRIDES[op, prefix]
    found = _find(op, key, arch or current_architecture())
    if found is not None:
        return found[2]
    if rule is None:
        raise LookupError(f"no row of the tuning tables serves {op} {key!r} on {arch}; tuned/default.json must have one")
    return rule


def source(op: str, key: str, arch: str | None = None) -> str:
    """The table that `lookup` answers from: the architecture's name, or "default" (also for an op's own rule)."""
    found = _find(op, key, arch or current_architecture())
    return DEFAULT if found is None else found[0]


def sources(arch: str | None = None) -> dict[str, str]:
    """For a record: op -> the architecture's name where its table has rows of the op, else "default"."""
    arch = arch or current_architecture()
    return {op: arch if op in table(arch) else DEFAULT for op in sorted({*table(arch), *table(DEFAULT)})}


@contextmanager
def override(op: str, key: str, row: LaunchParameters) -> Iterator[None]:
    """Within, `row` serves `key` and the keys that it begins, before any table: for the tuner's candidates and for tests.
    Only ops that run eagerly see it; what is compiled already keeps its rows."""
    before = OVERRIDES.get((op, key))
    OVERRIDES[op, key] = row
    try:
        yield
    finally:
        del OVERRIDES[op, key]
        if before is not None:
            OVERRIDES[op, key] = before


@contextmanager
def asked() -> Iterator[set[tuple[str, str]]]:
    """A set that every (op, key) which is looked up within joins: what the calls in it run with."""
    found: set[tuple[str, str]] = set()
    ASKED.append(found)
    try:
        yield found
    finally:
        ASKED.remove(found)


def weight_class(bits: int) -> str:
    """First part of a key: how a weight is stored (bits 4, 8, 16 or 32)."""
    return {4: "int4", 8: "int8", 16: "plain16", 32: "plain32"}[bits]


def activation_class(dtype: torch.dtype) -> str:
    """Part of a key: "half" for 2-byte activations, "single" for float32."""
    return "single" if dtype == torch.float32 else "half"


def write_table(name: str, tables: dict[str, dict[str, LaunchParameters]], about: dict[str, Any]) -> Path:
    """Writes `tuned/<name>.json`, a row a line, and forgets what was read before."""
    lines = [f'  "{ABOUT}": {json.dumps(about)}']
    for op, rows in sorted(tables.items()):
        inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
        lines.append(f"  {json.dumps(op)}: {{\n{inner}\n  }}")
    path = FOLDER / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(path)
    forget()
    return path


def forget() -> None:
    """What was read of tables: they are read again where FOLDER or a file in it has changed."""
    table.cache_clear()
    _find.cache_clear()
