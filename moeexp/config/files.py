"""Files of a snapshot that are not what their names say: links to nothing, git-lfs pointers, broken JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"
# What a model is read from. A link to nothing among other files harms nobody.
USED = (".json", ".safetensors", ".txt", ".model", ".jinja")


def short(value: Any, limit: int = 80) -> str:
    """As it is written in Python, cut where it is long."""
    return cut(repr(value), limit)


def cut(text: str, limit: int = 80) -> str:
    """In one line, and not longer."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def check_links(folder: Path) -> None:
    """`ValueError` if a file of the folder is a link whose target is not there, as in a cache of which only snapshots/ was
    copied or mounted."""
    broken = sorted(path for path in folder.iterdir() if path.suffix in USED and leads_nowhere(path))
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        target = short(os.readlink(broken[0]))
        raise ValueError(
            f"{broken[0].name}{more} in {folder}: a link that points to {target}, which is not there; a Hugging Face cache "
            "keeps the contents in blobs/ beside snapshots/: copy or mount both, or copy with cp -L"
        )


def leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def check_pointer(path: Path) -> None:
    """`ValueError` for the pointer that git clones where git-lfs is not installed."""
    if is_pointer(path):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. `ValueError`, one line with the file's name, for anything else."""
    try:
        check_pointer(path)
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON: {cut(str(error))} ({path.stat().st_size} bytes): fetch the file again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {short(found)}")
    return found
