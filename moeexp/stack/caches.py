"""Where compiled code is kept, and whether it can be: said before any work, with the variable that moves it."""

from __future__ import annotations

import getpass
import os
import shlex
import tempfile
from pathlib import Path

import platformdirs

from moeexp.record.paths import expanded

VARIABLE = "MOEEXP_CACHE_DIR"


def cache_dir() -> Path:
    """`$MOEEXP_CACHE_DIR`, else `$XDG_CACHE_HOME/moeexp`, else the user's, on Linux `~/.cache/moeexp`. `ValueError` without a
    home folder."""
    own, base = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if own or base:  # platformdirs would pass over a base that is relative, or begins with ~
            return expanded(own).absolute() if own else expanded(base or "").absolute() / "moeexp"
        return platformdirs.user_cache_path("moeexp")
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"there is no folder for compiled code: {error}, or set {VARIABLE}") from error


def check() -> None:
    """`ValueError` where the folder cannot be written."""
    folder = cache_dir()
    if (refusal := _refusal(folder)) is not None:
        raise ValueError(f"compiled code cannot be kept in {folder} ({refusal}): set {VARIABLE} to a folder that can be written")


def prepare() -> None:
    """Moves the folders of torch and Triton into ours where they could not work in their own places; before torch is
    imported. Inductor splits its compiler's command into words, which a blank or a quote in a path breaks."""
    if "TRITON_CACHE_DIR" not in os.environ and _refusal(Path(os.path.expanduser("~/.triton/cache"))) is not None:
        os.environ["TRITON_CACHE_DIR"] = str(cache_dir() / "triton")
    if not _is_word(tempfile.gettempdir()):
        folder = cache_dir() / "tmp"
        if not _is_word(folder) or _refusal(folder) is not None:
            raise ValueError(f"torch cannot compile in TMPDIR={tempfile.gettempdir()!r}: set TMPDIR to a folder without blanks")
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and not _has_name():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir() / "inductor")
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not _is_word(own):
        raise ValueError(f"torch cannot compile in TORCHINDUCTOR_CACHE_DIR={own!r}: set it to a folder without blanks")


def _is_word(folder: str | os.PathLike[str]) -> bool:
    """To a shell, as it stands."""
    text = os.fspath(folder)
    return text == shlex.quote(text) or text == ""


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
