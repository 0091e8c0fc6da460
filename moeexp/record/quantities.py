"""What the shapes of a record are made of: numbers within what a run can be, dates, names, and the base of all shapes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moeexp.record.names import DATE, ID

LARGEST = 1e15  # bytes, tokens, seconds, watts
SMALLEST = 1e-6  # tokens per second, milliseconds, GB: below it is nothing


def _text_like(pattern: Any, what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(what)
        return text

    return AfterValidator(check)


def _date(text: str) -> str:
    if not DATE.fullmatch(text):
        raise ValueError("it should be a date with a zone, as 2026-01-31T12:00:00+00:00")
    datetime.fromisoformat(text)
    return text


def measured(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"it should be 0, or {SMALLEST:g} or more")
    return value


Id = Annotated[str, _text_like(ID, "it should be letters, digits, dots, dashes and underscores")]
Date = Annotated[str, AfterValidator(_date)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST), AfterValidator(measured)]
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
# Of a broken run: any number, or the text or null in the place of one that is not finite.
Outcome = float | Literal["nan", "inf", "-inf"] | None
Texts = list[str]
TextRows = list[str] | str | None


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
