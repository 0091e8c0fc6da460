"""A disk that is full: what says so, where it is, and the room that a run keeps so that its record can say it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# As compilers, safetensors and other errors that wrap one put it, and torch where it unpacks a package.
WORDS = (*map(os.strerror, FULL), "no space left on", "mz_zip error string: write callback failed")
KEPT = ".space-for-the-record"
KEPT_BYTES = 256 << 10  # a record with its traceback beside it


class NoSpace(OSError):
    """Its text is for the user."""


def keep_space(folder: Path) -> None:
    """Until `free_space`: the end of a run that fills the disk can still be written. `OSError` where there is not so much."""
    descriptor = os.open(folder / KEPT, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, KEPT_BYTES)
        else:
            os.write(descriptor, bytes(KEPT_BYTES))
    except OSError as error:
        free_space(folder)
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> None:
    (folder / KEPT).unlink(missing_ok=True)


def is_full(error: BaseException | None) -> bool:
    """Also where a compiler's error, or torch's, is what became of it."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or says_so(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def says_so(text: str) -> bool:
    return any(words in text for words in WORDS)


def explained(error: BaseException, folders: Mapping[str, Path]) -> BaseException:
    """`NoSpace` for an error that comes of a full disk; any other as it is, as is a `ValueError`, which says what to do, and an
    interrupt. `folders`: {what moves it: where a run writes}; of those on the disk of the file that the error names, or of all,
    the one with the least space left is named."""
    if not isinstance(error, Exception) or isinstance(error, ValueError) or not is_full(error):
        return error
    there = {how: path for how, path in folders.items() if _device(path) is not None}
    named = _device(Path(str(error.filename))) if isinstance(error, OSError) and error.filename else None
    same = {how: path for how, path in there.items() if named is None or _device(path) == named}
    how, path = min((same or there).items(), key=lambda item: _left(item[1]))
    found = NoSpace(f"no space left on {path}: free some, or write elsewhere with {how}")
    found.__cause__ = error
    return found


def _device(path: Path) -> int | None:
    """Of the path, or of the nearest folder above it that is there."""
    for place in (path, *path.parents):
        try:
            return os.stat(place).st_dev
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _left(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
