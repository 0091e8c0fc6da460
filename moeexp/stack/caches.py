"""Where compiled code is kept, and whether it can be: said before any work, with the variable that moves it."""

from __future__ import annotations

import getpass
import os
import shlex
import tempfile
from pathlib import Path
from uuid import uuid4

import platformdirs
from filelock import FileLock

from moeexp.record.locks import lock, try_lock
from moeexp.record.paths import expanded

VARIABLE, LIMIT = "MOEEXP_CACHE_DIR", "MOEEXP_CACHE_GIB"
DEFAULT_GIB = 20.0
# Folders of ours that are torch's and Triton's caches where those cannot have their own.
OTHERS = ("inductor", "tmp", "triton")
_held: dict[Path, FileLock] = {}  # until this process ends


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


def limit_bytes(text: str | None = None, given_by: str = LIMIT) -> float:
    """That the folder is kept within, see `moeexp.stack.cache_entries`. `ValueError` for GiB that are no number."""
    text = text or os.environ.get(LIMIT) or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not gib >= 0:
        raise ValueError(f"{given_by}={text} is not a number of GiB of 0 or more (inf: no limit): give one, or leave it out")
    return gib * 2**30


def check() -> None:
    """`ValueError` where the folder cannot be written, or where its limit is none."""
    limit_bytes()
    folder = cache_dir()
    if (refusal := _refusal(folder)) is not None:
        raise ValueError(f"compiled code cannot be kept in {folder} ({refusal}): set {VARIABLE} to a folder that can be written")


def prepare() -> None:
    """Moves the folders of torch and Triton into ours where they could not work in their own places; before torch is
    imported. Inductor splits its compiler's command into words, which a blank or a quote in a path breaks."""
    if "TRITON_CACHE_DIR" not in os.environ and _refusal(Path(os.path.expanduser("~/.triton/cache"))) is not None:
        os.environ["TRITON_CACHE_DIR"] = str(_own("triton"))
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ValueError("no folder for temporary files can be written: set TMPDIR to one that can") from error
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        if (given := os.environ.get(name)) and (refusal := _refusal(Path(given))) is not None:
            raise ValueError(f"{name}={given} cannot be written ({refusal}): set it to a folder that can, or unset it")
    if not _is_word(tempfile.gettempdir()):
        folder = cache_dir() / "tmp"
        if not _is_word(folder) or _refusal(folder) is not None:
            raise ValueError(f"torch cannot compile in TMPDIR={tempfile.gettempdir()!r}: set TMPDIR to a folder without blanks")
        os.environ["TMPDIR"] = tempfile.tempdir = str(_own("tmp"))
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and not _has_name():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_own("inductor"))
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not _is_word(own):
        raise ValueError(f"torch cannot compile in TORCHINDUCTOR_CACHE_DIR={own!r}: set it to a folder without blanks")


def folders() -> dict[str, Path]:
    """{variable: the folder that it moves}: all that compiling writes to."""
    own = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    own["TRITON_CACHE_DIR"] = own["TRITON_CACHE_DIR"] or os.path.expanduser("~/.triton/cache")
    given = {name: Path(folder) for name, folder in own.items() if folder and not folder.startswith("~")}
    return {VARIABLE: cache_dir(), "TMPDIR": Path(tempfile.gettempdir())} | given


def _own(name: str) -> Path:
    """One of `OTHERS`, which is in use while this process is there."""
    folder = cache_dir()
    check()
    if folder not in _held:
        for left in users(folder):
            if (ended := try_lock(left)) is not None:
                left.unlink()
                ended.release()
        _held[folder] = lock(folder / f".{uuid4().hex}.user")
        _held[folder].acquire()
    return folder / name


def users(folder: Path) -> tuple[Path, ...]:
    """The locks of processes that use `OTHERS`, and of some that have ended."""
    return tuple(folder.glob(".*.user"))


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
