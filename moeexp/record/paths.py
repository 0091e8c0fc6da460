"""Paths as users give them: `~` is a home folder wherever a path is read, also where no shell has expanded it
(`tracker.path=~/runs.jsonl`, `--out=~/x`, an environment variable in quotes)."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """`ValueError` where `~` or `~name` stands for a home folder that nobody knows."""
    text = os.fspath(path)
    result = os.path.expanduser(text)
    if result.startswith("~") and (result == "~" or "/" in result or result[1:].isidentifier()):
        raise ValueError(f"the home folder in {text} is not known here: set HOME, or write the path in full")
    return Path(result)
