"""The table of axes in words, for `--help`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, get_args

from moeexp.config.axes import TABLE, Setting
from moeexp.config.axis import AXIS, ROLES
from moeexp.config.schema import conf_dir

TITLES = {role: role.capitalize() for role in ROLES} | {AXIS: "Axes"}
WIDTH, NAME = 124, 22  # of --help: of a line, and of a setting's name in it


def help_text() -> str:
    """Every setting with its values. For a template of Hydra's, in which `$` stands before a name."""
    lines = []
    for role, rows in by_role():
        lines += ["", f"== {TITLES[role]} =="]
        for row in rows:
            text = ": ".join(filter(None, (row.axis.help, " | ".join(values_of(row, str)))))
            head, *rest = textwrap.wrap(text.replace("`", ""), WIDTH - NAME, break_on_hyphens=False)
            lines += [f"{row.path:<{NAME - 1}} {head}", *(" " * NAME + line for line in rest)]
    return "\n".join(lines[1:]).replace("$", "$$")


def show(value: Any) -> str:
    """As one writes it in an override."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(show, value)) + "]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def by_role() -> Iterator[tuple[str, list[Setting]]]:
    """A group's name is not listed beside the group, whose choices say it, unless its values are limited."""
    for role in ROLES:
        rows = [row for row in TABLE.values() if row.axis.role == role and not _is_name(row)]
        yield role, rows


def _is_name(row: Setting) -> bool:
    group, dot, name = row.path.partition(".")
    return bool(dot) and TABLE[group].axis.label == name and not row.axis.values


def values_of(row: Setting, mark: Callable[[str], str]) -> list[str]:
    """Each value with its meaning, named ones as `mark` writes them; empty where any of the type is one."""
    axis = row.axis
    named = [mark(show(value)) + (f" ({meaning})" if meaning else "") for value, meaning in axis.values.items()]
    others = [axis.others] if axis.others else []
    if row.is_group:
        return [mark(path.stem) for path in sorted((conf_dir() / row.path).glob("*.yaml"))]
    if row.kind is bool:
        return [mark("true"), mark("false")]
    kinds = get_args(row.kind) or (row.kind,)
    if axis.least is not None and {int, float} & set(kinds):
        others = [f"a number, {show(axis.least)} to {show(axis.most)}"]
    return named + others
