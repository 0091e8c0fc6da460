"""Files of a snapshot that are not what their names say: links to nothing, git-lfs pointers, broken JSON, names that lead
elsewhere.

A file of the snapshot may name only files below its own folder. A link in the folder may lead anywhere: whoever has the
folder made it, and a Hugging Face cache keeps the contents in ../../blobs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from moeexp.record.json_file import parsed, read_bytes
from moeexp.record.text import visible

# A tokenizer of 256 k words has 35 MB, an index of 100 k tensors 10; a config that is longer than its bound is none.
MOST_BYTES, MOST_OF_CONFIG = 1 << 27, 1 << 23
PART = re.compile(r"(?!\.{1,2}$)[^/\\:]{1,255}")  # of a path: no `..`, no drive
POINTER = b"version https://git-lfs"
# What a model is read from. A link to nothing among other files harms nobody.
USED = (".json", ".safetensors", ".txt", ".model", ".jinja")


def short(value: Any, limit: int = 80) -> str:
    """As it is written in Python, cut where it is long."""
    return cut(repr(value), limit)


def cut(text: str, limit: int = 80) -> str:
    """In one line, and not longer, with nothing that acts on a terminal."""
    line = visible(" ".join(text[: 16 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def check_links(folder: Path) -> None:
    """`ValueError` if a file of the folder is a link whose target is not there, as in a cache of which only snapshots/ was
    copied or mounted."""
    try:
        broken = sorted(path for path in folder.iterdir() if path.suffix in USED and leads_nowhere(path))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error.strerror}): make it readable") from error
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        target = short(os.readlink(broken[0]))
        raise ValueError(
            f"{broken[0].name}{more} in {folder}: a link that points to {target}, which is not there; a Hugging Face cache "
            "keeps the contents in blobs/ beside snapshots/: copy or mount both, or copy with cp -L"
        )


def leads_nowhere(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def is_inside(name: Any) -> bool:
    """Whether it names a file below the folder that it is read in, by plain characters and a length that a path may have."""
    return isinstance(name, str) and len(name) <= 1024 and visible(name) == name and all(map(PART.fullmatch, name.split("/")))


def check_pointer(path: Path) -> None:
    """`ValueError` for the pointer that git clones where git-lfs is not installed."""
    if read_bytes(path, len(POINTER)) == POINTER:
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, bounded in size and depth, no key twice. `ValueError`, one line with the file's name, for anything else."""
    most = MOST_OF_CONFIG if path.name in ("config.json", "generation_config.json") else MOST_BYTES
    try:
        check_pointer(path)
        data = read_bytes(path, most + 1)
    except FileNotFoundError as error:
        raise ValueError(f"{path} cannot be read: it is not there") from error
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, and no such file has: fetch it again")
    try:
        found = parsed(data, constants=True)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {cut(str(error), 200)} ({len(data)} bytes): fetch the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {short(found)}")
    return found
