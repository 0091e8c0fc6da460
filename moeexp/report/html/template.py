"""The page's templates. Escaping is on: what no template has made is text, whatever it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from moeexp.record.text import visible


def _shown(value: Any) -> Any:
    return visible(value, lines=True) if type(value) is str else value


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Where a narrow column may break a setting's name, which is one long word.
_ENVIRONMENT.filters["joints"] = lambda text: re.split(r"(?<=[_.:])(?=\w)", text)


def render(name: str, **values: Any) -> Markup:
    """templates/<name>.html of these values."""
    return Markup(_ENVIRONMENT.get_template(f"{name}.html").render(values).rstrip("\n"))


def joined(parts: Iterable[str]) -> Markup:
    """One after the other; a part that no template has made is escaped."""
    return Markup("").join(parts)


def carried(value: Any) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    return htmlsafe_json_dumps(value, dumps=json.dumps, allow_nan=False, separators=(",", ":"))


def paragraph(text: str, css: str = "") -> Markup:
    """Nothing for an empty text."""
    return render("paragraph", text=text, css=css) if text else Markup("")


def heading(text: str) -> Markup:
    return render("heading", text=text) if text else Markup("")
