"""What the cache's folder holds and when it was last used. Beyond a limit the least recently used goes first."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeexp.record.locks import lock, try_lock
from moeexp.stack.caches import LIMIT, OTHERS, cache_dir, limit_bytes, users

YOUNG_S = 3600.0  # a run loads what it found or made well within this time, without holding its lock


@dataclass(frozen=True)
class Entry:
    """`locks`: whoever uses it holds one of them. `used`: seconds since the epoch. `size`: bytes."""

    kind: str
    name: str
    paths: tuple[Path, ...]
    locks: tuple[Path, ...]
    size: int
    used: float


def entries() -> list[Entry]:
    """The least recently used first."""
    folder = cache_dir()
    found = [_entry(kind, kind, (folder / kind,), users(folder)) for kind in OTHERS]
    found.append(_entry("digests", "of weights", (folder / "digests.json",), (folder / ".digests.lock",)))
    compiled = folder / "compiled"
    names = os.listdir(compiled) if compiled.is_dir() else []
    for key in {re.sub(r"^\.|\.(lock|partial)$", "", name) for name in names}:
        paths = compiled / key, compiled / f".{key}.partial"
        kind = " ".join(["compiled", *(path.stem for path in paths[0].glob("*.pt2"))])
        found.append(_entry(kind, key, paths, (lock_of(paths[0]),)))
    return sorted((entry for entry in found if any(map(os.path.lexists, entry.paths))), key=lambda entry: entry.used)


def lock_of(compiled: Path) -> Path:
    return compiled.with_name(f".{compiled.name}.lock")


def trim(limit: float) -> list[Entry]:
    """Removes what has not been used for an hour, until at most `limit` bytes are left; returns what it removed."""
    removed = []
    with lock(cache_dir() / ".trim.lock"):  # two at once would count what the other removes as still there
        found = entries()
        total = sum(entry.size for entry in found)
        for entry in found:
            if total > limit and time.time() - entry.used > YOUNG_S and remove(entry, unless_used=True):
                total -= entry.size
                removed.append(entry)
    return removed


def trim_or_say() -> None:
    """To the user's limit. A run whose code is compiled does not fail over what others have left behind."""
    try:
        trim(limit_bytes())
    except OSError as error:
        print(f"warning: the cache stays larger than {LIMIT} says: {error}", file=sys.stderr)


def remove(entry: Entry, *, unless_used: bool = False) -> bool:
    """False where it is in use or, with `unless_used`, was used since it was looked at."""
    held = []
    try:
        for path in entry.locks:
            if (mine := try_lock(path)) is None:
                return False
            held.append(mine)
        if unless_used and _newest(entry) > entry.used:
            return False
        for path in entry.paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in entry.locks:  # last: who waited for one of them looks whether it still has its name
            path.unlink(missing_ok=True)
        return True
    finally:
        for mine in held:
            mine.release()


def _entry(kind: str, name: str, paths: tuple[Path, ...], locks: tuple[Path, ...]) -> Entry:
    found = list(_stats(paths))
    size = sum(one.st_size for one in found)
    return Entry(kind, name, paths, locks, size, max((one.st_mtime for one in [*found, *_stats(locks)]), default=0.0))


def _newest(entry: Entry) -> float:
    return max(one.st_mtime for one in _stats((*entry.paths, *entry.locks)))


def _stats(paths: tuple[Path, ...]) -> Iterator[os.stat_result]:
    """Of all files and folders; others may remove some meanwhile."""
    for path in paths:
        inside = [os.path.join(at, name) for at, folders, files in os.walk(path) for name in (*folders, *files)]
        for one in (str(path), *inside):
            try:
                yield os.lstat(one)
            except FileNotFoundError:
                continue
