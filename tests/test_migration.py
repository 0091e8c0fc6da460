"""Records of earlier schemas read as of today: speeds are tokens over time, and what cannot be compared is dropped or marked."""

import copy
import io
import json
from pathlib import Path

import pytest
from moeexp_kernels.removed import REMOVED
from rich.console import Console

from moeexp import compare
from moeexp.config.compose import compose
from moeexp.record import migration, record
from moeexp.record.head import head
from moeexp.record.record import read_record
from moeexp.report import format, markdown, terminal
from moeexp.report import records as report_records
from moeexp.report.command_line import arguments_of
from moeexp.report.html import page as html_report

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).with_name("data")
RESULTS = sorted(path for path in (ROOT / "results").rglob("*.json") if not path.name.startswith(("kernels", "soak")))
OLD = DATA / "record_1.json"  # "skipped output copy" of the ladder, as the code of its day wrote it
NAMED = DATA / "record_2.json"  # whose names have changed since
NOW = DATA / "record_3.json"


def old(**values):
    return json.loads(OLD.read_text()) | values


def test_the_schemas_names_are_those_of_stored_files():
    """A replacement of text in the sources, which would rename them in a test as well, does not reach these files."""
    assert [json.loads(path.read_text())["schema"] for path in (OLD, NAMED, NOW)] == list(record.SCHEMAS)
    first, second, third = (read_record(path) for path in (OLD, NAMED, NOW))
    assert first["schema"] == second["schema"] == third["schema"] == record.SCHEMA
    assert first["migrated"]["from"] == json.loads(OLD.read_text())["schema"] and second["migrated"] is third["migrated"] is None
    for path in (OLD, NAMED, NOW):
        assert set(read_record(path)) == {"schema", *record.KEYS}
        assert head(path)["status"] == "ok" and head(path)["config_hash"]
    assert compare.main([str(OLD), str(NOW)]) == 0


def test_speeds_are_tokens_over_time():
    before, after = old(), migration.migrate(old())
    assert round(before["decode_tok_s"], 1) == 338.5 and round(after["decode_tok_s"]) == 295
    assert after["decode_tok_s"] == 1e3 / before["token_latencies_ms"]["mean"]
    batch = old()
    batch["config"]["batch"] = 4
    assert migration.migrate(batch)["decode_tok_s"] == 4 * after["decode_tok_s"]
    assert migration.migrate(old(decode_tok_s=None))["decode_tok_s"] is None, "what was not published is not now"


def test_the_mean_is_that_of_all_samples_also_where_the_kept_ones_were_cut():
    cut = old()
    cut["token_latencies_ms"]["samples"] = cut["token_latencies_ms"]["samples"][:31]
    after = migration.migrate(cut)
    assert after["decode_tok_s"] == migration.migrate(old())["decode_tok_s"] and after["stalls"] is None


def test_stalls_are_found_where_the_generations_are_known():
    stalls = migration.migrate(old())["stalls"]
    assert stalls["count"] > 0 and stalls["ahead"] == 1
    assert 295 < stalls["decode_tok_s"] < 338.5 and stalls["longest_ms"] <= stalls["total_ms"]
    ended, loop = old(), old()
    ended["config"]["eos"] = True
    loop["config"]["cuda_graph"] = "loop"
    assert migration.migrate(ended)["stalls"] is None
    assert migration.migrate(loop)["stalls"]["ahead"] == loop["config"]["loop_ahead"] == 8


def test_what_older_definitions_measured_is_dropped_or_marked():
    after = migration.migrate(old())
    assert after["migrated"] == {"from": "moeexp.record/1", "medians": ["prefill_tok_s"]}
    assert old()["joules_per_token"] > 0 and after["joules_per_token"] is None, "prefill is in it"
    assert after["kernels_per_token"] == old()["kernels_per_token"]
    graphed, batch = old(), old()
    graphed["config"]["cuda_graph"], batch["config"]["batch"] = "decode", 2
    assert migration.migrate(graphed)["kernels_per_token"] is None, "an eager step's"
    for key in ("bandwidth_share", "bytes_per_token"):
        assert after[key] and migration.migrate(batch)[key] is None, "distinct experts were assumed"
    ratio = after["bandwidth_share"] / old()["bandwidth_share"]
    assert ratio == pytest.approx(after["decode_tok_s"] / old()["decode_tok_s"], rel=1e-6)
    small = old()
    small["bytes_per_token"] = small["bytes_per_token"] | {"total": 5_000_000}
    assert migration.migrate(small)["bandwidth_share"] is None, "so few bytes fit a cache"
    assert after["time_split"]["wall_us"] == pytest.approx(1e6 / after["decode_tok_s"], rel=1e-5)


def test_it_is_pure_and_leaves_the_file():
    data, bytes_before = old(), OLD.read_bytes()
    kept = copy.deepcopy(data)
    once = migration.migrate(data)
    assert data == kept and migration.migrate(once) == once
    read_record(OLD)
    assert OLD.read_bytes() == bytes_before


def test_later_schemas_go_on_where_the_last_step_ended(monkeypatch):
    step = {"moeexp.record/3": lambda data: data | {"schema": "moeexp.record/4", "renamed": data["stalls"]}}
    monkeypatch.setattr(migration, "STEPS", migration.STEPS | step)
    after = migration.migrate(old())
    assert after["schema"] == "moeexp.record/4" and after["renamed"]["count"] > 0
    assert migration.migrate({"schema": "moeexp.record/9"}) == {"schema": "moeexp.record/9"}


@pytest.mark.parametrize("values", [{"config": None}, {"token_latencies_ms": None}, {"token_latencies_ms": {"mean": 0.0}}])
def test_what_is_no_record_of_its_schema_is_refused_in_a_line(tmp_path, values):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(old(**values)))
    with pytest.raises(ValueError, match="record.json is no whole record: ") as refused:
        read_record(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.relative_to(ROOT / "results").as_posix())
def test_every_stored_result_is_read_and_repeated(path):
    data = read_record(path)
    assert set(data) == {"schema", *record.KEYS} and data["status"] == "ok"
    assert data["decode_tok_s"] == pytest.approx(1e3 * data["config"]["batch"] / data["token_latencies_ms"]["mean"], rel=1e-4)
    if data["config"].get("l2_prefetch") or any((op, name) in REMOVED for op, name in data["config"]["ops"].items()):
        with pytest.raises(ValueError, match="was removed"):
            arguments_of(data)
        return
    arguments = [one for one in arguments_of(data) if not one.startswith("--")]
    again = record.plain(compose(arguments))
    assert html_report.command_of(data).startswith("python -m moeexp")
    assert again["quant"]["name"] == data["config"]["quant"]["name"]
    assert again["new_tokens"] == data["config"]["new_tokens"] and again["prompt_len"] == data["config"]["prompt_len"]


def test_every_stored_result_reports():
    assert len(RESULTS) > 20
    # A run by itself, or the folder of its sweep.
    folders = {path.parent.parent if path.parent.name.isdigit() else path for path in RESULTS}
    for folder in sorted(folders):
        records = report_records.load_records([folder])
        text, page = markdown.document(records), html_report.page(records, title=folder.name)
        for one in records:
            assert format.number(one["decode_tok_s"]) in text and format.number(one["decode_tok_s"]) in page
            console = Console(file=io.StringIO())
            terminal.print_run(one, path=folder, console=console)
            assert format.number(one["decode_tok_s"]) in console.file.getvalue()
        told = compare.explain(records[0], records[-1])
        assert format.number(records[-1]["decode_tok_s"]) in told
        old = any(one["migrated"] for one in records)
        assert [format.MEDIAN_NOTE in one for one in (text, page, told)] == [old] * 3, "of older ones prefill is a median"
