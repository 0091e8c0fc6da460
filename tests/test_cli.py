"""The command line, with a fake experiment: exit codes, records, sweeps, one-line errors."""

import json
import os
import signal
import subprocess
import sys

import pytest

from moeexp.cli import main
from moeexp.record.record import read_record

QUIET = ["model=nano", "tracker=jsonl"]
HERE = "launcher.isolation=none"  # sweeps with a process per run: tests/faults


def experiment(cfg, *, run_dir, record, phases):
    """What a run does is chosen by its seed."""
    if cfg.seed == 1:
        raise ValueError("seed=1 cannot be done:\nuse seed=0")
    with phases("weights"):
        if cfg.seed == 7:
            raise ValueError("seed=7 has damaged weights")
    with phases("export"), phases.progress("methods", total=2) as advance:
        advance()
    if cfg.seed == 8:
        raise ValueError("not a number")
    if cfg.seed == 2:
        with phases("benchmark"):
            raise RuntimeError("boom")
    record.set(check={"passed": cfg.seed != 3, "parts": [], "failures": [] if cfg.seed != 3 else ["too far off"]})
    record.latencies_ms += [1.0, 2.0]
    if cfg.seed == 4:
        raise KeyboardInterrupt
    if cfg.seed == 5:
        sys.exit(3)
    if cfg.seed == 6:
        record.set(check=None)
    record.set(decode_tok_s=10.0, generated_text=["hello"])


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return main([*QUIET, *arguments], experiment=experiment)


def records(tmp_path, folder="outputs"):
    return [read_record(path) for path in sorted((tmp_path / folder).rglob("record.json"))]


def test_ok(tmp_path, capsys):
    assert run() == 0
    (record,) = records(tmp_path)
    assert record["status"] == "ok" and record["decode_tok_s"] == 10.0 and record["random_weights"] is True
    assert record["command"] == ["python", "-m", "moeexp", *QUIET] and record["overrides"] == QUIET
    assert record["config"]["device"] in ("cpu", "cuda") and record["config"]["quant"]["group_size"] == 32
    assert record["config_hash"] and record["code_fingerprint"] and record["phases_s"]["export"] >= 0
    assert record["environment"]["versions"]["torch"] and record["error"] is None
    captured = capsys.readouterr()
    assert "hello" in captured.out and "record.json" in captured.out
    assert captured.err.splitlines()[2] == "export ..." and captured.err.splitlines()[3].startswith("export  ")
    assert json.loads((tmp_path / "outputs" / "runs.jsonl").read_text())["id"] == record["id"]


def test_incorrect(tmp_path, capsys):
    assert run("seed=3") == 1
    (record,) = records(tmp_path)
    assert record["status"] == "incorrect" and record["decode_tok_s"] is None
    assert "too far off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seed", "line"), [(1, "error: seed=1 cannot be done: use seed=0"), (7, "error: seed=7 has damaged weights")]
)
def test_a_value_error_about_what_was_given_is_one_line(tmp_path, capsys, seed, line):
    assert run(f"seed={seed}") == 2
    (record,) = records(tmp_path)
    assert record["status"] == "failed" and record["error"]["type"] == "ValueError"
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == line
    assert "Traceback" not in captured.err + captured.out


def test_a_value_error_of_the_work_is_a_failure(tmp_path, capsys):
    assert run("seed=8") == 1
    assert records(tmp_path)[0]["status"] == "failed"
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ValueError: not a number (traceback: outputs/")


def test_a_failure_says_where_its_traceback_is(tmp_path, capsys):
    assert run("seed=2") == 1
    (record,) = records(tmp_path)
    assert record["status"] == "failed" and record["error"]["phase"] == "benchmark"
    assert "RuntimeError: boom" in record["error"]["traceback"] and record["phases_s"]["benchmark"] >= 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: RuntimeError during benchmark: boom (traceback: outputs/")
    path = line.split("traceback: ")[1].rstrip(")")
    assert "RuntimeError: boom" in (tmp_path / path).read_text()


def test_interrupted_keeps_samples(tmp_path, capsys):
    assert run("seed=4") == 130
    (record,) = records(tmp_path)
    assert record["status"] == "interrupted" and record["token_latencies_ms"]["samples"] == [1.0, 2.0]
    assert record["error"]["message"].startswith("interrupted") and "interrupted" in capsys.readouterr().err


def test_an_exit_inside_a_run_is_a_failure(tmp_path):
    assert run("seed=5") == 1
    assert records(tmp_path)[0]["error"]["type"] == "SystemExit"


def test_a_run_without_a_verdict_is_a_failure(tmp_path):
    assert run("seed=6") == 1
    assert "verdict" in records(tmp_path)[0]["error"]["message"]


def test_check_off_is_ok_and_publishes_no_speed(tmp_path):
    assert run("seed=6", "check=off") == 0
    (record,) = records(tmp_path)
    assert record["status"] == "ok" and record["decode_tok_s"] is None and record["token_latencies_ms"] is None


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["foo=1"], ["no setting foo"]),
        (["quantt=int4"], ["no setting quantt", "did you mean quant"]),
        (["quant.nam=x"], ["no setting quant.nam", "did you mean quant.name"]),
        (["+foo=1"], ["no setting foo"]),
        (["~seed"], ["seed is missing"]),
        (["quant=int9"], ["quant=int9", "allowed: int4, int8, none"]),
        (["model=banana"], ["model=banana", "nano", "tiny"]),
        (["experiment=banana"], ["experiment=banana", "allowed: full_factorial, fullsize, ladder"]),
        (["new_tokens=abc"], ["new_tokens=abc", "Integer"]),
        (["prompt_ids=[a]"], ["prompt_ids[0]=a"]),
        (["shared_stream=banana"], ["shared_stream=banana", "bool"]),
        (["cuda_graph=false,true"], ["-m sweeps over several"]),
        (["cuda_graph=["], ["cuda_graph"]),
        (["x"], ["'x'"]),
        (["model=[1]"], ["Hydra"]),
        (["cuda_graph=banana"], ["allowed: false, true, decode, loop, all"]),
        (["dispatch=cond", "state=shared"], ["torch.cond", "state=explicit"]),
        (["--config-name=foo"], ["foo"]),
        (["--banana"], ["--banana", "--help"]),
        (["prompt=a, b"], ["'prompt=a, b'", "-m sweeps over several", "'prompt=\"a, b\"'"]),
        (["--multirun", "quant=int4,int9"], ["quant=int9"]),
    ],
)
def test_invalid_input_is_one_line_and_exit_2(arguments, parts, capsys):
    assert main([*QUIET, *arguments], experiment=experiment) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and captured.out == ""
    for part in parts:
        assert part in line


def test_refused_before_any_work(tmp_path):
    assert main([*QUIET, "new_tokens=0"], experiment=experiment) == 2
    (record,) = records(tmp_path)
    assert record["status"] == "failed" and record["phases_s"] == {} and record["tracker"] is None


def test_state_of_the_process_is_restored(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    argv = list(sys.argv)
    assert main(["foo=1"]) == 2
    assert sys.argv == argv and "HYDRA_FULL_ERROR" not in os.environ


def test_a_time_limit_makes_a_single_run_a_sweep_of_one(tmp_path):
    assert run("launcher.timeout_s=60", HERE) == 0
    (record,) = records(tmp_path, "multirun")
    assert record["status"] == "ok" and not list((tmp_path / "outputs").rglob("record.json"))


def test_run_folders_of_one_second_differ(tmp_path):
    assert [run() for _ in range(3)] == [0, 0, 0]
    assert len({record["id"] for record in records(tmp_path)}) == 3


def test_sweep_goes_on_after_failures(tmp_path, capsys):
    assert run("-m", "seed=1,2,3,5,0", HERE) == 1
    found = records(tmp_path, "multirun")
    assert [record["status"] for record in found] == ["unsupported", "failed", "incorrect", "failed", "ok"]
    assert [record["id"].split(".")[1] for record in found] == ["0", "1", "2", "3", "4"]
    (table,) = (tmp_path / "multirun").rglob("table.md")
    text = table.read_text()
    assert text.count("\n| ") == 6 + 1 and "| seed | status |" in text.replace("`", "") and "boom" in text
    assert "| seed | status |" in capsys.readouterr().out


def test_only_what_was_refused_before_work_fails_no_sweep(tmp_path):
    assert run("-m", "seed=1,0", HERE) == 0
    assert run("-m", "seed=7,0", HERE) == 1
    assert run("-m", "seed=8,0", HERE) == 1
    found = {record["config"]["seed"]: record["status"] for record in records(tmp_path, "multirun")}
    assert found == {0: "ok", 1: "unsupported", 7: "failed", 8: "failed"}


@pytest.mark.parametrize("strict, code", [("false", 0), ("true", 1)])
def test_invalid_cells_fail_a_strict_sweep_only(tmp_path, strict, code):
    assert run("-m", "seed=0", "new_tokens=0,1", f"launcher.strict={strict}", HERE) == code
    assert [record["status"] for record in records(tmp_path, "multirun")] == ["unsupported", "ok"]


def test_an_interrupt_ends_a_sweep_and_leaves_its_table(tmp_path):
    assert run("-m", "seed=0,4,0", HERE) == 130
    assert [record["status"] for record in records(tmp_path, "multirun")] == ["ok", "interrupted"]
    assert list((tmp_path / "multirun").rglob("table.md"))


@pytest.mark.parametrize("flags", [["-m"], []])
def test_every_experiment_runs(tmp_path, flags):
    assert run(*flags, "experiment=quantisation", HERE) == 0
    names = [record["config"]["quant"]["name"] for record in records(tmp_path, "multirun")]
    assert names == ["none", "int8", "int4"]


def test_help_and_cfg(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("python -m moeexp", "qwen3_5_35b_a3b", "int4", "cuda_graph", "Exit codes"):
        assert word in text
    assert main(["--cfg", "job", "model=nano", "quant=int8"]) == 0
    assert "name: int8" in capsys.readouterr().out


def test_a_bug_of_ours_is_not_dressed_up_as_a_config_error(monkeypatch):
    from moeexp.run import job

    def broken(*_, **__):
        raise KeyError("our own")

    monkeypatch.setattr(job.terminal, "print_run", broken)
    with pytest.raises(KeyError):
        run()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("quant=int9", "quant=int9 is not a choice of quant; allowed: int4, int8, none"),
        # Read before torch is imported, which in this process it is.
        ("allocator=foo", "allocator=foo is not a value of allocator; allowed: native, cuda_malloc_async"),
    ],
)
def test_as_a_process(override, line):
    command = [sys.executable, "-m", "moeexp", "model=nano", override]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


def test_ctrl_c_in_a_process(tmp_path):
    code = """
import sys, time
from moeexp.cli import main
def experiment(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True})
    record.latencies_ms += [1.0]
    with phases("benchmark"):
        print("ready", flush=True)
        time.sleep(60)
sys.exit(main(["model=nano", "tracker=jsonl"], experiment=experiment))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in errors
    (record,) = records(tmp_path)
    assert record["status"] == "interrupted" and record["error"]["phase"] == "benchmark"
    assert record["token_latencies_ms"]["samples"] == [1.0] and record["phases_s"]["benchmark"] < 60
