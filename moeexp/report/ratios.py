"""Ratios of speeds as text, with the marks beside them and what those mean."""

from __future__ import annotations

from collections.abc import Iterable

from moeexp.report.format import APART, NONE, WEIGHTS, number, percent
from moeexp.report.intervals import Interval

SAME = "the same"
UNSAID = ("–", NONE, SAME)  # a column of nothing else says nothing
LOADED = "‡"  # marks a ratio of runs under unlike load
LATE = (
    "Where medians, or speeds without stalls, say otherwise than the ratio of speeds, late tokens make the difference: such a "
    "gain or loss is a stall's, or hidden by one."
)


def times(gain: Interval | None, *, marked: bool = True, beside: bool = False) -> str:
    """A ratio of speeds with its interval, as text. `marked`: with the marks that `legend` explains; `beside`: and what it is
    by medians and without stalls, where no columns of their own say that."""
    if gain is None:
        return "–"
    text = f"× {three(gain.value)}"
    if gain.low is not None and gain.high is not None:
        text += f" [{three(gain.low)}, {three(gain.high)}]"
    parts = {"by medians": by_medians(gain), "without stalls": without_stalls(gain)} if beside else {}
    text += "".join(f", {name} {part}" for name, part in parts.items() if part not in UNSAID)
    return f"{text} {marks(gain)}" if marked and marks(gain) else text


def by_medians(gain: Interval | None) -> str:
    return f"× {three(gain.medians.value)}" if gain and gain.medians else "–"


def without_stalls(gain: Interval | None) -> str:
    if gain is None or gain.corrected is None:
        return "–"
    text = three(gain.corrected.value)
    return SAME if text == three(gain.value) else f"× {text}"


def marks(gain: Interval) -> str:
    return APART * (not gain.in_turns) + LOADED * gain.unlike_load + WEIGHTS * bool(gain.weights)


def legend(gains: Iterable[Interval | None]) -> str:
    """What the marks and verdicts of these ratios mean; empty where they need no word."""
    shown = [gain for gain in gains if gain is not None]
    noise = [gain.run_to_run for gain in shown if not gain.in_turns]
    parts = []
    if noise:
        span = " to ".join(dict.fromkeys((percent(min(noise)), percent(max(noise)))))
        parts.append(f"{APART} Not timed in turns: the interval allows for run-to-run noise of {span}.")
    if any(gain.unlike_load for gain in shown):
        parts.append(f"{LOADED} Other processes loaded the CPU more during one side than during the other.")
    weights = "; ".join(dict.fromkeys(gain.weights for gain in shown if gain.weights))
    if weights:
        parts.append(f"{WEIGHTS} The weights differ in quantisation ({weights}): the ratio is not the engine's alone.")
    if any(gain.doubt for gain in shown):
        parts.append(LATE)
    if any(gain.idle for gain in shown):
        parts.append("Not applicable here: the setting has no effect on this device or beside the others: noise is seen.")
    return " ".join(parts)


def three(value: float) -> str:
    """Three significant digits, also where the last ones are zeros; just above 1 four, as just below it: 1.003 and 0.997."""
    if 1 <= abs(value) < 1.1:
        return f"{value:.3f}"
    return f"{value:#.3g}".removesuffix(".") if 0.001 <= abs(value) < 1000 else number(value)
