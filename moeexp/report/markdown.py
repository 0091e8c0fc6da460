"""Records as Markdown, for a pull request: the runs, the tables that are made of them, what is not comparable."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from moeexp.report import table
from moeexp.report.conditions import odd_ones
from moeexp.report.markup import Markdown, code, escaped, fenced, line, listed, markdown_table
from moeexp.report.runs import runs_of
from moeexp.report.tables import TABLES, Table


def document(records: Sequence[dict[str, Any]]) -> str:
    runs = runs_of(records)
    commands = dict.fromkeys(shlex.join(record["command"]) for record in records)
    head = "".join(f"{'- ' * (len(commands) > 1)}{code(command)}\n" for command in commands)
    made = [_section(title, one) for title, tables in TABLES.items() for one in tables(runs)]
    return "\n".join(part for part in (head, table.markdown(records), *made, _unlike(records)) if part)


def _section(title: str, of: Table) -> str:
    bars = f"{fenced(of.bars)}\n" if of.bars else ""
    notes = "".join(f"\n{line(note)}\n" for note in of.notes if note)
    return Markdown(f"### {title}{', ' * bool(of.of)}{escaped(of.of)}\n\n{bars}{markdown_table(of.header, of.rows)}{notes}")


def _unlike(records: Sequence[dict[str, Any]]) -> str:
    lines = odd_ones(records)
    return f"### Conditions\n\n{listed(lines)}" if lines else ""
