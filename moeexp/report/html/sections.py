"""The report's charts: what each section draws from the runs, or an empty text where they have nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from moeexp.report.conditions import CONDITIONS, LOAD, conditions
from moeexp.report.curves import Curve, shown
from moeexp.report.effects import main_effects
from moeexp.report.format import number
from moeexp.report.html import svg
from moeexp.report.html import table as html_table
from moeexp.report.html.svg import Bar, BarRow, Point, Scale
from moeexp.report.html.template import heading, joined, paragraph, render
from moeexp.report.intervals import tokens_per_step
from moeexp.report.ratios import by_medians, legend, three, times
from moeexp.report.records import cell_of
from moeexp.report.runs import Run, settings_text
from moeexp.report.tables import TABLES, Table, steps_table
from moeexp.report.waterfall import Step, waterfalls

MOST = 40  # rows of a chart
LONG = 60  # characters of a setting in a label


def label_of(run: Run) -> str:
    """What tells this run from the others."""
    own = run.settings if run.prepared else run.settings | run.asked
    settings = [(axis, value if len(value) <= LONG else value[:LONG] + "…") for axis, value in own.items()]
    return cell_of(run.record) or settings_text(settings) or run.id


def _tables(name: str) -> Callable[[Sequence[Run], Sequence[Run]], Markup]:
    """A section of tables alone."""
    return lambda runs, ranked: joined(map(html_table.table, TABLES[name](runs)))


def _waterfall(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    text = Markup("")
    for steps in waterfalls(runs):
        table = steps_table(steps)
        most = max(step.run.speed.tok_s for step in steps if step.run.speed)
        drawn, before = [], None
        for step in (step for step in steps if step.run.prepared):  # the table lists the others
            drawn.append(_step(step, before))
            before = step.run.speed.tok_s if step.run.speed else before
        text += heading(table.of) + svg.rows(drawn, Scale(0, most), "tok/s")
        text += html_table.table(replace(table, of=""))
    head = paragraph("Decode speed, and what each step gained over the one before, with its 95 % interval.")
    return head + text if text else text


def _step(step: Step, before: float | None) -> BarRow:
    if step.run.speed is None:
        return BarRow(step.label, step.run.record["status"], run=step.run.id)
    speed = step.run.speed.tok_s
    if before is None or step.gain is None:
        bars = [Bar(0, speed, "bar", f"{number(speed)} tok/s")]
    else:
        # Colour is for what is more than noise; without an interval nobody knows.
        kind = {"no difference": "level", "slower": "loss"}.get(step.gain.verdict, "gain" if speed >= before else "loss")
        kind = "level" if step.gain.unlike_load or step.gain.idle else kind
        change = Bar(before, speed, kind, f"{number(before)} to {number(speed)} tok/s")
        bars = [Bar(0, min(before, speed), "before"), change]
    note = f"{times(step.gain)}, by medians {by_medians(step.gain)}: {step.gain.phrase}" if step.gain else ""
    return BarRow(step.label, f"{number(speed)} tok/s", bars, note, run=step.run.id)


def _latencies(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    having = [run for run in ranked if any((run.record["token_latencies_ms"] or {}).get("samples", ()))][:MOST]
    if not having:
        return Markup("")
    latencies = [run.record["token_latencies_ms"] for run in having]
    low = min(min(sample for sample in one["samples"] if sample > 0) for one in latencies)
    # The slowest single tokens would press all the rest together: the axis ends beyond the worst p99.
    high = max(low, *(one["p99"] for one in latencies)) * 1.25
    drawn = []
    for run, one in zip(having, latencies, strict=True):
        marks = [(one[p], f"{p} {number(one[p])} ms") for p in ("p50", "p90", "p99")]
        value = f"p50 {number(one['p50'])} ms"
        note = f"p90 {number(one['p90'])}, p99 {number(one['p99'])}, n {one['n']:,}"
        stalls = run.record["stalls"]
        if stalls and stalls["count"]:
            note += f"; {stalls['count']} stalls, {number(stalls['total_ms'])} ms"
        drawn.append(BarRow(label_of(run), value, note=note, run=run.id, samples=one["samples"], marks=marks))
    head = paragraph(
        "Time from one token to the next, logarithmic. Lines are p50, p90 and p99; what is slower than the axis counts in "
        "its last bin."
    )
    return head + svg.rows(drawn, Scale(low, high, log=True), "ms") + _cut(ranked)


def _memory(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    peaks = [(run, peak) for run in ranked if (peak := html_table.peak_gib(run.record))][:MOST]
    having = [run for run, _ in peaks]
    if not peaks:
        return Markup("")
    drawn = []
    for run, peak in peaks:
        memory = run.record["memory_gib"]
        weights, state = memory.get("weights", 0.0), memory.get("state", 0.0)
        bars = [
            Bar(0, weights, "weights", f"weights {number(weights)} GiB"),
            Bar(weights, weights + state, "state", f"state {number(state)} GiB"),
            Bar(weights + state, peak, "rest", f"everything else {number(peak - weights - state)} GiB"),
        ]
        note = f"weights {number(weights)}, state {number(state)}"
        drawn.append(BarRow(label_of(run), f"{number(peak)} GiB", bars, note, run=run.id))
    on_gpu = any("device_in_use" in run.record["memory_gib"] for run in having)
    what = "device memory in use" if on_gpu else "peak memory of the process, check and reference included"
    legend = _legend({"weights": "part-1", "state": "part-2", f"the rest of {what}": "part-4"})
    scale = Scale(0, max(peak for _, peak in peaks))
    return legend + svg.rows(drawn, scale, "GiB") + _cut(ranked)


def _curves(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    found, note = shown(runs)
    return paragraph(note) + joined(map(_curve, found)) if found else Markup("")


def _curve(curve: Curve) -> Markup:
    drawn = svg.curve(points_of(curve))
    plot = render("scatter", shapes=drawn.shapes, points=drawn.points, axis=drawn.axis, x_unit=curve.x_unit, y_unit=curve.y_unit)
    return heading(curve.name) + plot


def points_of(curve: Curve) -> list[Point]:
    return [
        Point(
            point.x, point.y, number(point.y),
            f"{label_of(point.run)}: {number(point.y)} {curve.y_unit} at {number(point.x)} {curve.x_unit}", point.run.id,
        )
        for point in curve.points
    ]  # fmt: skip


def _roofline(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    points: list[Point] = []
    bandwidths: dict[str, float] = {}
    for rank, run in enumerate(ranked[:MOST], 1):
        floor = run.record["bytes_per_token"]
        bandwidth = floor.get("read_bandwidth_gb_s") if floor else None
        # Without a share the bytes are not all read from memory, or not known.
        if run.speed is None or not bandwidth or run.record["bandwidth_share"] is None:
            continue
        machine = conditions(run.record)["GPU"] or conditions(run.record)["CPU"] or "this machine"
        bandwidths[machine] = max(bandwidth, bandwidths.get(machine, 0.0))
        # A step reads its bytes once for the whole batch.
        gb, steps = floor["total"] / 1e9, run.speed.tok_s / tokens_per_step(run.record)
        share = gb * steps / bandwidth
        hint = f"#{rank} {label_of(run)}: {number(gb)} GB per step, {number(steps)} steps/s, {share:.1%} of bandwidth"
        points.append(Point(gb, steps, f"#{rank} {number(100 * share)} %", hint, run.id))
    if not points:
        return Markup("")
    roofs = [(c, f"{machine}: {number(c)} GB/s") for machine, c in bandwidths.items()]
    least = min(point.x for point in points)
    high = 1.3 * max(c / least for c in bandwidths.values())
    head = paragraph(
        "A decode step must read its weights and state once; the line is what the measured read bandwidth "
        f"({'; '.join(name for _, name in roofs)}) allows. A label is the run's rank and its share of that. "
        "A run whose bytes fit a cache of the device has no place here."
    )
    plot = svg.scatter(points, roofs, x_unit="GB read per step", y_unit="decode steps/s", roof_y=high)
    return head + plot


def _effects(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    effects = main_effects(runs)
    if not effects:
        return Markup("")
    drawn = []
    for effect in effects:
        found = effect.ratio
        bars = [Bar(found.value, found.value, "dot", times(found))]
        if found.low is not None and found.high is not None:
            bars.insert(0, Bar(found.low, found.high, "range"))
        pairs = f"{effect.pairs} pair{'s' if effect.pairs > 1 else ''}"
        spread = f", {three(effect.least)} to {three(effect.most)}" if effect.pairs > 1 else ""
        label = f"{effect.axis}: {effect.base} → {effect.level}"
        drawn.append(BarRow(label, times(found), bars, f"by medians {by_medians(found)}; {found.phrase}; {pairs}{spread}"))
    values = [v for effect in effects for v in (effect.ratio.value, effect.ratio.low, effect.ratio.high) if v]
    scale = Scale(min(*values, 1.0) / 1.05, max(*values, 1.0) * 1.05, log=True)
    head = paragraph(
        "What each setting does to decode speed: geometric mean over pairs of runs that differ in it alone, with "
        "the 95 % interval of each by itself; where that spans 1 there is no difference to speak of."
    )
    marks = paragraph(legend(effect.ratio for effect in effects), "soft")
    return head + svg.rows(drawn, scale, "× speed", zero=1.0) + marks


# They add up to the wall-clock time.
PARTS = ("kernels", "copies", "gaps", "host")


def _time_split(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    having = [run for run in ranked if run.record.get("time_split")][:MOST]
    if not having:
        return Markup("")
    drawn, longest = [], 0.0
    for run in having:
        split, at, bars = run.record["time_split"], 0.0, []
        for part in PARTS:
            us = split.get(f"{part}_us") or 0.0
            bars.append(Bar(at, at + us, part, f"{part} {number(us)} µs"))
            at += us
        longest = max(longest, at)
        note = ", ".join(f"{part} {number(split.get(f'{part}_us'))}" for part in PARTS)
        drawn.append(BarRow(label_of(run), f"{number(split.get('wall_us'))} µs", bars, note, run=run.id))
    names = ("GPU kernels", "copies", "gaps between them", "waiting for the host")
    legend = _legend(dict(zip(names, ("part-1", "part-2", "part-4", "part-3"), strict=True)))
    head = paragraph(
        "Where a token's time goes, from a profiled pass of its own that is no part of the timing. Gaps are the GPU's "
        "own between two kernels; while it waits for the host it has nothing to do."
    )
    return head + legend + svg.rows(drawn, Scale(0, longest or 1.0), "µs") + _cut(ranked)


def _environment(runs: Sequence[Run], ranked: Sequence[Run]) -> Markup:
    rows = []
    # A cell that never ran knows no machine.
    ran = [run for run in runs if run.prepared] or runs
    for name in (name for name in CONDITIONS if name != LOAD):  # of each run, under "While timed"
        values: dict[str, list[str]] = {}
        for run in ran:
            value = conditions(run.record)[name]
            if value is not None:
                values.setdefault(str(value), []).append(run.id)
        parts = [value if len(values) == 1 else f"{value} ({len(ids)} runs)" for value, ids in values.items()]
        if parts:
            rows.append([name, "; ".join(parts)])
    versions = (ran[0].record["environment"] or {}).get("versions") or {}
    rows.append(["versions of the first run", ", ".join(f"{k} {v}" for k, v in versions.items() if v)])
    return html_table.table(Table(["condition", "value"], rows, css=["", "wrap"])) + (_telemetry(ranked) or _gpu_states(ranked))


TELEMETRY = {
    "sm_mhz": "SM MHz", "memory_mhz": "memory MHz", "power_w": "power W", "temperature_c": "°C", "load": "load",
    "mhz": "CPU MHz",
}  # fmt: skip


def _telemetry(ranked: Sequence[Run]) -> Markup:
    """The machine while each run was timed: least, median and most of each quantity, and what slowed it down."""
    having = [run for run in ranked[:MOST] if run.record.get("telemetry")]
    having = [run for run in having if run.record["telemetry"].get("n") or run.record["telemetry"].get("other_load")]
    names = [name for name in TELEMETRY if any(name in run.record["telemetry"] for run in having)]
    rows = []
    for run in having:
        seen = run.record["telemetry"]
        ranges = [
            f"{number(seen[name]['min'])} – {number(seen[name]['median'])} – {number(seen[name]['max'])}" if name in seen else "–"
            for name in names
        ]
        reasons = seen.get("throttle_reasons") or {}
        slowed = ", ".join(f"{reason} {share:.0%} of the time" for reason, share in reasons.items()) or "no"
        others = seen.get("other_load")
        rows.append([label_of(run), *ranges, f"{number(others['cores'])} of {others['of']}" if others else "–", slowed])
    if not rows:
        return Markup("")
    header = ["run", *(f"{TELEMETRY[name]}, least – median – most" for name in names), "cores other processes used", "throttled"]
    return html_table.table(Table(header, rows, of="While timed", css=["wrap"]))


def _gpu_states(ranked: Sequence[Run]) -> Markup:
    """Clocks, power and temperature before and after each run."""
    names = {"sm_mhz": "SM MHz", "memory_mhz": "memory MHz", "power_w": "power W", "temperature_c": "°C"}
    rows = []
    for run in ranked[:MOST]:
        before, after = ((run.record["environment"] or {}).get(key) or {} for key in ("gpu_before", "gpu_after"))
        if before and after and "error" not in before and "error" not in after:
            states = [f"{number(before.get(key))} → {number(after.get(key))}" for key in names]
            rows.append([label_of(run), *states])
    if not rows:
        return Markup("")
    return html_table.table(Table(["run", *names.values()], rows, of="GPU before and after", css=["wrap"]))


def _legend(parts: dict[str, str]) -> Markup:
    """{name: CSS class}."""
    return render("legend", parts=parts)


def _cut(ranked: Sequence[Any]) -> Markup:
    return paragraph(f"The {MOST} fastest of {len(ranked)} runs." if len(ranked) > MOST else "", "soft")


# In the order of the page.
SECTIONS: dict[str, Callable[[Sequence[Run], Sequence[Run]], Markup]] = {
    "Processes": _tables("Processes"),
    "Speed-up": _waterfall,
    "Effects": _effects,
    "Interactions": _tables("Interactions"),
    "Full stack": _tables("Alone and in the full stack"),
    "Curves": _curves,
    "Latency": _latencies,
    "Time split": _time_split,
    "Budget of a step": _tables("Budget of a step"),
    "Memory": _memory,
    "Roofline": _roofline,
    "Environment": _environment,
}
