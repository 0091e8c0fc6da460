"""Curves beside each other as an SVG file of its own, for a page that is not the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moeexp.report.curves import Curve
from moeexp.report.html import svg
from moeexp.report.html.sections import points_of
from moeexp.report.html.template import render

WIDE, HEIGHT, GAP = 280, 270, 24  # pixels
APART = 12.0  # percent of a panel's width that the text of a tick takes


def panels(curves: Sequence[Curve], *, label: str) -> str:
    """`label`: what it shows, for those who cannot see it."""
    drawn: list[dict[str, Any]] = [
        {
            "title": curve.title, "x_unit": curve.x_unit, "y_unit": curve.y_unit, "left": GAP + i * (WIDE + GAP), "wide": WIDE,
            # Without what a pointer shows in the report: an image has none.
            "drawn": svg.curve([replace(point, hint="") for point in points_of(curve)], apart=APART),
        }
        for i, curve in enumerate(curves)
    ]  # fmt: skip
    return f"{render('panels', panels=drawn, width=GAP + len(drawn) * (WIDE + GAP), height=HEIGHT, label=label)}\n"
