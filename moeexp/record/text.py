"""Texts that anyone may have written, made fit to be shown: nothing in them acts on a terminal or reorders a line."""

from __future__ import annotations

import re
from typing import Any

# Controls (escape sequences begin with one), marks that turn the direction of writing, separators of lines, halves of
# characters, and tags, which nobody sees.
ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]")
SHOWN = 60
MAX_OVERRIDES = 1000  # of a run: each is of another setting, and there are not as many


def visible(text: str, *, lines: bool = False) -> str:
    """What acts is spelled, as `\\x1b`. `lines`: those and tabs stay."""

    def spelled(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        return ascii(character)[1:-1]

    return ACTING.sub(spelled, text)


def one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def brief(value: Any) -> str:
    """A value in an error: short, on one line."""
    if isinstance(value, (dict, list)):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 1 << 64:
        return f"a number of {value.bit_length()} bits"
    text = visible(repr(value[: SHOWN + 1] if isinstance(value, str) else value))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
