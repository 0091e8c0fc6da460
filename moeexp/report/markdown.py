"""Records as Markdown, for a pull request: table, waterfall, effects, interactions, what is not comparable."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from moeexp.report import processes, table
from moeexp.report.ablation import Part, Stack, stacks
from moeexp.report.conditions import odd_ones
from moeexp.report.effects import MEANING, interactions, main_effects
from moeexp.report.format import APART, NONE, STALLS, WEIGHTS, number, percent, stalls_text
from moeexp.report.intervals import Interval, tokens_per_step
from moeexp.report.runs import Run, runs_of, settings_text
from moeexp.report.waterfall import Step, waterfalls

SAME = "the same"
UNSAID = ("–", NONE, SAME)  # a column of nothing else says nothing
BAR = 24  # characters of the longest bar
LOADED = "‡"  # marks a ratio of runs under unlike load
LATE = (
    "Where medians, or speeds without stalls, say otherwise than the ratio of speeds, late tokens make the difference: such a "
    "gain or loss is a stall's, or hidden by one."
)


def document(records: Sequence[dict[str, Any]]) -> str:
    runs = runs_of(records)
    commands = dict.fromkeys(shlex.join(record["command"]) for record in records)
    head = "".join(f"{'- ' * (len(commands) > 1)}`{command}`\n" for command in commands)
    parts = [head, table.markdown(records), _processes(runs), _waterfalls(runs), _effects(runs)]
    parts += [_interactions(runs), _stacks(runs), _unlike(records)]
    return "\n".join(part for part in parts if part)


def times(gain: Interval | None, *, marked: bool = True, beside: bool = False) -> str:
    """A ratio of speeds with its interval, as text. `marked`: with the marks that `legend` explains; `beside`: and what it is
    by medians and without stalls, where no columns of their own say that."""
    if gain is None:
        return "–"
    known = gain.low is not None and gain.high is not None
    text = f"× {three(gain.value)}" + (f" [{three(gain.low)}, {three(gain.high)}]" if known else "")
    parts = {"by medians": by_medians(gain), "without stalls": without_stalls(gain)} if beside else {}
    text += "".join(f", {name} {part}" for name, part in parts.items() if part not in UNSAID)
    return f"{text} {_marks(gain)}" if marked and _marks(gain) else text


def by_medians(gain: Interval | None) -> str:
    return f"× {three(gain.medians.value)}" if gain and gain.medians else "–"


def without_stalls(gain: Interval | None) -> str:
    if gain is None or gain.corrected is None:
        return "–"
    text = three(gain.corrected.value)
    return SAME if text == three(gain.value) else f"× {text}"


def _marks(gain: Interval) -> str:
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
        parts.append("Not applicable here: the setting has nothing to act on in these runs, and what is seen is noise.")
    return " ".join(parts)


def three(value: float) -> str:
    """Three significant digits, also where the last ones are zeros; just above 1 four, as just below it: 1.003 and 0.997."""
    if 1 <= abs(value) < 1.1:
        return f"{value:.3f}"
    return f"{value:#.3g}".removesuffix(".") if 0.001 <= abs(value) < 1000 else number(value)


def _processes(runs: Sequence[Run]) -> str:
    found = processes.processes(runs)
    if not found:
        return ""
    return "### Processes\n\n" + markdown_table(processes.HEADER, processes.rows(found)) + _below(processes.NOTE)


def _waterfalls(runs: Sequence[Run]) -> str:
    texts = []
    for steps in waterfalls(runs):
        of = settings_text(steps[0].run.workload)
        text = f"### Speed-up{', ' + of if of else ''}\n\n```text\n" + "\n".join(_bars(steps)) + "\n```\n\n"
        texts.append(text + markdown_table(*steps_table(steps)) + _below(steps_legend(steps)))
    return "\n".join(texts)


def _bars(steps: Sequence[Step]) -> list[str]:
    most = max(step.run.speed.tok_s for step in steps if step.run.speed)
    width = max(len(step.label) for step in steps if step.run.prepared)
    lines = []
    for step in steps:
        if not step.run.prepared:
            continue  # the table lists it
        if step.run.speed is None:
            lines.append(f"{step.label:<{width}}  {step.run.record['status']}")
            continue
        bar = "█" * max(round(BAR * step.run.speed.tok_s / most), 1)
        gain = "" if step.gain is None else f"  {step.gain.verdict}" if step.gain.idle else f"  × {three(step.gain.value)}"
        lines.append(f"{step.label:<{width}}  {number(step.run.speed.tok_s):>8} tok/s  {bar:<{BAR}}{gain}".rstrip())
    return lines


def steps_table(steps: Sequence[Step]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each step is, how fast, what it gained, and what that may come from."""
    header = [
        "step", "tok/s", "ms/token", "gain over the one before", "by medians", "without stalls", "verdict", "in all",
        "in all, by medians", STALLS, "kernels/token", "host µs/token", "check",
    ]  # fmt: skip
    rows = []
    for step in steps:
        record = step.run.record
        speed = step.run.speed
        rows.append(
            [
                step.label,
                number(speed.tok_s if speed else None),
                number(1e3 * tokens_per_step(record) / speed.tok_s if speed else None),
                times(step.gain),
                by_medians(step.gain),
                without_stalls(step.gain),
                step.gain.phrase if step.gain else "" if speed else record["status"],
                f"× {three(step.total.value)} {_marks(step.total)}".strip() if step.total else "–",
                by_medians(step.total),
                stalls_text(record),
                number(record["kernels_per_token"]),
                number((record.get("time_split") or {}).get("host_us")),
                _check(record),
            ]
        )
    kept = [column for column in range(len(header)) if any(row[column] not in UNSAID for row in rows)]
    return [header[column] for column in kept], [[row[column] for column in kept] for row in rows]


def steps_legend(steps: Sequence[Step]) -> str:
    return legend(gain for step in steps for gain in (step.gain, step.total))


def _below(line: str) -> str:
    """A line under a table."""
    return f"\n{line}\n" if line else ""


def _check(record: dict[str, Any]) -> str:
    passed = (record["check"] or {}).get("passed")
    return "–" if passed is None else "passed" if passed else "FAILED"


def _effects(runs: Sequence[Run]) -> str:
    effects = main_effects(runs)
    if not effects:
        return ""
    rows = [
        [
            f"`{effect.axis}`",
            f"{effect.base} → {effect.level}",
            times(effect.ratio),
            by_medians(effect.ratio),
            effect.ratio.phrase,
            f"{effect.pairs}",
            f"{three(effect.least)} … {three(effect.most)}",
        ]
        for effect in effects
    ]
    header = ["setting", "change", "decode speed", "by medians", "verdict", "matched pairs", "their range"]
    head = "\nOver runs that differ in this setting alone; 95 % intervals.\n"
    return "### Effects\n\n" + markdown_table(header, rows) + head + _below(legend(effect.ratio for effect in effects))


def _interactions(runs: Sequence[Run]) -> str:
    found = interactions(runs)
    if not found:
        return ""
    rows = [
        [
            f"`{one.first[0]}={one.first[2]}`",
            f"`{one.second[0]}={one.second[2]}`",
            f"× {three(one.alone[0])}, × {three(one.alone[1])}",
            f"× {three(one.together)}",
            times(one.ratio, beside=True),
            one.phrase,
        ]
        for one in found
    ]
    header = ["setting", "with", "alone", "together", "against the product", "verdict"]
    seen = dict.fromkeys(one.verdict for one in found)
    meaning = "; ".join(f"{word}: {MEANING[word]}" for word in seen if word in MEANING)
    lines = _below(f"{meaning}." if meaning else "") + _below(legend(one.ratio for one in found))
    return "### Interactions\n\n" + markdown_table(header, rows) + lines


def _stacks(runs: Sequence[Run]) -> str:
    text = ""
    for stack in stacks(runs):
        text += "### Alone and in the full stack\n\n" + markdown_table(*stack_table(stack)) + _below(stack_line(stack))
        text += _below(stack_legend(stack))
    return text


def stack_table(stack: Stack) -> tuple[list[str], list[list[str]]]:
    rows = [
        [part.axis, f"{part.base} → {part.level}", times(part.alone, beside=True), times(part.last, beside=True), _shared(part)]
        for part in stack.parts
    ]
    return ["setting", "change", "alone, on the baseline", "last, on all the others", "verdict"], rows


def _shared(part: Part) -> str:
    found = [gain for gain in (part.alone, part.last) if gain]
    if found and all(gain.idle for gain in found):
        return found[0].verdict
    if part.ratio is None or part.ratio.low is None:
        return "–"
    verdicts = {
        "no difference": "the same in both", "faster": "more with the others", "slower": "less with the others",
    }  # fmt: skip
    text = verdicts.get(part.ratio.verdict, part.ratio.verdict)
    return text + "".join(f", but {verdicts[seen]} {' and '.join(names)}" for seen, names in part.ratio.dissent.items())


def stack_line(stack: Stack) -> str:
    line = f"All together: {times(stack.together, beside=True)}"
    if stack.product is None or stack.ratio is None:
        return line + "."
    line += f"; the product of what each buys alone: {times(stack.product)}"
    return line + f", so together {times(stack.ratio)} of it."


def stack_legend(stack: Stack) -> str:
    parts = [gain for part in stack.parts for gain in (part.alone, part.last)]
    return legend([*parts, stack.together, stack.product, stack.ratio])


def _unlike(records: Sequence[dict[str, Any]]) -> str:
    lines = odd_ones(records)
    return "### Conditions\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
