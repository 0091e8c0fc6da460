"""What each block of figures in README.md and docs/ says, for `moeexp.figures`: Markdown from the records in results/, and
the table of axes from the schema."""

from __future__ import annotations

import io
import json
import shlex
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeexp.record.record import read_record
from moeexp.record.renamed import GONE
from moeexp.report import axes_table, curve_blocks, curves, processes
from moeexp.report.effects import main_effects
from moeexp.report.format import number, percent
from moeexp.report.html import panels
from moeexp.report.intervals import tokens_per_step
from moeexp.report.markup import Markdown, code, escaped, markdown_table
from moeexp.report.ratios import by_medians, times, without_stalls
from moeexp.report.records import load_records
from moeexp.report.runs import Run, as_text, gain, runs_of
from moeexp.report.waterfall import Step, waterfalls

HEADLINE = "headline_qwen3_5_35b_a3b_int4_h200"
LADDER = "ladder_qwen3_5_35b_a3b_int4_h200"
LADDER_START = "ladder_start_qwen3_5_35b_a3b_int4_h100"
START = HEADLINE  # whose first process found nothing cached
OLDER_H100 = "start_qwen3_5_35b_a3b_int4_h100"
FULLSIZE = "fullsize_qwen3_5_35b_a3b_int4_h200"
SOAK = "soak_h200/soak.json"
TINY = "tiny_h100"
EXAMPLE = "readme_example/record.json"
KERNELS = "kernels_h200.json"
AXES = "axes"  # of no record: the schema says it
# By others: ExecuTorch on an A100, tokens a second (pytorch/executorch PR 18809 and what led to it).
PUBLISHED = {"dual methods, explicit state": "77.4", "shared buffers": "84.5", "CUDA graph": "82 → 98"}
# Others at one sequence of this model's shapes, measured apart from this code or published: engine, weights, GPU, tok/s.
PEERS = (
    ("llama.cpp (ggml 0.25.3, CUDA graphs, flash attention)", "Q4_K, head Q6_K", "H100", "234"),
    ("vLLM 0.25.1 (Marlin experts, full decode graph)", "GPTQ int4, groups of 128", "H100", "219 to 224"),
    ("vLLM 0.26", "FP8", "H100", "225"),
    ("transformers 5.17 with flash-linear-attention", "bfloat16", "H100", "10.6"),
    ("ExecuTorch, PR 18809", "HQQ int4, groups of 128", "A100", "82 → 98, published"),
    ("ExecuTorch since", "HQQ int4, groups of 128", "A100", "171 to 174, published"),
)
ONCE = "One process each: the rungs took turns in it, and none was repeated in another. Read their ratios, not one speed."
WIDTH = 100  # characters of a line of the example
PROSE = 125  # and of a paragraph


def headline(results: Path) -> str:
    """Nothing until it was measured; a `ValueError` where it was measured in too few processes."""
    folder = results / HEADLINE
    if not folder.exists():
        return ""
    runs = runs_of(load_records([folder]))
    found = processes.headline(runs, str(folder))
    record = found.runs[0].record
    config, gpu = record["config"], record["environment"]["gpu"]["name"]
    rows = [
        ["decode, tok/s", Markdown(f"**{processes.spread(found.figure(lambda one: one['decode_tok_s']))}**")],
        ["prefill, tok/s", processes.spread(found.figure(lambda one: one["prefill_tok_s"]))],
        ["time to first token, ms", processes.spread(found.figure(lambda one: one["ttft_s"]), 1e3)],
        ["latency of a token, p50, ms", processes.spread(found.figure(lambda one: one["token_latencies_ms"]["p50"]))],
        ["of the measured read bandwidth, %", processes.spread(found.figure(lambda one: one["bandwidth_share"]), 100)],
        ["energy of a decoded token, J", processes.spread(found.figure(lambda one: one["joules_per_token"]))],
        ["device memory in use, GiB", processes.spread(found.figure(_device_memory))],
    ]
    rows = [row for row in rows if "–" not in row[1]]
    point = f"model={config['model']['name']} quant={config['quant']['name']} cuda_graph={as_text(config['cuda_graph'])}"
    header = [Markdown(f"{code(point)}, one {escaped(gpu)}"), f"median of {found.count} processes [least, most]"]
    weights = "random weights, " if record["random_weights"] else ""
    work = f"batch {config['batch']}, {config['prompt_len']} prompt and {config['new_tokens']} new tokens"
    line = f"{weights}{work}, every run's check passed; [records](results/{HEADLINE}). {_stalled(found.runs)}"
    if gone := [word for word in record["command"] if _is_gone(word)]:
        line += f" They also had {', '.join(map(code, gone))}, which is gone since."
    command = f"```console\n$ {_command(record)}\n```"
    return f"{markdown_table(header, rows)}\n{_prose(line[0].upper() + line[1:])}\n\n{command}"


def _command(record: dict[str, Any]) -> str:
    """As it was given, but for where it wrote, and for settings that are gone."""
    kept = (word for word in record["command"] if not word.startswith(("hydra.", "tracker")))
    return shlex.join(word for word in kept if not _is_gone(word))


def _is_gone(word: str) -> bool:
    return word.lstrip("+~").partition("=")[0] in GONE


def sequences(results: Path) -> str:
    """Nothing until it was measured."""
    folder = results / FULLSIZE
    if not folder.exists():
        return ""
    runs = sorted(
        runs_of(load_records([folder])), key=lambda run: (run.record["config"]["prompt_len"], run.record["config"]["batch"])
    )
    rows = []
    for run in runs:
        record = run.record
        floor, config = record["bytes_per_token"], record["config"]
        rows.append(
            [
                number(config["batch"]), number(config["prompt_len"]), Markdown(f"**{_tok_s(run)}**"), _ms(run),
                number(floor["distinct_experts"]), percent(record["bandwidth_share"]), _kernels(run), _device_memory_of(record),
            ]
        )  # fmt: skip
    header = [
        "sequences", "prompt tokens", "decode tok/s, of all", "ms a step", "distinct experts a layer",
        "of the measured read bandwidth", "kernels a step", "device memory, GiB",
    ]  # fmt: skip
    gpu = escaped(curve_blocks.gpus_of([run.record for run in runs]))
    later = curve_blocks.of_a_later_group([run.record for run in runs], "sequences", lambda record: record["config"]["batch"])
    prose = f"Each on one {gpu}. {_stalled(runs)} {ONCE.replace('rungs', 'runs')}{later}"
    return f"{markdown_table(header, rows)}\n{_prose(prose)}"


def curves_chart(results: Path) -> str:
    """Sequences, depth and prompt, of the cells of `experiment=fullsize`."""
    folders = [folder for name in (FULLSIZE, curve_blocks.LONG) if (folder := results / name).exists()]
    drawn = curves.curves(runs_of(load_records(folders))) if folders else []
    label = "; ".join(
        f"{curve.title}, {curve.y_unit}: {', '.join(f'{number(point.y)} at {number(point.x)}' for point in curve.points)}"
        for curve in drawn
    )
    return panels.panels(drawn, label=label) if drawn else ""


def peers(results: Path) -> str:
    """Nothing until our own was measured."""
    folders = [results / name for name in (HEADLINE, OLDER_H100)]
    if not all(folder.exists() for folder in folders):
        return ""
    found = processes.headline(runs_of(load_records(folders[:1])), str(folders[0]))
    groups = [[run.record for run in found.runs], load_records(folders[1:])]
    speeds = [
        Markdown(f"**{processes.spread(found.figure(lambda one: one['decode_tok_s']))}**"),
        _range([record["decode_tok_s"] for record in groups[1]]),
    ]
    gpus = [escaped(records[0]["environment"]["gpu"]["name"]) for records in groups]
    quant = found.runs[0].record["config"]["quant"]
    bits = f"{quant['name']}, groups of {quant['group_size']}"
    rows = [[name, bits, *cells] for name, *cells in zip(("moeexp", "moeexp, older code"), gpus, speeds, strict=True)]
    table = markdown_table(["decoding one sequence", "weights", "GPU", "decode tok/s"], rows + [list(peer) for peer in PEERS])
    read = [statistics.median(record["bytes_per_token"]["read_bandwidth_gb_s"] for record in records) for records in groups]
    return f"{table}\n" + _prose(
        f"The rows of others are no records of this code. Our {gpus[0]} read memory {read[0] / read[1]:.2f} times as fast as our "
        f"{gpus[1]}: the second row ([records](results/{OLDER_H100}), one process each) is what to hold against those of an H100."
    )


def soak(results: Path) -> str:
    found = json.loads((results / SOAK).read_text(encoding="utf-8"))
    grown = {name: f"{number(value / 2**20)} MiB" for name, value in found["grown_bytes"].items()}
    prompts, steps, recaptures = (f"{found[name]:,}" for name in ("prompts_decoded", "decode_steps", "recaptures"))
    tokens = "the same tokens" if found["same_tokens_as_a_fresh_process"] else "OTHER TOKENS"
    return _prose(
        f"One {escaped(found['device'])}, {number(found['minutes'])} minutes: {prompts} prompts, {steps} decode steps, the step "
        f"captured anew {recaptures} times. After the first tenth of the run device memory grows by {grown['driver']} and the "
        f"process' host memory by {grown['host']}. The median latency of a step is {number(found['p50_ms'])} ms, and that of no "
        f"tenth is off by more than {number(100 * found['drift'])} %. A fresh process chooses {tokens} for the last prompt."
    )


def _device_memory_of(record: dict[str, Any]) -> str:
    found = _device_memory(record)
    return "–" if found is None else number(found)


def ladder(results: Path) -> str:
    return _rungs(_steps(results / LADDER), published=True)


def ladder_start(results: Path) -> str:
    return _rungs(_steps(results / LADDER_START), published=False)


def ladder_summary(results: Path) -> str:
    steps = _steps(results / LADDER)
    runs = [step.run for step in steps]
    load = runs[0].record["telemetry"]["other_load"]
    explicit: dict[str, list[Any]] = {run.record["config"]["state"]: [] for run in runs}
    for run in runs:
        if run.speed:
            explicit[run.record["config"]["state"]].append(run.record["prefill_tok_s"])
    prefill = "; ".join(f"`state={state}` {_range(values)} tok/s" for state, values in explicit.items() if values)
    prompt = runs[0].record["config"]["prompt_len"]
    return _prose(
        f"{_in_all(steps)} {_stalled(runs)} Other work kept {number(load['cores'])} of the host's {load['of']} cores busy. "
        f"Prefill of {prompt} tokens, by its median: {prefill}."
    )


def ladder_start_summary(results: Path) -> str:
    steps = _steps(results / LADDER_START)
    by_name = {step.label: step.run for step in steps}
    recurrent, chunked = by_name["recurrent kernel"], by_name["chunked kernels at T=1"]
    found = gain(recurrent, chunked)
    first = next(step for step in steps if step.run.speed)
    split = first.run.record["time_split"]
    return _prose(
        f'"{first.label}" waits for the host during {percent(split["host_us"] / split["wall_us"])} of a step. The recurrent '
        f"kernel against the chunked rule: {times(found, marked=False, beside=True)}, {found.phrase}. "
        f"{_stalled([step.run for step in steps])}"
    )


def start(results: Path) -> str:
    """Of two runs, the first with nothing cached."""
    records = [read_record(results / START / run / "record.json") for run in ("0", "1")]
    phases, cached = (record["phases_s"] for record in records)
    waited = sum(seconds for name, seconds in phases.items() if name.startswith("compile"))
    rows = [
        ["first token, s after the start", *(number(record["first_token_s"]) for record in records)],
        ["weights made and quantised, s", number(phases["weights"]), number(cached["weights"])],
        ["waited for packages after that, s", number(waited), ""],
        ["decode tok/s", *(number(record["decode_tok_s"]) for record in records)],
        ["prefill tok/s", *(number(record["prefill_tok_s"]) for record in records)],
        ["device memory in use, GiB", *(number(_device_memory(record)) for record in records)],
    ]
    return (
        f"{markdown_table([f'one {curve_blocks.gpus_of(records)}', 'nothing cached', 'packages cached'], rows)}\n"
        "One process each, another seed in the second. Both passed their checks."
    )


def tiny(results: Path) -> str:
    runs = runs_of(load_records([results / TINY]))
    rows = []
    for run in runs:
        base = next(one for one in runs if one.settings | {"cuda_graph": run.settings["cuda_graph"]} == run.settings)
        found = gain(run, base) if run is not base and run.speed and base.speed else None
        settings = " ".join(f"{axis}={value}" for axis, value in run.point)
        rows.append([code(settings), _tok_s(run), _ms(run), _kernels(run), times(found) if found else "", _medians(found)])
    header = [code("tiny"), "decode tok/s", "ms per token", "kernels per token", "gain from the graph", "by medians"]
    return f"{markdown_table(header, rows)}\nOne process each: two of a quantisation took turns in it, and none was repeated."


def tiny_summary(results: Path) -> str:
    runs = runs_of(load_records([results / TINY]))
    (found,) = [effect for effect in main_effects(runs) if effect.axis == "cuda_graph"]
    eager = [run.record["time_split"] for run in runs if run.speed and not run.record["config"]["cuda_graph"]]
    waits = sorted(split["host_us"] / split["wall_us"] for split in eager)
    return _prose(
        f"Replaying the same kernels from a graph: {times(found.ratio, marked=False, beside=True)}, over {found.pairs} pairs. "
        f"Without a graph a step waits for the host during {percent(waits[0])} to {percent(waits[-1])} of its time."
    )


def kernels(results: Path) -> str:
    """The rows of one token and of prompts."""
    from moeexp_kernels.bench import measure, table

    document = json.loads((results / KERNELS).read_text(encoding="utf-8"))
    shown = [row for row in document["rows"] if row["tokens"] == 1 or row["phase"] == "prefill"]
    shown = [measure.OpTiming(**row | {"peers": [measure.PeerTiming(**peer) for peer in row["peers"]]}) for row in shown]
    header, rows = _cells(table.HEADER), [_cells(table.line(row)) for row in shown]
    kept = [header.index(name) for name in ("op", "shape", "tokens", "µs", "share of read bandwidth", "peers, µs")]
    text = markdown_table([header[column] for column in kept], [[Markdown(row[column]) for column in kept] for row in rows])
    read = document["environment"]["read_tb_s"]
    return f"{text}\nOn one {document['environment']['gpu']}, where a large read runs at {read:.2f} TB/s."


def example(results: Path) -> str:
    """What a run prints, as a pipe gets it."""
    from rich.console import Console

    from moeexp.report.terminal import print_run

    printed = io.StringIO()
    console = Console(file=printed, width=WIDTH)
    record = read_record(results / EXAMPLE)
    folder = f"outputs/{record['started'][:10]}/{record['id']}"
    record["tracker"] = record["tracker"] and record["tracker"] | {"path": f"{folder}/wandb/offline-run-…", "url": None}
    print_run(record, path=Path(folder) / "record.json", console=console)
    lines = printed.getvalue().strip().splitlines()
    return "```text\n" + "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 2] + " …" for line in lines) + "\n```"


def _prose(text: str) -> str:
    return textwrap.fill(text, PROSE, break_long_words=False, break_on_hyphens=False)


def _steps(folder: Path) -> list[Step]:
    (steps,) = waterfalls(runs_of(load_records([folder])))
    return steps


def _rungs(steps: Sequence[Step], *, published: bool) -> str:
    header = [
        "rung", "decode tok/s", "ms per token", "gain over the rung before", "by medians", "without stalls",
        "stalls: how many, ms", "kernels per token", "of that time: kernels / copies / gaps / host, µs",
    ]  # fmt: skip
    rows = []
    for step in steps:
        split, stalls = step.run.record["time_split"], step.run.record["stalls"]
        parts = " / ".join(f"{split[f'{part}_us']:,.0f}" for part in ("kernels", "copies", "gaps", "host")) if split else "–"
        delay = f"{stalls['count']}, {number(stalls['total_ms'])}" if stalls and stalls["count"] else "none" if stalls else "–"
        gained = times(step.gain, marked=False) if step.gain else ""
        if step.gain and step.gain.weights:
            gained += ", on other weights"
        cells = [step.label, _tok_s(step.run), _ms(step.run), gained, _medians(step.gain), without_stalls(step.gain), delay]
        rows.append([*cells, _kernels(step.run), parts, *[PUBLISHED.get(step.label, "")] * published])
    return f"{markdown_table(header + ['published, A100'] * published, rows)}\n{ONCE}"


def _in_all(steps: Sequence[Step]) -> str:
    """From the first rung to the last, and to the fastest."""
    measured = [step for step in steps if step.total is not None]
    fastest = max(measured, key=lambda step: step.run.timed.tok_s)
    text = f"From the first rung to the last: {times(measured[-1].total, marked=False, beside=True)}"
    if fastest is measured[-1]:
        return text + "."
    return text + f'; to the fastest, "{fastest.label}": {times(fastest.total, marked=False, beside=True)}.'


def _stalled(runs: Sequence[Run]) -> str:
    """Which of the runs stalled, and for how long the worst did."""
    having = [run.record for run in runs if run.record["stalls"] and run.record["stalls"]["count"]]
    known = sum(run.record["stalls"] is not None for run in runs)
    if not having:
        return f"None of the {known} runs stalled." if known else ""
    worst = max(having, key=lambda record: record["stalls"]["decode_tok_s"] / record["decode_tok_s"])
    stalls, cell = worst["stalls"], (worst["design"] or {}).get("cell") or worst["id"]
    often = "once" if stalls["count"] == 1 else f"{number(stalls['count'])} times"
    delay = f"{often}, {number(stalls['total_ms'])} ms in all"
    speeds = f"it has {number(worst['decode_tok_s'])} tok/s, and without stalls {number(stalls['decode_tok_s'])}"
    return f'{len(having)} of {known} runs stalled, "{cell}" most: {delay}; {speeds}.'


def _medians(of: Step | Any) -> str:
    found = of.gain if isinstance(of, Step) else of
    return by_medians(found) if found else ""


def _tok_s(run: Run) -> str:
    return number(run.speed.tok_s if run.speed else None)


def _ms(run: Run) -> str:
    return number(1e3 * tokens_per_step(run.record) / run.speed.tok_s if run.speed else None)


def _kernels(run: Run) -> str:
    """Those of the timed mode, by the profiler; copies apart."""
    split = run.record["time_split"]
    return f"{split['kernels']:,.0f}" if split else "–"


def _device_memory(record: dict[str, Any]) -> float | None:
    return record["memory_gib"].get("device_in_use")


def _range(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "peers": peers,
    "sequences": sequences,
    "family": curve_blocks.family,
    "verify-steps": curve_blocks.verify_steps,
    "prefill-by-prompt": curve_blocks.prefill_by_prompt,
    "decode-by-depth": curve_blocks.decode_by_depth,
    "soak": soak,
    "ladder": ladder,
    "ladder-summary": ladder_summary,
    "ladder-start": ladder_start,
    "ladder-start-summary": ladder_start_summary,
    "start": start,
    "tiny": tiny,
    "tiny-summary": tiny_summary,
    "kernels": kernels,
    "example": example,
    AXES: axes_table.table,
}
# Images by the file that they are; nothing while a record is missing.
CHARTS: dict[str, Callable[[Path], str]] = {"docs/curves.svg": curves_chart}
