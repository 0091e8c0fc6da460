"""The text of `model=tiny`: the King James Bible as printed by Debian's `bible`, split by whole books."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import torch

BOOKS = (
    "Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,1 Chronicles,"
    "2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon,Isaiah,Jeremiah,Lamentations,"
    "Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,Matthew,Mark,"
    "Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,1 Thessalonians,"
    "2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,3 John,Jude,"
    "Revelation"
).split(",")
HELD_OUT = ("Ruth", "Esther", "Jonah", "James")  # reported, never trained on, never used to choose anything
VALIDATION = ("Amos", "Joel", "Malachi", "Philippians")  # chooses the checkpoint
VERSES = 31_102


def format_verses(lines: list[str]) -> str:
    """`Ru1:1 Now it …` lines of all 66 books in order -> one verse a line, each chapter under a `Ruth 1` heading."""
    out, book, chapter, last = [], -1, "", ""
    for line in lines:
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line)
        if match is None:
            raise ValueError(f"{line!r} is not a verse such as 'Ge1:1 In the beginning'; give the output of `bible -f`")
        if match[1] != last:
            book, last, chapter = book + 1, match[1], ""
        if match[2] != chapter:
            chapter = match[2]
            out += ["", f"{BOOKS[book]} {chapter}", ""]
        out.append(match[3].strip())
    return "\n".join(out[1:]) + "\n"


def make_text(path: Path) -> None:
    run = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    if len(lines) != VERSES:
        raise RuntimeError(f"`bible` printed {len(lines)} verses instead of {VERSES}: is bible-kjv-text installed?")
    text = format_verses(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("ascii"))
    print(f"{path}: {len(text):,} bytes, sha256 {digest(path)}")


def split_books(text: str) -> dict[str, str]:
    """Text of `--make-text` -> `train`, `validation`, `heldout`: whole books, in the order of the Bible."""
    heading = re.compile(rf"^({'|'.join(map(re.escape, BOOKS))}) \d+$", re.MULTILINE)
    starts = list(heading.finditer(text))
    missing = set(BOOKS) - {start[1] for start in starts}
    if missing:
        raise ValueError(f"the text lacks {', '.join(sorted(missing))}; write it with --make-text")
    parts: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for start, end in zip(starts, [s.start() for s in starts[1:]] + [len(text)], strict=True):
        part = "heldout" if start[1] in HELD_OUT else "validation" if start[1] in VALIDATION else "train"
        parts[part].append(text[start.start() : end])
    return {name: "".join(chapters) for name, chapters in parts.items()}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def share_known(text: str, known: set[str]) -> float:
    """Share of the words in `text` that occur in `known`; the first and last may be cut and do not count."""
    words = words_of(text)[1:-1]
    return sum(word in known for word in words) / max(len(words), 1)


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
