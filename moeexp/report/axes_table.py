"""The table of axes as Markdown, for docs/axes.md."""

from __future__ import annotations

from pathlib import Path

from omegaconf import MISSING, OmegaConf

from moeexp.config.axes import Setting
from moeexp.config.axes_text import TITLES, by_role, show, values_of
from moeexp.config.axis import ARTIFACT, COMPILE_KEY, CONTENTS, NOT, VALUE, WEIGHTS
from moeexp.config.schema import conf_dir
from moeexp.report.markup import Markdown, code, joined, markdown_table

HEADER = ["setting", "what it is", "values", "default", "part of", "where it is limited"]
IDENTITY = {VALUE: ["identity"], CONTENTS: ["identity (contents)"], NOT: []}


def table(results: Path) -> str:
    """A table for each role. `results` is what other blocks are made from."""
    return "\n".join(f"## {TITLES[role]}\n\n{markdown_table(HEADER, [_cells(row) for row in rows])}" for role, rows in by_role())


def _cells(row: Setting) -> list[str]:
    axis = row.axis
    values = values_of(row, code)
    group, _, op = row.path.partition(".")
    if group == "ops" and op not in ("", "default"):
        from moeexp_kernels.registry import OPS

        values = [code(name) for name in OPS[op]]
    where = [Markdown("no effect " + ", ".join(case.words for case in axis.no_effect))] if axis.no_effect else []
    where += [Markdown(f"{case.words} only {code(show(value))}") for case, value in axis.only.items()]
    part_of = [part for part in (WEIGHTS, ARTIFACT, COMPILE_KEY) if part in axis.part_of] + IDENTITY[axis.identity]
    return [code(row.path), Markdown(axis.help), joined(" · ", map(Markdown, values)), _default(row), ", ".join(part_of),
            joined("; ", where)]  # fmt: skip


def _default(row: Setting) -> str:
    if not row.is_group:
        return "" if row.default == MISSING else code(show(row.default))
    choices = OmegaConf.load(conf_dir() / "config.yaml").defaults
    chosen = [entry[row.path] for entry in choices if OmegaConf.is_dict(entry) and row.path in entry]
    return code(chosen[0]) if chosen else ""
