"""Who made an artifact: a key in this user's state folder, which no artifact can know, and the code that it gives a manifest.

An artifact is native code, and its own digests say no more than that it is whole: a stranger can seal one as well."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import platformdirs

from moeexp.record.locks import lock

SIZE = 32


def key_file() -> Path:
    """`$XDG_STATE_HOME/moeexp/artifact.key`, on Linux else `~/.local/state/moeexp/artifact.key`."""
    folder = platformdirs.user_state_path("moeexp")
    if not folder.is_absolute():
        raise ValueError(
            "there is no folder for the key of artifacts, as no home folder is known here: set HOME or XDG_STATE_HOME"
        )
    return folder / "artifact.key"


def prepare() -> None:
    """Makes the key where there is none yet. `ValueError` where it cannot be kept, or is none."""
    path = key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock(path.with_name(".artifact.key.lock")):
            if not os.path.lexists(path):
                scratch = path.with_name(f".artifact.key.{os.getpid()}")
                descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with open(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(SIZE))
                os.replace(scratch, path)
    except OSError as error:
        raise ValueError(
            f"the key of artifacts cannot be kept in {path.parent} ({error.strerror}): set XDG_STATE_HOME to a folder that "
            "can be written"
        ) from error
    _key()


def code(manifest: dict[str, Any]) -> str:
    """Of a sealed manifest, by this user's key. `FileNotFoundError` without one; `ValueError` for one that others can read."""
    return hmac.new(_key(), manifest["sha256"].encode(), hashlib.sha256).hexdigest()


def check(folder: Path, manifest: dict[str, Any], *, trusted: bool) -> None:
    """`ValueError` for an artifact that was made elsewhere, unless its user trusts it."""
    if trusted:
        return
    try:
        ours = hmac.compare_digest(code(manifest), manifest["made_by"])
    except FileNotFoundError:
        ours = False
    if not ours:
        raise ValueError(
            f"artifact={folder} was not made on this machine by this user, and is native code that could do anything: "
            "add artifact_trust=true if you trust who made it, or export it again here"
        )


def _key() -> bytes:
    path = key_file()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path}, the key of artifacts, cannot be read ({error.strerror}): remove it, and export again"
        ) from error
    try:
        found = os.fstat(descriptor)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not private or found.st_size != SIZE:
            raise ValueError(
                f"{path}, the key of artifacts, is no file of {SIZE} bytes that its user alone can read: remove it, "
                "and export again"
            )
        return os.read(descriptor, SIZE)
    finally:
        os.close(descriptor)
