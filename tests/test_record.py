"""The record: what is kept, what is dropped, its size, its file, its digests."""

import ast
import json
import math
import os
from pathlib import Path

import pytest
import synthetic

from moeexp.config.compose import compose
from moeexp.record import environment, record
from moeexp.record.record import MAX_BYTES, Record, latency_summary, plain, read_record


def new(tmp_path, **values) -> Record:
    config = plain(compose(["model=nano"]))
    result = Record(tmp_path / "record.json", id="ab12", config=config, command=["python"], overrides=["seed=0"])
    result.set(**values)
    return result


SPEEDS = {"decode_tok_s": 10.0, "prefill_tok_s": 20.0, "ttft_s": 0.1, "bandwidth_share": 0.5, "joules_per_token": 2.0}
TIMES = {"rounds": [{"n": 2, "decode_s": 0.2}], "time_split": synthetic.TIME_SPLIT, "step_budget": {"rows": [], "layers": None}}


def test_written_whole_from_the_start(tmp_path):
    new(tmp_path).write()
    data = read_record(tmp_path / "record.json")
    assert data["schema"] == "moeexp.record/3" and data["status"] == "running"
    assert set(record.KEYS) < set(data)


def test_ok_with_a_passed_check_keeps_speeds(tmp_path):
    run = new(tmp_path, check={"passed": True}, **SPEEDS)
    run.latencies_ms += [1.0, 2.0]
    run.finish("ok")
    data = read_record(run.path)
    assert {key: data[key] for key in SPEEDS} == SPEEDS
    assert data["token_latencies_ms"]["samples"] == [1.0, 2.0]


@pytest.mark.parametrize("status", ["incorrect", "failed", "interrupted", "timeout", "unsupported"])
def test_other_statuses_publish_no_speed(tmp_path, status):
    run = new(tmp_path, check={"passed": True}, **SPEEDS, **TIMES)
    run.latencies_ms += [1.0]
    run.finish(status)
    data = read_record(run.path)
    assert [data[key] for key in SPEEDS] == [None] * len(SPEEDS)
    assert data["token_latencies_ms"]["samples"] == [1.0], "raw samples stay"
    assert {key: data[key] for key in TIMES} == TIMES, "and what they are of"


@pytest.mark.parametrize("check", [None, {"passed": False}, {"passed": None}])
def test_without_a_passed_check_nothing_timed_is_kept(tmp_path, check):
    run = new(tmp_path, check=check, **SPEEDS, **TIMES)
    run.latencies_ms, run.prefill_ms, run.ttft_ms = [1.0], [1.0], [1.0]
    run.finish("ok" if check is None else "incorrect")
    data = read_record(run.path)
    assert not {key for key in (*SPEEDS, *TIMES, *record.SAMPLES) if data[key] is not None}


def test_unknown_keys_and_tensors_are_our_own_bugs(tmp_path):
    import torch

    with pytest.raises(AssertionError, match="colour"):
        new(tmp_path, colour="red")
    with pytest.raises(AssertionError, match="Tensor"):
        new(tmp_path, check={"value": torch.zeros(1)})


def test_values_become_plain_json(tmp_path):
    value = plain({"a": (1, 2.5), "b": math.nan, "c": -math.inf, 3: tmp_path, "d": compose(["model=nano"]).sampler})
    assert value["a"] == [1, 2.5] and (value["b"], value["c"]) == ("nan", "-inf")
    assert value["3"] == str(tmp_path) and value["d"]["name"] == "greedy"


def test_latency_percentiles_are_measured_values():
    summary = latency_summary([float(x) for x in range(100, 0, -1)])
    assert (summary["p50"], summary["p90"], summary["p99"], summary["n"]) == (50, 90, 99, 100)
    assert summary["mean"] == 50.5 and summary["sd"] == pytest.approx(29.01149)
    assert latency_summary([3.0])["sd"] == 0.0
    assert summary["samples"][0] == 100.0, "in the order of time"


def test_size_is_bounded_and_says_what_was_cut(tmp_path):
    ids, text = [list(range(60_000))] * 2, ["x" * 90_000] * 2
    run = new(tmp_path, check={"passed": True}, generated_ids=ids, generated_text=text)
    run.latencies_ms += [1.0 + 1e-4 * i for i in range(50_000)]
    run.prefill_ms, run.ttft_ms = list(run.latencies_ms), list(run.latencies_ms)
    run.set(rounds=[{"at": 1.0, "n": 10, "decode_ms_p50": 0.25}] * 5000)
    run.finish("ok")
    text = run.path.read_text()
    data = json.loads(text)
    assert len(text) < MAX_BYTES
    latencies = data["token_latencies_ms"]
    assert latencies["n"] == 50_000 and latencies["p99"] == pytest.approx(5.9499, abs=1e-3)
    assert 0 < len(latencies["samples"]) <= 4000
    assert any("token_latencies_ms.samples: the first" in note for note in data["notes"])
    for key in record.SAMPLES:
        assert data[key]["n"] == 50_000 and data[key]["mean"] == latencies["mean"] and len(data[key]["samples"]) <= 4000
        assert any(f"{key}.samples: the first" in note for note in data["notes"])
    assert any("generated_ids: the first" in note for note in data["notes"])
    assert any("rounds: the first 400 of 5000" in note for note in data["notes"]) and len(data["rounds"]) == 400
    assert len(run.data["generated_ids"][0]) == 60_000, "the record in memory stays whole"


def test_a_long_traceback_keeps_its_end(tmp_path):
    run = new(tmp_path)
    run.finish("failed", error={"type": "E", "message": "m", "phase": None, "traceback": "x" * 100_000 + "end"})
    assert read_record(run.path)["error"]["traceback"].endswith("end") and run.path.stat().st_size < 50_000


def test_number_lists_are_one_line_and_text_is_untouched(tmp_path):
    text = "[ 1, 2 ]\n[\n 3 \n]"
    new(tmp_path, generated_ids=[[1, 2], [3, -4]], generated_text=text).write()
    raw = (tmp_path / "record.json").read_text()
    assert "[1, 2]" in raw and "[3, -4]" in raw
    assert read_record(tmp_path / "record.json")["generated_text"] == text


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    run = new(tmp_path)
    run.write()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        run.finish("failed")
    assert read_record(run.path)["status"] == "running"


def test_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "record.json"
    for text in ("{", "[]", '{"schema": "other/1"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="record.json"):
            read_record(path)


def test_environment_is_plain_and_names_no_host():
    import platform

    found = environment.collect("cpu")
    text = json.dumps(plain(found))
    assert found["versions"]["torch"] and found["python"] and found["cpu"]["cores"] >= 1
    assert f'"{platform.node()}"' not in text


def test_git_state_is_of_the_package_s_own_checkout(tmp_path):
    import subprocess

    package = tmp_path / "repo" / "moeexp"
    package.mkdir(parents=True)
    assert environment.git_state(package) is None, "no checkout"
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    assert environment.git_state(package)["dirty"] is False
    (package / "a.py").write_text("")
    assert environment.git_state(package)["dirty"] is True
    installed = package.parent / ".venv" / "moeexp"
    installed.mkdir(parents=True)
    assert environment.git_state(installed) is None, "installed inside someone else's checkout"


def test_what_a_table_holds_is_changed_through_the_record(tmp_path):
    record = Record(tmp_path / "record.json", id="t", config=None, command=["test"])
    record.set(environment={"cuda": None}, not_applicable=["pdl"])
    record.add("environment", gpu_other_processes=float("nan"), gpu_after=tmp_path)
    assert record.data["environment"] == {"cuda": None, "gpu_other_processes": "nan", "gpu_after": str(tmp_path)}
    for _ in range(2):
        record.add_not_applicable("allocator")
    assert record.data["not_applicable"] == ["pdl", "allocator"]
    with pytest.raises(AssertionError, match="is not a key of a record"):
        record.add("environs", a=1)


CHANGES = ("append", "extend", "update", "pop", "popitem", "setdefault", "clear", "insert", "remove", "sort")


def changed(source):
    """Lines that change `….data`, or what a name stands for that was taken out of it, beside the record's own methods."""
    tree, found = ast.parse(source), []
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        names = {
            target.id for node in ast.walk(function) if isinstance(node, ast.Assign) and of_data(node.value, set())
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
            targets = [node.target] if isinstance(node, ast.AugAssign) else targets
            if any(isinstance(target, ast.Subscript) and of_data(target, names) for target in targets):
                found.append(node.lineno)
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Attribute) and call.attr in CHANGES and of_data(call.value, names):
                found.append(node.lineno)
    return sorted(set(found))


def of_data(node, names):
    while isinstance(node, ast.Subscript):
        node = node.value
    is_data = isinstance(node, ast.Attribute) and node.attr == "data" and ast.unparse(node.value).split(".")[-1] == "record"
    return is_data or (isinstance(node, ast.Name) and node.id in names)


def test_nobody_changes_a_record_around_its_methods():
    root = Path(__file__).resolve().parents[1] / "moeexp"
    found = {str(path.relative_to(root)): changed(path.read_text()) for path in root.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}
    for line in ('record.data["a"] = 1', 'self.record.data["a"]["b"] = 1', 'member.record.data["a"].append(1)',
                 'a = record.data["a"]\n  a.pop("b")', 'a = record.data["a"]\n  a["b"].append(1)'):  # fmt: skip
        assert changed(f"def f(self):\n  {line}\n"), line
