"""What is printed: on streams of any encoding, and in lines that a terminal and a log can hold."""

from __future__ import annotations

import codecs
import io
import sys

MAX_LINE = 400
# In the place of what an ASCII or Latin-1 stream cannot show.
PLAIN = str.maketrans({
    "→": "->", "←": "<-", "×": "x", "±": "+-", "–": "-", "—": "-", "−": "-", "…": "...", "·": "*", "•": "*", "µ": "u",
    "≤": "<=", "≥": ">=", "≈": "~", "“": '"', "”": '"', "‘": "'", "’": "'", "█": "#", "✓": "v", "✗": "x",
    "\N{NO-BREAK SPACE}": " ",
})  # fmt: skip


def prepare() -> None:
    """No character ends a command in a UnicodeEncodeError: what a stream cannot encode is spelled in ASCII."""
    codecs.register_error("moeexp", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="moeexp")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def fitted(text: str, limit: int = MAX_LINE) -> str:
    """One line of at most `limit` characters. What is cut is cut from the middle: the end says what to do."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    mark = f" … [{len(line)} characters] … "
    end = (limit - len(mark)) * 2 // 5
    return line[: limit - len(mark) - end] + mark + line[-end:]
