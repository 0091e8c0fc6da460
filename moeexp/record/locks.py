"""Locks between processes: files that the kernel locks, and frees with the process that holds them."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


def lock(path: Path) -> FileLock:
    """For a `with`, which waits for it. `OSError` where the file system has no locks: a file that only says so would outlive
    its process. Held by all threads of the process."""
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def try_lock(path: Path) -> FileLock | None:
    """Acquired until it is released; None if another holds it."""
    found = lock(path)
    try:
        found.acquire(blocking=False)
    except Timeout:
        return None
    return found
