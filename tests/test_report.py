"""Tables and summaries of records."""

import io
import re

import numpy as np
import pytest
import synthetic
from rich.console import Console

from moeexp.compare import explain
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.record import record
from moeexp.record.record import Record, plain, read_record
from moeexp.report import __main__ as report_command
from moeexp.report import format, markdown, ratios, tables
from moeexp.report import records as report_records
from moeexp.report import table as report_table
from moeexp.report import terminal as summary
from moeexp.report.html.page import page as html_page
from moeexp.report.runs import runs_of
from moeexp.report.waterfall import waterfalls


def make(folder, *overrides, id="ab.0", status="ok", **values):
    folder.mkdir(parents=True)
    config = plain(resolve(compose(["model=nano", *overrides]), cuda_available=False))
    run = Record(folder / "record.json", id=id, config=config, command=["python"], overrides=list(overrides))
    passed = status != "incorrect"
    tolerance = {"tolerance": "float32.logits", "value": 2e-6, "limit": 1e-4, "passed": passed, "where": "all"}
    failures = [] if passed else ["float32: float32.logits at all: 2 > 1e-4", "another"]
    check = {"passed": passed, "parts": [{"name": "float32", "passed": passed, "tolerances": [tolerance]}], "failures": failures}
    run.set(check=check, random_weights=True, environment={"gpu": None}, **values)
    run.latencies_ms += [1.0, 2.0]
    run.finish(status, error=values.get("error"))
    return run


def printed(print_it, *arguments, terminal=False, **keywords):
    file = io.StringIO()
    print_it(*arguments, console=Console(file=file, force_terminal=terminal, width=80, color_system=None), **keywords)
    return file.getvalue()


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_now", lambda: "2026-01-01T00:00:00+00:00")
    make(tmp_path / "0", "quant=none", "seed=0", decode_tok_s=1234.5, memory_gib={"peak_host": 0.5})
    make(tmp_path / "1", "quant=int4", "seed=0", id="ab.1", status="incorrect", decode_tok_s=9.0)
    error = {"type": "ValueError", "message": "a | b\nc", "phase": None, "traceback": ""}
    make(tmp_path / "10", "quant=int8", "seed=0", id="ab.10", status="unsupported", error=error)
    make(tmp_path / "2", "quant=int8", "seed=0", id="ab.2", status="unsupported", error=error)
    return tmp_path


def test_markdown_shows_what_differs_and_what_was_measured(sweep):
    lines = report_table.markdown(report_records.load_records([sweep])).splitlines()
    assert lines[0] == "| quant | status | decode tok/s | prefill tok/s | TTFT ms | bits/byte | peak GiB |"
    assert lines[2] == r"| none | ok | 1,234\* | – | – | – | 0.5 |"
    assert lines[3] == "| int4 | incorrect | – | – | – | – | – |"
    assert lines[7].startswith(r"- \* random weights")
    assert lines[8] == "- ab.1 incorrect: float32: float32.logits at all: 2 > 1e-4 (and 1 more)"
    assert lines[9] == r"- ab.2, ab.10 unsupported: a \| b c"


def test_records_are_found_once_and_in_order(sweep):
    records = report_records.load_records([sweep, sweep / "0", sweep / "1" / "record.json"])
    assert [one["id"] for one in records] == ["ab.0", "ab.1", "ab.2", "ab.10"]


def test_a_default_is_compared_with_what_another_run_set(tmp_path):
    make(tmp_path / "0", decode_tok_s=1.0)
    make(tmp_path / "1", "quant=int8", "batch=2", id="x.1")
    header, rows = report_table.table(report_records.load_records([tmp_path]))
    assert header[:2] == ["quant", "batch"] and [row[:2] for row in rows] == [["int4", "1"], ["int8", "2"]]


def test_users_ops_are_named_as_they_are_written():
    records = [synthetic.record(id="a"), synthetic.record(id="b")]
    records[0]["overrides"], records[1]["overrides"] = [r"ops.router=own\:router"], ["ops.router=auto"]
    header, rows = report_table.table(records)
    assert header[0] == "ops.router" and [row[0] for row in rows] == ["own:router", "auto"]


def test_what_was_refused_comes_last(tmp_path):
    """A sweep records its refused cells before it runs the first."""
    refused = synthetic.refused("cuda_graph=true", id="a.0", started="2026-01-01T00:00:00+00:00")
    ran = [synthetic.record(id=f"a.{i}", started=f"2026-01-01T00:00:0{i}+00:00") for i in (1, 2)]
    failed = synthetic.refused(id="a.3", started="2026-01-01T00:00:01+00:00") | {"status": "failed"}
    synthetic.write(tmp_path, [refused, *ran, failed])
    assert [one["id"] for one in report_records.load_records([tmp_path])] == ["a.1", "a.3", "a.2", "a.0"]


def test_a_run_that_is_not_over_publishes_no_speed(tmp_path):
    running = synthetic.record(id="a") | {"status": "running", "decode_tok_s": 777.0, "finished": None}
    synthetic.write(tmp_path, [running, synthetic.record(id="b")])
    records = report_records.load_records([tmp_path])
    assert [one["decode_tok_s"] is None for one in records] == [True, False]
    assert "777" not in report_table.markdown(records)


@pytest.mark.parametrize("check", ["off", "failed"])
def test_reports_leave_out_what_an_earlier_version_kept_of_a_run_without_a_passed_check(tmp_path, check):
    """It dropped speeds and samples alone."""
    split = synthetic.TIME_SPLIT | {"wall_us": 7777.0, "by_kernel": [{"name": "a kernel of 7777 µs", "calls": 1, "us": 7777.0}]}
    row = {"op": "linear", "kernel": "gemv", "calls": 1, "bytes": 1, "activations": 0, "us": 7777.0, "adds_us": 7777.0}
    kept = {"time_split": split, "step_budget": {"rows": [row], "layers": None}, "rounds": [{"n": 1, "seconds": 7777}]}
    old = synthetic.record(id="a", status="ok" if check == "off" else "incorrect") | kept
    if check == "off":
        old |= dict.fromkeys(("check", "decode_tok_s", "prefill_tok_s", "ttft_s", "bandwidth_share", "token_latencies_ms"))
    synthetic.write(tmp_path, [old, synthetic.record("quant=int8", id="b")])
    records = report_records.load_records([tmp_path])
    assert len(records) == 2
    for text in (markdown.document(records), html_page(records, title="a"), explain(*records)):
        assert "quant" in text and "7777" not in text and "7,777" not in text


def stalling():
    """Three steps: the second gains by medians too, the third only where the second stalled."""
    late = np.tile(np.where(np.arange(40) == 20, 17.0, 1.0), 5) + 0.001 * np.random.default_rng(8).normal(size=200)
    samples = [2 * late, late, 1.0 + 0.001 * np.random.default_rng(9).normal(size=200)]
    stalls = [synthetic.stalls(5, 32.0, 500.0), synthetic.stalls(5, 16.0, 1000.0), synthetic.stalls(0, 0.0, 1000.0)]
    axes = ["state=explicit", "state=shared", "shared_stream=false"]
    return [
        synthetic.record(*axes[1:index] or axes[:1], axes[index], id=f"ab.{index}", samples=one, stalls=stall, group={"id": "g"})
        for index, (one, stall) in enumerate(zip(samples, stalls, strict=True))
    ]


def test_a_report_shows_stalls_and_that_a_gain_is_one():
    text = markdown.document(stalling())
    ranked, steps = text.split("### Speed-up")[0], text.split("### Speed-up")[1].split("###")[0]
    assert format.STALLS in ranked and "| 5, 80, 1,000 |" in ranked and f"| {format.NONE} |" in ranked
    steps_table = tables.steps_table(waterfalls(runs_of(stalling()))[0])
    first, second, third = (dict(zip(steps_table.header, row, strict=True)) for row in steps_table.rows)
    assert first[format.STALLS] == "5, 160, 500" and third[format.STALLS] == format.NONE
    assert second["by medians"] == "× 2.00" and second["without stalls"] == "the same" and second["verdict"] == "faster"
    assert third["gain over the one before"].startswith("× 1.40") and third["by medians"].startswith(("× 1.00", "× 0.99"))
    assert third["without stalls"] == "× 1.000"
    assert third["verdict"] == "faster, but no difference by medians and without stalls"
    assert ratios.LATE in steps and "no difference by medians and without stalls" in text.split("### Effects")[1]


def test_without_stalls_a_report_does_not_speak_of_them():
    unknown = synthetic.grid({("state=explicit",): 2.0, ("state=shared",): 1.0})
    smooth = [one | {"stalls": synthetic.stalls(0, 0.0, one["decode_tok_s"])} for one in unknown]
    for records in (smooth, unknown):
        text = markdown.document(records)
        assert "stall" not in text and "by medians" in text


def test_a_migrated_prefill_is_marked(tmp_path):
    old = {"from": "moeexp.record/1", "medians": ["prefill_tok_s"]}
    records = [synthetic.record(id="a", migrated=old), synthetic.record(id="b")]
    text = report_table.markdown(records)
    assert text.count("| 9,000¶ |") == 1 and "| 9,000 |" in text and f"- ¶ {format.MEDIAN_NOTE}" in text
    shown = [printed(summary.print_run, one, path=tmp_path) for one in records]
    assert "9,000 tok/s (by the median)" in shown[0] and "median" not in shown[1]
    assert "¶" not in report_table.markdown(records[1:])


def test_a_run_s_summary_says_how_it_stalled(tmp_path):
    one, other = stalling()[1:]
    text = printed(summary.print_run, one, path=tmp_path)
    assert "5, 80 ms in all, the longest 16 ms; without them 1,000 tok/s" in text
    assert "stalls" not in printed(summary.print_run, other, path=tmp_path)


def test_the_cells_of_a_design_are_shown_by_their_names():
    records = [synthetic.record("quant=none", id="a"), synthetic.record("quant=int4", "batch=2", id="b")]
    designed = [one | {"design": {"name": "ladder", "cell": f"rung {i}", "index": i}} for i, one in enumerate(records)]
    header, rows = report_table.table(designed)
    assert header[:2] == ["cell", "status"] and [row[0] for row in rows] == ["rung 0", "rung 1"]
    again = [one | {"design": {"name": "ladder", "cell": "rung 0", "index": 0}} for one in records]
    assert report_table.table(again)[0][:3] == ["cell", "quant", "batch"]
    assert report_table.table([designed[0], records[1]])[0][:2] == ["quant", "batch"]


def test_what_took_no_turns_with_the_first_is_marked():
    cells = {("quant=none", "batch=1"): 1.0, ("quant=int4", "batch=1"): 0.5, ("quant=none", "batch=2"): 1.2}
    records = synthetic.grid(cells)
    text = report_table.markdown(records)
    assert text.count("†") == 2 and "- † not timed in turns with the first run" in text
    (marked,) = [line for line in text.splitlines() if line.startswith("|") and "†" in line]
    assert marked.startswith("| int4 | 1 |")  # the first of another workload is held against nothing
    text = report_table.markdown([one | {"group": {"id": "g"}} for one in records])
    assert "†" not in text


def test_each_part_of_a_document_marks_it():
    cells = {("quant=none", "export=eager"): 4.0, ("quant=int4", "export=eager"): 3.9, ("quant=none", "export=aoti"): 1.0}
    text = markdown.document(synthetic.grid(cells))
    for title in ("Speed-up", "Effects"):
        part = text.split(f"### {title}")[1].split("###")[0]
        assert "] † |" in part
        assert "† Not timed in turns" in part
    assert "| no difference beyond run-to-run noise |" in text
    apart = markdown.document([one | {"group": {"id": "g"}} for one in synthetic.grid(cells)])
    assert "†" not in apart and "beyond" not in apart


def with_transformers(**values):
    """Rung 0 beside two of ours."""
    ours = synthetic.grid({("state=explicit",): 2.0, ("state=shared",): 1.0, ("shared_stream=false",): 0.9}, **values)
    theirs = synthetic.record("engine=transformers", "quant=none", "dtype=bfloat16", id="ab.9", ms=4.0, **values)
    records = [theirs, *ours]
    for index, one in enumerate(records):
        one["design"] = {"name": "ladder", "cell": f"rung {index}", "index": index}
    return records


def test_a_ratio_with_transformers_says_that_the_weights_differ():
    text = markdown.document(with_transformers(group={"id": "g"}))
    runs, steps = text.split("### Speed-up")[0], text.split("### Speed-up")[1].split("###")[0]
    assert [line.count("§") for line in runs.splitlines() if line.startswith("| rung")] == [0, 1, 1, 1]
    unlike = "transformers' are unquantised bfloat16, the others int4"
    assert f"which is part of what lies between them: {unlike}" in runs
    rows = [line for line in steps.splitlines() if line.startswith("| rung")]
    assert [line.count("§") for line in rows] == [0, 2, 1, 1] and "| faster, on other weights |" in rows[1]
    assert f"§ The weights differ in quantisation ({unlike}): the ratio is not the engine's alone." in steps
    unquantised = [synthetic.record("engine=transformers", "quant=none", id="a"), synthetic.record("quant=none", id="b")]
    grid = synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5})
    assert "§" not in markdown.document(unquantised) + markdown.document(grid)


def test_a_document_has_no_verdict_on_what_has_no_effect():
    text = markdown.document(with_transformers(not_applicable=["shared_stream"], device="cpu"))
    bars, effects = text.split("### Speed-up")[1].split("### Effects")
    ends = [line.endswith("  not applicable here") for line in bars.splitlines() if line.startswith("rung")]
    assert ends == [False, False, False, True]
    (step,) = [line for line in bars.splitlines() if line.startswith("| rung 3")]
    (row,) = [line for line in effects.splitlines() if line.startswith("| shared_stream |")]
    assert "| not applicable here |" in step and "| not applicable here |" in row
    assert "the setting has no effect on this device" in bars and "the setting has no effect on this device" in effects


def test_a_document_marks_unlike_load():
    records = synthetic.grid({("quant=none",): 3.0, ("quant=int4",): 1.0}, device="cpu")
    for one, cores in zip(records, (12, 1), strict=True):
        one["telemetry"] = synthetic.load(cores)
    text = markdown.document(records)
    assert "‡ Other processes loaded the CPU" in text and "| faster, but under unlike load |" in text
    assert "- unlike conditions, load of other processes" in text


def test_runs_that_differ_in_nothing_are_told_apart_by_id(tmp_path):
    make(tmp_path / "0")
    make(tmp_path / "1", id="cd")
    header, rows = report_table.table(report_records.load_records([tmp_path]))
    assert header[0] == "run" and {row[0] for row in rows} == {"ab.0", "cd"}


@pytest.mark.parametrize("text", ["a|b", "a\nb"])
def test_a_cell_cannot_break_the_table(tmp_path, text):
    make(tmp_path / "0", f"prompt={text}" if "\n" not in text else "seed=0")
    make(tmp_path / "1", "prompt=c", id="x.1")
    table = report_table.markdown(report_records.load_records([tmp_path])).split("\n\n")[0].splitlines()
    assert len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_main_prints_the_table_or_one_line(sweep, capsys, tmp_path):
    assert report_command.main([str(sweep)]) == 0
    assert capsys.readouterr().out.startswith("`python`\n\n| quant |")
    assert report_command.main([str(tmp_path / "none")]) == 2
    assert "holds no record.json" in capsys.readouterr().err
    assert report_command.main([]) == 2


def test_summary_in_a_pipe_is_one_item_a_line(tmp_path, monkeypatch):
    run = make(
        tmp_path / ("long-" * 30),
        decode_tok_s=512.3,
        prefill_tok_s=12345.0,
        ttft_s=0.0123,
        prompt_text=["In the [bold]beginning"],
        generated_text=[" God\ncreated"],
        bits_per_byte=1.9,
        memory_gib={"peak_host": 0.5},
        tracker={"name": "wandb", "path": "wandb/offline-run-1", "url": None},
    )
    text = printed(summary.print_run, read_record(run.path), path=run.path)
    lines = {line[:14].strip(): line[16:] for line in text.splitlines() if line}
    assert lines["status"].startswith("ok") and "nano" in lines["status"] and "float32" in lines["status"]
    assert lines["check float32"] == "passed  float32.logits 2e-06, limit 0.0001"
    (part,) = [part for part in read_record(run.path)["check"]["parts"] if part["name"] == "float32"]
    few = {**part, "name": "trace", "report": {"positions": 131_199, "with_logits": 4223}}
    whole = {**part, "name": "timed", "report": {"positions": 40, "with_logits": 40}}
    record = read_record(run.path) | {"check": {"passed": True, "parts": [few, whole, part]}}
    said = printed(summary.print_run, record, path=run.path).splitlines()
    assert [line.partition("0.0001")[2] for line in said if line.startswith("check ")] == [
        "  logits of 4,223 of 131,199 positions", "", ""
    ]  # fmt: skip
    assert lines["decode"] == "512.3 tok/s  p50 1 ms, p99 2 ms, n 2  (random weights)"
    assert lines["prefill"] == "12,345 tok/s, first token after 12.3 ms"
    assert lines["bits/byte"].startswith("1.900") and lines["memory GiB"] == "peak host 0.5"
    assert lines["text"] == "In the [bold]beginning God / created"
    assert lines["record"].endswith("/record.json") and lines["W&B"] == "offline; wandb sync wandb/offline-run-1"
    assert "\x1b" not in text


def test_summary_of_a_failed_run_says_why(tmp_path):
    error = {"type": "RuntimeError", "message": "boom\nbang", "phase": "export", "traceback": ""}
    run = make(tmp_path / "0", status="failed", error=error, decode_tok_s=3.0)
    text = printed(summary.print_run, read_record(run.path), path=run.path)
    assert "boom bang" in text and "tok/s" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_error_makes_no_long_note_under_a_table(tmp_path, terminal):
    error = {"type": "ValueError", "message": f"it begins {'x' * 5000} use this instead", "phase": None, "traceback": None}
    records = [synthetic.record(id="ab.0"), synthetic.refused("quant=int8", id="ab.1", error=error)]
    (note,) = report_table.footnotes(records)
    assert len(note) == 400 and note.startswith("ab.1 unsupported: it begins xxx") and note.endswith(" use this instead")
    (flags,) = re.findall('<ul class="flags">.*?</ul>', html_page(records, title="a"))
    table = printed(summary.print_sweep, records, path=tmp_path / "table.md", terminal=terminal)
    for text in (table, markdown.document(records), flags):
        assert "x" * 100 in text.replace("\n", "") and "x" * 400 not in text.replace("\n", "")


@pytest.mark.parametrize("width", [80, 100])
def test_summary_and_table_fit_a_terminal(sweep, width):
    records = report_records.load_records([sweep])
    text = printed(summary.print_sweep, records, path=sweep / "table.md", terminal=True)
    rows = text.split("table  ")[0].splitlines()
    assert max(map(len, rows)) <= 80
    assert "unsupported" in text and "1,234*" in text


def test_sweep_in_a_pipe_is_the_markdown_table(sweep):
    records = report_records.load_records([sweep])
    assert report_table.markdown(records) in printed(summary.print_sweep, records, path=sweep / "table.md")
