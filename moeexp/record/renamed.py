"""Names of earlier versions: refused where a user writes them, read in a record of an earlier schema as what they are called now.
What has no name any more stays in a record as it is.

A record of schema 2 differs from one of schema 3 in these names alone. It may be damaged: what is no table or list stays as
it is, for its shape to be refused. Where both names are given, the old one stays too, and is refused as unknown."""

from __future__ import annotations

import re
from typing import Any

from moeexp.record.text import visible

SETTINGS = {"overlap": "pdl"}
# Settings that are no more -> why. All could be on or off; off is what every run is now.
GONE = {"l2_prefetch": "it showed no gain (docs/log.md)"}
TOLERANCES = {"tokens.deficit": "tokens.logit_margin"}
# Of the designs that ship with moeexp.
CELLS = {
    "kernels start early": "pdl",
    "experts choose for themselves": "router fused into the expert kernels",
    "projection norms for itself": "gated RMSNorm fused into out_proj",
}
OVERRIDE = re.compile(r"([+~]{0,2})(\w+)(=.*)?", re.DOTALL)


def refuse_old(override: str) -> None:
    """`ValueError` for the override of a setting that has another name now, or is gone."""
    match = OVERRIDE.fullmatch(override)
    if match is not None and is_old(match[2]) and (match[3] or match[1]):
        raise ValueError(said(match[2], visible(match[3] or "=…")))


def refuse_gone(config: dict[str, Any]) -> None:
    """`ValueError` for a record's config in which a setting is on that is gone."""
    for name in GONE:
        if config.get(name):
            raise ValueError(f"the record's {said(name)}")


def is_old(name: str) -> bool:
    return name in SETTINGS or name in GONE


def said(name: str, value: str = "") -> str:
    """The one line of a refusal. `value`: what was set, as `=true`."""
    if name in GONE:
        return f"{name} was removed: {GONE[name]}; leave it out"
    return f"{name} is now named {SETTINGS[name]}: write {SETTINGS[name]}{value if len(value) <= 60 else '=…'}"


def config(found: Any) -> Any:
    """A record's config."""
    found = _keys(found, SETTINGS)
    launcher = _table(found).get("launcher")
    if isinstance(launcher, dict):
        cells = [
            cell | {"set": _words(cell.get("set"))} if isinstance(cell, dict) else cell for cell in _list(launcher.get("cells"))
        ]
        found = found | {"launcher": launcher | ({"cells": cells} if cells else {})}
    return found


def record(found: dict[str, Any]) -> dict[str, Any]:
    """All of it but its schema."""
    design, ops = found.get("design"), found.get("ops")
    new = {"config": config(found.get("config")), "ops": _keys(ops, {"early_starts": "pdl_edges"})}
    new |= {key: _words(found.get(key)) for key in ("command", "overrides")}
    new["not_applicable"] = _values(found.get("not_applicable"), SETTINGS)
    new["check"] = _check(found.get("check"))
    if isinstance(design, dict):
        new["design"] = design | {key: _values([design[key]], CELLS)[0] for key in ("cell",) if key in design}
    return found | {key: value for key, value in new.items() if key in found}


def _check(check: Any) -> Any:
    if not isinstance(check, dict):
        return check
    check = _keys(check, {"apart": "first_divergence"})
    if isinstance(check.get("parts"), list):
        check["parts"] = [_part(part) for part in check["parts"]]
    if isinstance(check.get("failures"), list):
        check["failures"] = [_failure(line) for line in check["failures"]]
    return check


def _part(part: Any) -> Any:
    part = _keys(part, {"gates": "tolerances"})
    if isinstance(part, dict) and isinstance(part.get("tolerances"), list):
        rows = [_keys(row, {"gate": "tolerance"}) for row in part["tolerances"]]
        names = [_values([_table(row).get("tolerance")], TOLERANCES)[0] for row in rows]
        part["tolerances"] = [row | {"tolerance": name} if "tolerance" in _table(row) else row
                              for row, name in zip(rows, names, strict=True)]  # fmt: skip
    if isinstance(part, dict) and "report" in part:
        part["report"] = _keys(part["report"], {"largest_deficit": "largest_logit_margin"})
    return part


def _failure(line: Any) -> Any:
    """`part: tolerance at where: value > limit (what)`."""
    part, _, rest = line.partition(": ") if isinstance(line, str) else ("", "", "")
    name, _, more = rest.partition(" at ")
    return f"{part}: {TOLERANCES[name]} at {more}" if name in TOLERANCES else line


def _words(words: Any) -> Any:
    """Of a command line."""
    if not isinstance(words, list):
        return words
    found = []
    for word in words:
        match = OVERRIDE.fullmatch(word) if isinstance(word, str) else None
        known = match is not None and match[2] in SETTINGS and match[3] is not None
        found.append(f"{match[1]}{SETTINGS[match[2]]}{match[3]}" if match is not None and known else word)
    return found


def _keys(table: Any, names: dict[str, str]) -> Any:
    """A copy, in the same order."""
    if not isinstance(table, dict):
        return table
    return {names[key] if key in names and names[key] not in table else key: value for key, value in table.items()}


def _values(values: Any, names: dict[str, str]) -> Any:
    if not isinstance(values, list):
        return values
    return [names.get(value, value) if isinstance(value, str) else value for value in values]


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
