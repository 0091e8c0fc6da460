"""What the config of a record may hold. A record may come from anyone: its config is data, read by the schema's types.

Nothing here composes, imports or opens what the record names."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moeexp.config import axes
from moeexp.config.architecture import Architecture
from moeexp.config.axis import MANY
from moeexp.config.config_keys import AT_MOST, MOST_THETA
from moeexp.config.schema import Config, OpsConfig
from moeexp.record.renamed import GONE
from moeexp.record.text import brief

LONGEST = 4096  # characters of a name or a path
LONGEST_ARGUMENT = 128_000  # bytes of a prompt, or of anything in a command; Linux takes 131,071
LONGEST_LIST = 8192  # Hydra reads a list in time that grows with its square: this one in 7 s

USER_OP = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
ROPE_TABLE = dict[str, int | float | bool | str | list[int | float] | None] | None
# As `Architecture.to_hf` writes it, and as conf/model does.
ARCHITECTURE = {name: kind for name, kind in get_type_hints(Architecture).items() if name != "eos_token_ids"} | {
    "eos_token_id": int | list[int] | None,
    "rope_parameters": ROPE_TABLE,
    "rope_scaling": ROPE_TABLE,
    "original_max_position_embeddings": int,
}
# Of shapes; of settings the table of axes says it.
MOST = {f"model.architecture.{key}": most for key, most in AT_MOST.items() if key in ARCHITECTURE} | {
    "model.architecture.rope_theta": MOST_THETA,
    "model.architecture.rope_parameters.rope_theta": MOST_THETA,
}
ROPE = {"rope_type": str, "type": str, "rope_theta": float, "partial_rotary_factor": float}


def check(config: Any) -> None:
    """`ValueError` (one line) for anything but the schema's fields, with values of their types and of sane size. Settings that
    are gone may be there."""
    _check_value("", Config, config)
    for group, name in axes.LABELS.items():
        if not (config.get(group) or {}).get(name):
            raise ValueError(f"the record's config has no {group}.{name}: it is not the config of a run")
    for op, name in config["ops"].items():
        if name is not None and ":" in name and not USER_OP.fullmatch(name):
            raise ValueError(f"the record's ops.{op}={brief(name)} is neither the name of an op nor module:function")
    shapes = config["model"].get("architecture")
    if shapes is not None:
        try:
            Architecture.from_hf(shapes)
        except ValueError as error:
            raise ValueError(f"the record's model.architecture cannot be read: {str(error)[:200]}") from error


def user_ops(config: dict[str, Any]) -> dict[str, str]:
    """{op: module:function} of a config that is checked."""
    chosen = {field.name: config["ops"].get(field.name) for field in fields(OpsConfig)}
    return {op: name for op, name in chosen.items() if name is not None and ":" in name}


def check_text(what: str, text: Any, *, longest: int = LONGEST, lines: bool = False, too_long: str = "") -> str:
    """`text`, if it can be shown, pasted into a shell and handed on as it is. `lines`: it may have several, and tabs."""
    if not isinstance(text, str):
        raise ValueError(f"the record's {what} is {brief(text)}, not text")
    if len(text.encode(errors="replace")) > longest:
        raise ValueError(f"the record's {what} has {len(text)} characters{too_long}; {longest} bytes are allowed")
    for character in text:
        # Control characters act on the terminal that a command is pasted into; surrogates are no text.
        if unicodedata.category(character) in ("Cc", "Cs") and not (lines and character in "\n\t"):
            raise ValueError(f"the record's {what}={brief(text)} holds the character {brief(character)}, which is not allowed")
    if text == "???":
        raise ValueError(f"the record's {what} is '???', which means that it is missing")
    return text


def _check_value(path: str, kind: Any, value: Any) -> None:
    origin = get_origin(kind)
    if is_dataclass(kind):
        _check_fields(path, get_type_hints(kind), value)
    elif origin in (Union, UnionType):
        _check_value(path, _choice(path, get_args(kind), value), value)
    elif origin is dict and path == "model.architecture":
        _check_fields(path, ARCHITECTURE, value)
    elif origin is dict:
        _check_table(path, value)
        for name, item in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
                raise ValueError(f"the record's {path} has {brief(name)}, which is no name of a parameter")
            _check_value(f"{path}.{name}", ROPE.get(name, get_args(kind)[1]), item)
    elif origin in (list, tuple):
        if not isinstance(value, list):
            raise ValueError(f"the record's {path}={brief(value)} is not a list")
        if len(value) > LONGEST_LIST:
            raise ValueError(f"the record's {path} has {len(value)} entries; {LONGEST_LIST} are allowed")
        for item in value:
            _check_value(path, get_args(kind)[0], item)
    elif kind is str and path in axes.TABLE and axes.TABLE[path].axis.literal:
        check_text(path, value, longest=LONGEST_ARGUMENT, lines=True, too_long=", more than a command line can hold")
    elif kind is str:
        check_text(path, value)
    else:
        _check_plain(path, kind, value)


def _check_fields(path: str, hints: dict[str, Any], value: Any) -> None:
    _check_table(path, value)
    for name, item in value.items():
        if not path and name in GONE:
            _check_plain(name, bool, item)
            continue
        if name not in hints:
            where = f"{path} of the record's config" if path else "the record's config"
            raise ValueError(f"{where} has {brief(name)}, which is no setting of moeexp: it was not written by this version")
        inner = f"{path}.{name}" if path else name
        _check_value(inner, axes.TABLE[inner].kind if inner in axes.TABLE else hints[name], item)


def _check_table(path: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"the record's {path or 'config'} is {brief(value)}, not a table of settings")


def _choice(path: str, kinds: tuple, value: Any) -> Any:
    """The one of several types that a value is to be checked by."""
    for kind in kinds:
        plain = dict if is_dataclass(kind) else get_origin(kind) or kind
        if type(value) is plain:
            return kind
    left = [kind for kind in kinds if kind is not NoneType]
    if value is not None and len(left) == 1:
        return left[0]
    raise ValueError(f"the record's {path}={brief(value)} is not of a type that {path} has")


def _check_plain(path: str, kind: type, value: Any) -> None:
    if kind is float and type(value) is int:
        kind = int
    if type(value) is not kind:
        raise ValueError(f"the record's {path}={brief(value)} is not of type {kind.__name__}")
    if isinstance(value, (int, float)) and kind in (int, float):
        of_axis = axes.TABLE[path].axis.most if path in axes.TABLE else None
        most = of_axis or MOST.get(path, MANY)
        if not -most <= value <= most:
            raise ValueError(f"the record's {path}={brief(value)} is out of range; {-most} to {most} is allowed")
