"""Trackers: what they log, and that they never cost a measured run."""

import json
import os
import socket
import time

import pytest

from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.record import tracker
from moeexp.record.record import Record, plain, read_record

STALLS = {"count": 1, "total_ms": 2.0, "longest_ms": 2.0, "decode_tok_s": 6.0}


def make(folder, *overrides):
    folder.mkdir(parents=True, exist_ok=True)
    config = plain(resolve(compose(["model=nano", *overrides]), cuda_available=False))
    run = Record(folder / "record.json", id="ab12", config=config, command=["python"], overrides=list(overrides))
    run.set(check={"passed": True, "parts": [], "failures": []}, decode_tok_s=5.0, environment={"gpu": None})
    run.latencies_ms += [1.0, 2.0, 4.0]
    run.prefill_ms += [7.0, 9.0]
    run.set(stalls=STALLS)
    run.finish("ok")
    return run


def track(run, **keywords):
    return tracker.track(run.data, run_dir=run.path.parent, **{"exit_code": 0, "group": None} | keywords)


def test_jsonl_appends_a_line_for_each_run(tmp_path):
    path = tmp_path / "out" / "runs.jsonl"
    for name in ("a", "b"):
        result = track(make(tmp_path / name, "tracker=jsonl", f"tracker.path={path}"))
        assert result["path"] == str(path) and result["warning"] is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["decode_tok_s"] for line in lines] == [5.0, 5.0]
    assert lines[0]["token_latencies_ms"]["p50"] == 2.0 and "samples" not in lines[0]["token_latencies_ms"]
    assert lines[0]["prefill_latencies_ms"]["p90"] == 9.0 and "samples" not in lines[0]["prefill_latencies_ms"]


def test_the_summary_has_the_speed_its_stalls_and_the_latencies(tmp_path):
    summary = tracker._summary(make(tmp_path).data)
    assert summary["decode_tok_s"] == 5.0 and summary["stalls"] == STALLS
    assert summary["latency_ms"]["p50"] == 2.0 and summary["prefill_latency_ms"]["p50"] == 7.0
    assert "samples" not in str(summary) and "ttft_latency_ms" not in summary


def test_jsonl_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    run = make(tmp_path / "a", "tracker=jsonl", f"tracker.path={tmp_path / 'file' / 'runs.jsonl'}")
    assert "runs.jsonl" in track(run)["warning"]


def test_wandb_offline_logs_a_run_and_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = make(tmp_path / "run", "tracker.timeout_s=120")
    before = run.path.read_bytes()
    result = track(run, exit_code=1, group="a sweep")
    assert (result["mode"], result["url"], result["warning"]) == ("offline", None, None)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert result["path"].endswith(folder.name)
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    for text in (b"token_latency_ms", b"decode_tok_s", b"a sweep", b"moeexp", b"ab12"):
        assert text in content
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert run.path.read_bytes() == before


def test_wandb_disabled_leaves_nothing(tmp_path):
    result = track(make(tmp_path / "run", "tracker.mode=disabled", "tracker.timeout_s=120"))
    assert result["mode"] == "disabled" and result["warning"] is None
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.slow
def test_a_server_that_never_answers_costs_bounded_time(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        run = make(tmp_path / "run", "tracker.mode=online", "tracker.timeout_s=3")
        start = time.monotonic()
        result = track(run)
        assert time.monotonic() - start < 30, "W&B's own retries go on for minutes"
    assert "timeout_s=3" in result["warning"]
    assert read_record(run.path)["status"] == "ok"


@pytest.mark.slow
def test_an_unreachable_server_is_one_warning_and_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    result = track(make(tmp_path / "run", "tracker.mode=online", "tracker.timeout_s=90"))
    assert result["mode"] == "offline" and "could not be reached" in result["warning"], result
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_run_is_logged_by_a_service_of_its_own(tmp_path, monkeypatch):
    """And not by one that runs already, which may be gone by now, or hold the run's id from an attempt that failed."""
    monkeypatch.setenv(tracker.SERVICE, f"3-{os.getpid()}-unix-{tmp_path / 'gone'}")
    assert track(make(tmp_path / "run", "tracker.mode=offline"))["mode"] == "offline"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_key_that_cannot_be_is_one_warning_and_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    result = track(make(tmp_path / "run", "tracker.mode=online", "tracker.timeout_s=60"))
    assert result["mode"] == "offline" and "API key" in result["warning"]


def test_a_broken_wandb_is_one_warning(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('no wandb here')")
    monkeypatch.setattr(tracker.sys, "executable", "/nowhere/python")
    run = make(tmp_path / "run")
    assert "could not be started" in track(run)["warning"]
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=":")
    assert "no wandb here" in track(run)["warning"]
    online, offline = track(make(tmp_path / "online", "tracker.mode=online"))["warning"].split("; nor was it logged offline: ")
    assert "no wandb here" in online and "no wandb here" in offline


@pytest.mark.parametrize(
    "mode, variables, expected",
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
    ],
)
def test_mode(mode, variables, expected, tmp_path):
    assert tracker.wandb_mode({"mode": mode}, {"NETRC": str(tmp_path / "none")} | variables) == expected


@pytest.mark.parametrize("host, expected", [("api.wandb.ai", "online"), ("example.org", "offline")])
def test_a_login_in_the_netrc_file_counts(tmp_path, host, expected):
    path = tmp_path / "netrc"
    path.write_text(f"machine {host}\n  login user\n  password x\n")
    assert tracker.wandb_mode({"mode": "auto"}, {"NETRC": str(path)}) == expected
