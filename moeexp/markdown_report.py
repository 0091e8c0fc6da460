"""Records as Markdown, for a pull request: table, waterfall, effects, interactions, what is not comparable."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from moeexp import report
from moeexp.conditions import odd_ones
from moeexp.effects import MEANING, interactions, main_effects
from moeexp.report import number
from moeexp.runs import Run, runs_of, settings_text
from moeexp.statistics import Interval
from moeexp.waterfall import Step, waterfalls

BAR = 24  # characters of the longest bar


def document(records: Sequence[dict[str, Any]]) -> str:
    runs = runs_of(records)
    commands = dict.fromkeys(shlex.join(record["command"]) for record in records)
    head = "".join(f"`{command}`\n" for command in commands)
    parts = [head, report.markdown(records), _waterfalls(runs), _effects(runs), _interactions(runs), _unlike(records)]
    return "\n".join(part for part in parts if part)


def times(gain: Interval | None) -> str:
    """A ratio of speeds with its interval, as text."""
    if gain is None:
        return "–"
    if gain.low is None or gain.high is None:
        return f"× {gain.value:.3g}"
    return f"× {gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}]"


def _waterfalls(runs: Sequence[Run]) -> str:
    text = ""
    for steps in waterfalls(runs):
        of = settings_text(steps[0].run.workload)
        text += f"### Speed-up{', ' + of if of else ''}\n\n```text\n" + "\n".join(_bars(steps)) + "\n```\n"
        if not all(step.in_turns for step in steps if step.gain):
            text += "\nNot timed in turns: drift of the machine between the runs is in these gains.\n"
    return text


def _bars(steps: Sequence[Step]) -> list[str]:
    most = max(step.run.speed.tok_s for step in steps if step.run.speed)
    width = max(len(step.label) for step in steps)
    lines = []
    for step in steps:
        if step.run.speed is None:
            lines.append(f"{step.label:<{width}}  {step.run.record['status']}")
            continue
        bar = "█" * max(round(BAR * step.run.speed.tok_s / most), 1)
        gain = f"  {times(step.gain)} {step.gain.verdict}" if step.gain else ""
        total = f", × {step.total.value:.3g} in all" if step.total and step.gain else ""
        speed = f"{number(step.run.speed.tok_s):>8} tok/s"
        lines.append(f"{step.label:<{width}}  {speed}  {bar:<{BAR}}{gain}{total}".rstrip())
    return lines


def _effects(runs: Sequence[Run]) -> str:
    effects = main_effects(runs)
    if not effects:
        return ""
    rows = [
        [
            f"`{effect.axis}`",
            f"{effect.base} → {effect.level}",
            times(effect.ratio),
            effect.ratio.verdict,
            f"{effect.pairs}",
            f"{effect.least:.3g} … {effect.most:.3g}",
        ]
        for effect in effects
    ]
    header = ["setting", "change", "decode speed", "verdict", "matched pairs", "their range"]
    return "### Effects\n\n" + _table(header, rows) + "\nOver runs that differ in this setting alone; 95 % intervals.\n"


def _interactions(runs: Sequence[Run]) -> str:
    found = interactions(runs)
    if not found:
        return ""
    rows = [
        [
            f"`{one.first[0]}={one.first[2]}`",
            f"`{one.second[0]}={one.second[2]}`",
            f"× {one.alone[0]:.3g}, × {one.alone[1]:.3g}",
            f"× {one.together:.3g}",
            times(one.ratio),
            one.verdict,
        ]
        for one in found
    ]
    header = ["setting", "with", "alone", "together", "against the product", "verdict"]
    seen = dict.fromkeys(one.verdict for one in found)
    legend = "; ".join(f"{word}: {MEANING[word]}" for word in seen if word in MEANING)
    return "### Interactions\n\n" + _table(header, rows) + (f"\n{legend}.\n" if legend else "")


def _unlike(records: Sequence[dict[str, Any]]) -> str:
    lines = odd_ones(records)
    return "### Conditions\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":--"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
