"""The tables that a report makes of its runs. Each is made here once, and written as Markdown or as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeexp.report import budget, processes
from moeexp.report.ablation import Ablation, Factor, stacks
from moeexp.report.curves import shown
from moeexp.report.effects import MEANING, interactions, main_effects
from moeexp.report.format import STALLS, number, stalls_text
from moeexp.report.intervals import tokens_per_step
from moeexp.report.ratios import UNSAID, by_medians, legend, marks, three, times, without_stalls
from moeexp.report.records import cell_of
from moeexp.report.runs import Run, settings_text
from moeexp.report.waterfall import Step, waterfalls

BAR = 24  # characters of the longest bar
ORDER = {"combine": 0, "cancel": 1, "overlap": 2}  # of interactions; what is independent comes last


@dataclass(frozen=True)
class Table:
    """`of`: what it is about, where a report may have several; `notes`: lines under it; `bars`: a chart of text above it, in
    place of the drawn one of HTML. Of HTML: `css`, the classes of columns, and `kinds`, a class for each row's last cell."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    of: str = ""
    bars: Sequence[str] = ()
    css: Sequence[str] = ()
    kinds: Sequence[str] = ()


def process_tables(runs: Sequence[Run]) -> list[Table]:
    found = processes.processes(runs)
    return [Table(processes.HEADER, processes.rows(found), [processes.NOTE], css=["wrap"])] if found else []


def budget_tables(runs: Sequence[Run]) -> list[Table]:
    return [one for run in runs for one in budget_of(run.record, cell_of(run.record) or settings_text(run.settings.items()))]


def budget_of(record: dict[str, Any], of: str = "") -> list[Table]:
    """The two tables of a record that has a budget."""
    if not budget.has_budget(record):
        return []
    layers = budget.layer_rows(record)
    figures = ["number"] * (len(budget.KERNELS) - 2)
    found = [Table(budget.KERNELS, budget.kernel_rows(record), budget.kernel_notes(record), of=of, css=["", "wrap", *figures])]
    if layers:
        found.append(
            Table(budget.LAYERS, layers, of=f"{of}, by layer".removeprefix(", "), css=["", *figures[: len(budget.LAYERS) - 1]])
        )
    return found


def step_tables(runs: Sequence[Run]) -> list[Table]:
    return [steps_table(steps) for steps in waterfalls(runs)]


def steps_table(steps: Sequence[Step]) -> Table:
    """What each step is, how fast, what it gained, and what that may come from."""
    header = [
        "step", "tok/s", "ms/token", "gain over the one before", "by medians", "without stalls", "verdict", "in all",
        "in all, by medians", STALLS, "kernels/token", "host µs/token", "check",
    ]  # fmt: skip
    rows = []
    for step in steps:
        record, speed = step.run.record, step.run.speed
        rows.append(
            [
                step.label,
                number(speed.tok_s if speed else None),
                number(1e3 * tokens_per_step(record) / speed.tok_s if speed else None),
                times(step.gain),
                by_medians(step.gain),
                without_stalls(step.gain),
                step.gain.phrase if step.gain else "" if speed else record["status"],
                f"× {three(step.total.value)} {marks(step.total)}".strip() if step.total else "–",
                by_medians(step.total),
                stalls_text(record),
                number(record["kernels_per_token"]),
                number((record.get("time_split") or {}).get("host_us")),
                _check(record),
            ]
        )
    kept = [column for column in range(len(header)) if any(row[column] not in UNSAID for row in rows)]
    css = {"step": "wrap", "verdict": "wrap", "tok/s": "number", "ms/token": "number"}
    return Table(
        [header[column] for column in kept],
        [[row[column] for column in kept] for row in rows],
        [legend(gain for step in steps for gain in (step.gain, step.total))],
        of=settings_text(steps[0].run.workload),
        bars=_bars(steps),
        css=[css.get(header[column], "") for column in kept],
    )


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


def _check(record: dict[str, Any]) -> str:
    passed = (record["check"] or {}).get("passed")
    return "–" if passed is None else "passed" if passed else "FAILED"


def effect_tables(runs: Sequence[Run]) -> list[Table]:
    effects = main_effects(runs)
    header = ["setting", "change", "decode speed", "by medians", "verdict", "matched pairs", "their range"]
    rows = [
        [
            effect.axis, f"{effect.base} → {effect.level}", times(effect.ratio), by_medians(effect.ratio),
            effect.ratio.phrase, f"{effect.pairs}", f"{three(effect.least)} … {three(effect.most)}",
        ]
        for effect in effects
    ]  # fmt: skip
    notes = ["Over runs that differ in this setting alone; 95 % intervals.", legend(effect.ratio for effect in effects)]
    return [Table(header, rows, notes)] if effects else []


def interaction_tables(runs: Sequence[Run]) -> list[Table]:
    found = sorted(interactions(runs), key=lambda one: ORDER.get(one.verdict, len(ORDER)))
    header = ["setting", "with", "alone", "together", "against the product", "verdict"]
    rows = [
        [
            *(f"{axis}: {base} → {level}" for axis, base, level in (one.first, one.second)),
            f"× {three(one.alone[0])}, × {three(one.alone[1])}", f"× {three(one.together)}", times(one.ratio, beside=True),
            one.phrase,
        ]
        for one in found
    ]  # fmt: skip
    meaning = [f"{word}: {MEANING[word]}" for word in dict.fromkeys(one.verdict for one in found) if word in MEANING]
    notes = ["; ".join(meaning) + "." if meaning else "", legend(one.ratio for one in found)]
    css, kinds = ["", "", "number", "number", "number"], [one.verdict.replace(" ", "-") for one in found]
    return [Table(header, rows, notes, css=css, kinds=kinds)] if found else []


def stack_tables(runs: Sequence[Run]) -> list[Table]:
    return [stack_table(stack) for stack in stacks(runs)]


def stack_table(stack: Ablation) -> Table:
    rows = [
        [part.axis, f"{part.base} → {part.level}", times(part.alone, beside=True), times(part.last, beside=True), _shared(part)]
        for part in stack.parts
    ]
    line = f"All together: {times(stack.together, beside=True)}"
    if stack.product is not None and stack.ratio is not None:
        line += f"; the product of what each buys alone: {times(stack.product)}, so together {times(stack.ratio)} of it"
    gains = [gain for part in stack.parts for gain in (part.alone, part.last)]
    return Table(
        ["setting", "change", "alone, on the baseline", "last, on all the others", "verdict"],
        rows,
        [f"{line}.", legend([*gains, stack.together, stack.product, stack.ratio])],
        of=f"{settings_text(stack.baseline.point)} → {settings_text(stack.full.point)}",
        css=["", "", "number", "number"],
    )


def _shared(part: Factor) -> str:
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


def curve_tables(runs: Sequence[Run]) -> list[Table]:
    found, note = shown(runs)
    return [
        Table(
            [curve.x_unit, curve.y_unit, "run"],
            [[number(point.x), number(point.y), cell_of(point.run.record) or point.run.id] for point in curve.points],
            [note],
            of=curve.name,
        )
        for curve in found
    ]


# In the order of a report.
TABLES: dict[str, Callable[[Sequence[Run]], list[Table]]] = {
    "Processes": process_tables,
    "Speed-up": step_tables,
    "Effects": effect_tables,
    "Interactions": interaction_tables,
    "Alone and in the full stack": stack_tables,
    "Curves": curve_tables,
    "Budget of a step": budget_tables,
}
