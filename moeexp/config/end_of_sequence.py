"""The ids that end a sequence, of a snapshot: from the file that transformers takes them from.

Where there is a generation_config.json, it alone counts: without ids in it transformers stops at none, whatever config.json
says. Else it is config.json; of a nested one the outer value, and the inner where the outer is null or absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeexp.config.files import read_object, short

KEY = "eos_token_id"
FILE = "generation_config.json"


def file_of(folder: Path) -> Path:
    """The file of a snapshot that decides; a dangling link of that name is one that cannot be read."""
    path = folder / FILE
    return path if path.exists() or path.is_symlink() else folder / "config.json"


def of_snapshot(folder: Path) -> tuple[int, ...]:
    """`ValueError` where the file that decides cannot be read as JSON, or has no ids there."""
    path = file_of(folder)
    return of_config(read_object(path), str(path))


def of_config(config: dict[str, Any], where: str = "the model config") -> tuple[int, ...]:
    """Of a config as it is given, flat or nested."""
    value, inner = config.get(KEY), config.get("text_config")
    if value is None and isinstance(inner, dict):
        value = inner.get(KEY)
    found = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in found):
        raise ValueError(f"{KEY}={short(value, 60)} in {where}; allowed: a token id (a whole number), a list of them, or null")
    return found


def check(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    """`ValueError` unless a generation can stop at each of them."""
    if not ids:
        raise ValueError(f"eos=true, and {where} names no {KEY}: name it there, or use eos=false")
    beyond = [token for token in ids if not 0 <= token < vocab_size]
    if beyond:
        raise ValueError(
            f"eos=true, and {KEY} of {where} has {short(beyond, 60)}, which the model never generates; allowed: 0 to "
            f"vocab_size - 1 = {vocab_size - 1}: correct it there, or use eos=false"
        )
