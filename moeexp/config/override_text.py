"""Overrides of text fields as they were typed: `prompt=1.50` is the text 1.50, which Hydra's grammar reads as the number 1.5.

Where Hydra would make something else of a text, the text is quoted before Hydra sees it. What it does not change:
* one level of quotes around the whole value, and Hydra's escapes (a backslash before any of `\\()[]{}:=,` and blanks);
* `null`, which is no text at all; in quotes it is one;
* a comma outside of brackets, which in a sweep separates values and in a single run is refused;
* interpolations such as `${oc.env:SCRATCH}/runs`, except in a prompt, where `${` has no meaning.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from functools import cache
from typing import Any

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from moeexp.config import axes, schema
from moeexp.record.renamed import refuse_old

TEXT = "text"
HYDRA_TEXT = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")

OVERRIDE = re.compile(r"(\+{0,2}[A-Za-z_][\w.]*)=(.*)", re.DOTALL)
PLAIN = re.compile(r"[A-Za-z_/][\w/-]*(\.[A-Za-z_]\w*)*", re.ASCII)  # what Hydra leaves alone, but for its words
WORDS = ("null", "true", "false", "nan", "inf")
QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*""", re.DOTALL)
CALL = re.compile(r"\s*\w+\s*\(")
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")
INTERPOLATION = re.compile(r"(\\*)(\$\{)")


def as_typed(override: str, *, sweep: bool = False) -> str:
    """The override with which Hydra arrives at the text. The same again for its own result; unchanged where the field is no
    text, and where Hydra has to refuse the override. sweep: of several values each. `ValueError` for a
    name of earlier versions."""
    refuse_old(override)
    match = OVERRIDE.fullmatch(override)
    if match is None:
        return override
    key, value = match.groups()
    path = key.lstrip("+")
    kind = kind_of(path)
    if kind is None or value == "" or (PLAIN.fullmatch(value) and value.lower() not in WORDS):
        return override
    if kind != TEXT and value.lstrip()[:1] not in ("[", "{"):
        return override
    literal = path in axes.LITERAL
    if kind == TEXT and (QUOTED.fullmatch(value) or ("," not in value and not CALL.match(value))):
        return f"{key}={_text(value, literal)}"
    element, is_sweep = _parsed(override)
    if element is None:  # Hydra's grammar has no such value
        return f"{key}={_text(value, literal)}" if kind == TEXT and "," not in value else override
    if is_sweep:
        for one in reversed(_values(element) if sweep else []):
            start, stop = one.start.start, one.stop.stop + 1
            override = override[:start] + _element(one, kind, override[start:stop], literal, start) + override[stop:]
        return override
    if kind == TEXT:
        return f"{key}={_text(value, literal)}"
    return f"{key}={_element(element, kind, override[element.start.start :], literal, element.start.start)}"


def quoted(text: str) -> str:
    """In quotes, from which Hydra's grammar reads the text again."""
    return QuotedString(text, Quote.single).with_quotes()


def without_interpolation(text: str) -> str:
    """The text from which OmegaConf reads `text`; unchanged where that is done already."""
    return INTERPOLATION.sub(lambda match: match[1] + "\\" * (1 - len(match[1]) % 2) + match[2], text)


@cache
def kind_of(path: str) -> Any:
    """TEXT, ("list", kind), a dict of fields' kinds, or None for what is no text."""
    if path in HYDRA_TEXT:
        return TEXT
    kind = _kind(schema.Config)
    for name in path.split("."):
        kind = kind.get(name) if isinstance(kind, dict) else None
    return kind


def _kind(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        choices = [one for one in typing.get_args(annotation) if one is not type(None)]
        annotation = choices[0] if len(choices) == 1 else None
    if annotation is str:
        return TEXT
    if typing.get_origin(annotation) is list:
        item = _kind(typing.get_args(annotation)[0])
        return None if item is None else ("list", item)
    if dataclasses.is_dataclass(annotation):
        return {name: _kind(hint) for name, hint in typing.get_type_hints(annotation).items()}
    return None


def _text(source: str, literal: bool) -> str:
    """One value's source, quoted where Hydra would not read it as the text that it is."""
    if source.strip() == "null":
        return source
    if QUOTED.fullmatch(source):
        source = source.strip()
        if not literal or without_interpolation(source) == source:
            return source
        return quoted(without_interpolation(str(_value(source))))
    text = ESCAPED.sub(r"\1", source)
    wanted = without_interpolation(text) if literal else text
    # Hydra takes seconds to read a long text, and less for a quoted one.
    return source if len(source) < 1000 and _value(source) == wanted else quoted(wanted)


def _value(source: str) -> Any:
    """What Hydra makes of it; None where it cannot read it, or has several values."""
    try:
        override = OverridesParser.create().parse_override(f"x={source}")
    except HydraException:
        return None
    return None if override.is_sweep_override() else override.value()


def _element(context: Any, kind: Any, source: str, literal: bool, offset: int) -> str:
    """`source` begins where `context` does, `offset` characters into what was parsed."""
    source = source[: context.stop.stop + 1 - context.start.start]

    def part(inner: Any, kind: Any) -> str:
        return _element(inner, kind, source[inner.start.start - offset :], literal, inner.start.start)

    if kind == TEXT:
        return _text(source.strip(" \t"), literal)
    if isinstance(kind, tuple) and context.listContainer():
        return "[" + ",".join(part(inner, kind[1]) for inner in context.listContainer().element()) + "]"
    if isinstance(kind, dict) and context.dictContainer():
        pairs = [(pair.dictKey().getText(), pair.element()) for pair in context.dictContainer().dictKeyValuePair()]
        return "{" + ",".join(f"{name}:{part(inner, kind.get(name.strip()))}" for name, inner in pairs) + "}"
    return source


def _parsed(override: str) -> tuple[Any, bool]:
    """The value's node in Hydra's syntax tree, and whether it is a sweep; (None, False) where Hydra cannot read it."""
    try:
        is_sweep = OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:
        return None, False
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override))))
    value = parser.override().value()
    return value.element() or value.simpleChoiceSweep(), is_sweep


def _values(node: Any) -> list[Any]:
    """The values that a sweep names, `a,b` or `choice(a,b)`. Of any other sweep none."""
    if isinstance(node, OverrideParser.SimpleChoiceSweepContext):
        return list(node.element())
    function = node.function()
    return list(function.element()) if function.ID().getText() == "choice" else []
