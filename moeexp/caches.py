"""Where compiled code is kept, and whether it can be: said before any work, with the variable that moves it."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from moeexp.paths import expanded

VARIABLE = "MOEEXP_CACHE_DIR"


def cache_dir() -> Path:
    """`$MOEEXP_CACHE_DIR`, else `$XDG_CACHE_HOME/moeexp`, else `~/.cache/moeexp`. `ValueError` without a home folder."""
    own, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        return expanded(own) if own else expanded(base or "~/.cache") / "moeexp"
    except ValueError as error:
        raise ValueError(f"there is no folder for compiled code: {error}, or set {VARIABLE}") from error


def check() -> None:
    """`ValueError` where the folder cannot be written."""
    folder = cache_dir()
    if (refusal := _refusal(folder)) is not None:
        raise ValueError(f"compiled code cannot be kept in {folder} ({refusal}): set {VARIABLE} to a folder that can be written")


def prepare() -> None:
    """Moves the caches of torch and Triton into ours where they could not work in their own places; before torch is
    imported. Inductor builds its compiler's command from words, which a blank in a path breaks."""
    if "TRITON_CACHE_DIR" not in os.environ and _refusal(Path(os.path.expanduser("~/.triton/cache"))) is not None:
        os.environ["TRITON_CACHE_DIR"] = str(cache_dir() / "triton")
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (" " in tempfile.gettempdir() or not _has_name()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if " " in folder:
        raise ValueError(f"torch cannot compile in {folder!r}, which has a blank in it: set TORCHINDUCTOR_CACHE_DIR")


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written there; None where something can."""
    if not folder.is_absolute() and str(folder).startswith("~"):
        return "no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _has_name() -> bool:
    """Whether the user has one, after which torch names its cache."""
    try:
        return bool(getpass.getuser())
    except (KeyError, OSError):  # by version of Python
        return False
