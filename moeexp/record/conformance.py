"""Whether a record is of its shape: the first key that is not, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moeexp.record.quantities import Shape
from moeexp.record.shape import ConfigShape, Whole
from moeexp.record.text import brief, one_line


def check(record: Mapping[str, Any]) -> None:
    """`ValueError` with the first key that is not as `shape` says, its value, and what is allowed."""
    conforms(Whole, record)


def check_config(config: Any) -> None:
    """The same for a record's config alone."""
    conforms(ConfigShape, config, "config.")


def conforms(shape: type[Shape], value: Any, prefix: str = "") -> None:
    """The same for any data that should be of a shape."""
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where, found = _place(value, first["loc"])
        said = one_line(first["msg"]).removeprefix("Value error, ").removeprefix("Input ").split(" or instance of")[0]
        what = f"{prefix}{where}" if where else ""
        shown = "" if found is _MISSING or not where else f"={brief(found)}"
        raise ValueError(f"{what[:100]}{shown}: {said[:160]}".removeprefix(": ")) from None


_MISSING = object()


def _place(value: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """Where in the data that is, without the tags of alternatives, and what stands there."""
    where = ""
    for key in location:
        if isinstance(value, Mapping) and isinstance(key, str):
            where, value = f"{where}.{one_line(key)}".removeprefix("."), value.get(key, _MISSING)
        elif isinstance(value, list) and isinstance(key, int):
            where, value = f"{where}[{key}]", value[key]
    return where, value
