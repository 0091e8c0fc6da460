"""SHA-256 of files, kept by what the file system knows of them: a file that has not changed is not read a second time.

A file is known by device, inode, size, mtime and ctime, through every path and link that leads to it. The ctime is set by
the kernel whenever contents or mtime are: a replacement of equal size with a restored mtime has another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from moeexp.record.locks import lock
from moeexp.record.record import write_atomically
from moeexp.stack.caches import cache_dir

VERSION = 1
# Entries that are kept, the latest; some 0.6 MB. A snapshot of the largest models has about a hundred files.
MOST = 4096
CHUNK = 1 << 23
THREADS = 4
# Less than this is read in an instant, and nothing is shown.
WORTH_SHOWING = 256 << 20
# Two changes within so many seconds may have one time stamp. Some file systems count whole seconds.
TICK_S, COARSE_TICK_S = 0.02, 2.0
SHA256 = re.compile(r"[0-9a-f]{64}")

Stamp = tuple[int, int, int, int, int]
# (what, total=MiB) -> a context whose value is called with the MiB that have been read since.
ShowProgress = Callable[..., AbstractContextManager[Callable[[int], None]]]


@contextmanager
def unseen(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda steps: None


class Digests:
    """The digests that are known, on disk and here."""

    def __init__(self) -> None:
        self.path = cache_dir() / "digests.json"
        self._known = _read(self.path)

    def of(self, paths: Iterable[Path], progress: ShowProgress = unseen) -> list[str]:
        """Of each file, in order. `ValueError` for one that cannot be read."""
        paths = list(paths)
        stamps = [_stamp(path) for path in paths]
        new = {stamp: path for path, stamp in zip(paths, stamps, strict=True) if stamp not in self._known}
        if not new:
            return [self._known[stamp] for stamp in stamps]
        size = sum(stamp[2] for stamp in new)
        shown = progress if size >= WORTH_SHOWING else unseen
        with shown("reading weights, MiB", total=size >> 20) as advance, ThreadPoolExecutor(THREADS) as pool:
            found = dict(zip(new, pool.map(lambda stamp: _digest(stamp, new[stamp], advance), new), strict=True))
        kept = {stamp: digest for stamp, (digest, stable) in found.items() if stable}
        self._known |= kept
        self._keep(kept)
        return [found[stamp][0] if stamp in found else self._known[stamp] for stamp in stamps]

    def _keep(self, new: dict[Stamp, str]) -> None:
        """Beside what other processes have added meanwhile. Without it all is as right, and slower."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock(self.path.with_name(".digests.lock")):
                write_atomically(self.path, _dump(_read(self.path) | new))
        except OSError as error:
            print(f"warning: digests of weights are not kept, and made again each time: {error}", file=sys.stderr)


def _digest(stamp: Stamp, path: Path, advance: Callable[[int], None]) -> tuple[str, bool]:
    """The digest, and whether the file was the one of this stamp all the while."""
    coarse = stamp[4] % 10**9 == 0
    age = time.time() - stamp[4] / 1e9
    tick = COARSE_TICK_S if coarse else TICK_S
    if age < tick:
        time.sleep(tick)  # what is written from now on has another stamp
    total = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            opened = _stamp_of(os.fstat(file.fileno()))
            buffer = memoryview(bytearray(min(CHUNK, max(stamp[2], 1))))
            while count := file.readinto(buffer):
                total.update(buffer[:count])
                advance(count >> 20)
    except OSError as error:
        raise _unreadable(path, error) from error
    return total.hexdigest(), stamp == opened == _stamp(path)


def _stamp(path: Path) -> Stamp:
    try:
        return _stamp_of(path.stat())
    except OSError as error:
        raise _unreadable(path, error) from error


def _stamp_of(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be read ({error.strerror}): make it readable, or fetch it again")


def _read(path: Path) -> dict[Stamp, str]:
    """What is not there or not as we write it is unknown, and made again."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = data["files"].items() if data["version"] == VERSION else ()
        return {_parsed(key): _checked(digest) for key, digest in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _parsed(key: str) -> Stamp:
    device, inode, size, modified, changed = map(int, key.split())
    return device, inode, size, modified, changed


def _checked(digest: str) -> str:
    if not SHA256.fullmatch(digest):
        raise ValueError(digest)
    return digest


def _dump(known: dict[Stamp, str]) -> str:
    """One entry a file: an older state of one will not come back. The latest stand last."""
    latest: dict[tuple[int, ...], tuple[Stamp, str]] = {}
    for stamp, digest in known.items():
        latest.pop(stamp[:2], None)
        latest[stamp[:2]] = stamp, digest
    entries = {" ".join(map(str, stamp)): digest for stamp, digest in list(latest.values())[-MOST:]}
    return json.dumps({"version": VERSION, "files": entries}, indent=0) + "\n"
