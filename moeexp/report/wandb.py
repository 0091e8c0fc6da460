"""The report as a W&B Report: a specification of plain data, and the one function that hands it to W&B.

The specification names runs and metrics as `moeexp.record.tracker` logs them; it is made and tested without a network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from moeexp.record.tracker import wandb_mode
from moeexp.report.markdown import document
from moeexp.report.runs import MACHINE, Run, is_workload, runs_of

SCHEMA = "moeexp.wandb_report/1"
TEXT_LIMIT = 60_000  # characters of Markdown that a report takes well

# (title, the key in the summary)
METRICS = (
    ("decode tok/s", "decode_tok_s"),
    ("decode tok/s without stalls", "stalls.decode_tok_s"),
    ("delay by stalls, ms", "stalls.total_ms"),
    ("prefill tok/s", "prefill_tok_s"),
    ("time to first token, s", "ttft_s"),
    ("p50 of a token's latency, ms", "latency_ms.p50"),
    ("p99 of a token's latency, ms", "latency_ms.p99"),
    ("bits per byte", "bits_per_byte"),
    ("share of the read bandwidth", "bandwidth_share"),
    ("joules per token", "joules_per_token"),
    ("device memory in use, GiB", "memory_gib.device_in_use"),
)
GOAL = "decode_tok_s"


def specification(
    records: Sequence[dict[str, Any]], *, title: str, project: str | None = None, entity: str | None = None
) -> dict[str, Any]:
    """{schema, title, description, project, entity, run_set, blocks}, of plain values.

    `ValueError` where the records were not tracked by W&B, or in several projects and none is named."""
    tracked = [record for record in records if record["config"]["tracker"]["name"] == "wandb"]
    if not tracked:
        raise ValueError("no run of these was tracked by W&B: run with tracker=wandb, or use --to html or md")
    runs = runs_of(tracked)
    return {
        "schema": SCHEMA,
        "title": title[:128],
        "description": f"{len(tracked)} runs of moeexp",
        "project": project or _the_one("project", tracked),
        "entity": entity or _the_one("entity", tracked),
        "run_set": {"name": title, "runs": [record["id"] for record in tracked], "order": {GOAL: "descending"}},
        "blocks": [
            {"type": "markdown", "text": _text(tracked)},
            {"type": "panels", "panels": _bars(tracked) + [_coordinates(runs), {"type": "run_comparer"}]},
        ],
    }


def dump(specification: dict[str, Any]) -> str:
    return json.dumps(specification, indent=1) + "\n"


def save(specification: dict[str, Any]) -> str:
    """Saves it in W&B and returns its address. `RuntimeError` that says what to do where that cannot be."""
    instead = "or write the specification with --out FILE"
    mode = wandb_mode({"mode": "auto"}, os.environ)
    if mode != "online":
        raise RuntimeError(f"W&B is {mode}, and a Report is saved online only: `wandb login` first, {instead}")
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise RuntimeError(f"W&B Reports need wandb-workspaces ({error}): pip install wandb-workspaces, {instead}") from error
    try:
        return build(specification, reports).save().url
    except Exception as error:  # whatever a network and a server may raise
        raise RuntimeError(f"W&B did not take the report ({' '.join(str(error).split())[:200]}): try again, {instead}") from error


def build(specification: dict[str, Any], reports: Any) -> Any:
    """The Report object; `reports` is the module `wandb_workspaces.reports.v2`."""
    where = {"project": specification["project"]} | ({"entity": specification["entity"]} if specification["entity"] else {})
    chosen = specification["run_set"]
    ((metric, direction),) = chosen["order"].items()
    run_set = reports.Runset(
        **where,
        name=chosen["name"],
        filters=f'Metric("Name") in {chosen["runs"]!r}',
        order=[reports.OrderBy(reports.SummaryMetric(metric), ascending=direction == "ascending")],
    )
    blocks = []
    for block in specification["blocks"]:
        if block["type"] == "markdown":
            blocks.append(reports.MarkdownBlock(text=block["text"]))
        else:
            panels = [_panel(panel, reports) for panel in block["panels"]]
            blocks.append(reports.PanelGrid(runsets=[run_set], panels=panels))
    return reports.Report(
        **where,
        title=specification["title"],
        description=specification["description"],
        blocks=blocks,
        width="fluid",
    )


def _panel(panel: dict[str, Any], reports: Any) -> Any:
    if panel["type"] == "bar":
        return reports.BarPlot(
            title=panel["title"], metrics=[reports.SummaryMetric(panel["metric"])], max_bars_to_show=panel["most"]
        )
    if panel["type"] == "run_comparer":
        return reports.RunComparer(diff_only="split")
    assert panel["type"] == "parallel_coordinates", panel
    kinds = {"config": reports.Config, "summary": reports.SummaryMetric}
    columns = [
        reports.ParallelCoordinatesPlotColumn(
            metric=kinds[column["from"]](column["key"]), display_name=column["name"], log=column["log"]
        )
        for column in panel["columns"]
    ]
    return reports.ParallelCoordinatesPlot(title=panel["title"], columns=columns)


def _bars(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A bar chart for each metric that some run has."""
    return [
        {"type": "bar", "title": title, "metric": key, "most": 40}
        for title, key in METRICS
        if any(_value(record, key) is not None for record in records)
    ]


def _coordinates(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that differ, then what they lead to. A group is shown by its name."""
    axes = list(dict.fromkeys(axis for run in runs for axis in run.settings))
    axes.sort(key=lambda axis: not is_workload(axis))
    columns = [{"from": "config", "key": _key(runs[0], axis), "name": axis, "log": False} for axis in axes]
    for title, key in METRICS:
        if any(_value(run.record, key) is not None for run in runs):
            columns.append({"from": "summary", "key": key, "name": title, "log": key == GOAL})
    return {"type": "parallel_coordinates", "title": "settings and what they lead to", "columns": columns}


def _key(run: Run, axis: str) -> str:
    if axis == MACHINE:
        return "environment.gpu.name"
    value = run.record["config"].get(axis)
    if not isinstance(value, dict):
        return axis
    return f"{axis}.name" if "name" in value else f"{axis}.default"


def _value(record: dict[str, Any], key: str) -> Any:
    if key.startswith("latency_ms."):
        key = key.replace("latency_ms", "token_latencies_ms")
    value: Any = record
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(records: Sequence[dict[str, Any]]) -> str:
    text = document(records)
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + "\n\n(shortened)\n"


def _the_one(what: str, records: Sequence[dict[str, Any]]) -> str | None:
    found = dict.fromkeys(record["config"]["tracker"].get(what) for record in records)
    if len(found) > 1:
        raise ValueError(
            f"the runs are in {len(found)} different W&B {what} settings ({', '.join(map(str, found))}): name one with --{what}"
        )
    return next(iter(found))
