"""Markdown of texts that anyone may have written. A text becomes Markdown here or not at all: `Markdown` is what is made by
these functions or written in our sources, and every other text is escaped where it is put into a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moeexp.record.text import one_line, visible

# What is markup within a line: links need a `]` with something after it, an underscore within a word is none.
ESCAPES = (
    (re.compile(r"[\\`*|~]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])"), r"\\\g<0>"),
    (re.compile(r"&(?=#?\w+;)"), "&amp;"),
    (re.compile("<"), "&lt;"),
)
# At the start of a line; a number with a dot only where a blank or nothing follows: a run's id may be 152612.3.
BLOCK = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[-#>+=]))(.)")
PIPE = re.compile(r"(?<!\\)\|")  # which ends a cell also within code


class Markdown(str):
    """Markup already."""


def escaped(text: str) -> Markdown:
    """Within a line."""
    if isinstance(text, Markdown):
        return text
    line = one_line(text)
    for pattern, replacement in ESCAPES:
        line = pattern.sub(replacement, line)
    return Markdown(line)


def line(text: str) -> Markdown:
    """A line of its own, which is no heading, list or quotation."""
    return text if isinstance(text, Markdown) else Markdown(BLOCK.sub(r"\1\\\2", escaped(text)))


def code(text: str) -> Markdown:
    """Between more backticks than any that it has in a row."""
    shown = one_line(text)
    ticks = "`" * (_longest(shown) + 1)
    space = " " * ("`" in shown[:1] + shown[-1:] or not shown)
    return Markdown(f"{ticks}{space}{shown}{space}{ticks}")


def fenced(lines: Sequence[str]) -> Markdown:
    """A block of plain text."""
    shown = [visible(one) for one in lines]
    fence = "`" * max(3, *(_longest(one) + 1 for one in shown))
    return Markdown("\n".join((f"{fence}text", *shown, fence)) + "\n")


def joined(separator: str, parts: Iterable[str]) -> Markdown:
    return Markdown(separator.join(map(escaped, parts)))


def listed(lines: Iterable[str]) -> Markdown:
    return Markdown("".join(f"- {line(one)}\n" for one in lines))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], figures: int = 0) -> Markdown:
    """`figures`: how many of the last columns are numbers."""
    rule = [Markdown(":--")] * (len(header) - figures) + [Markdown("--:")] * figures
    cells = ([PIPE.sub(r"\\|", escaped(cell)) for cell in one] for one in (header, rule, *rows))
    return Markdown("".join("| " + " | ".join(one) + " |\n" for one in cells))


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
