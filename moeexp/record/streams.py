"""What is printed: on streams of any encoding, and in lines that a terminal and a log can hold."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys

from moeexp.record.text import one_line

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


def outlive() -> None:
    """Whoever read the output may be gone (a terminal that hung up, a `tee` that got the same signal): then to nowhere, as
    what remains to be done matters more than who hears of it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            gone = any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0))
        except (OSError, ValueError, AttributeError):  # no file: a test's, a notebook's
            continue
        if gone:
            setattr(sys, name, open(os.devnull, "w"))


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def fitted(text: str, limit: int = MAX_LINE) -> str:
    """One line of at most `limit` characters, with nothing in it that a terminal would act on. What is cut is cut from the
    middle: the end says what to do."""
    line = one_line(text)
    if len(line) <= limit:
        return line
    mark = f" … [{len(line)} characters] … "
    end = (limit - len(mark)) * 2 // 5
    return line[: limit - len(mark) - end] + mark + line[-end:]
