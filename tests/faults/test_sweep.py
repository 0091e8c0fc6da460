"""Sweeps whose runs raise, exit, are killed, crash and hang; that are interrupted; that run twice in one folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sabotage import experiment, ran

from moeexp.cli import main
from moeexp.record.gpus import Gpu
from moeexp.record.record import read_record

QUIET = ["-m", "model=nano", "tracker=jsonl", "export=eager"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sabotage").touch()


def sweep(*arguments):
    return main([*QUIET, *arguments], experiment=experiment)


def by_seed(folder="multirun"):
    """The last record of each seed."""
    records = [read_record(path) for path in Path(folder).rglob("record.json") if not path.is_symlink()]
    return {record["config"]["seed"]: record for record in sorted(records, key=lambda record: record["started"])}


def statuses(folder="multirun"):
    return {seed: record["status"] for seed, record in sorted(by_seed(folder).items())}


@pytest.mark.slow
def test_one_exits_and_only_that_one_is_repeated(capsys):
    assert sweep("seed=0,2") == 1
    assert statuses() == {0: "ok", 2: "failed"} and ran() == [0, 2]
    error = by_seed()[2]["error"]
    assert error["exit_code"] == 3 and error["phase"] == "benchmark" and "code 3 during benchmark" in error["message"]
    Path("sabotage").unlink()
    capsys.readouterr()
    assert sweep("seed=0,2") == 0
    assert statuses() == {0: "ok", 2: "ok"} and ran() == [2]
    assert "1 of 2 cells had run before and were reused" in capsys.readouterr().out


@pytest.mark.slow
def test_twelve_cells_four_of_them_sabotaged(capsys):
    seeds = f"seed={','.join(map(str, range(1, 5)))},{','.join(map(str, range(10, 18)))}"
    start = time.monotonic()
    assert sweep(seeds, "launcher.timeout_s=40") == 1
    wall = time.monotonic() - start
    in_processes = sum(map(float, re.findall(r"\(([\d.]+) s\)$", capsys.readouterr().err, re.MULTILINE)))
    assert wall - in_processes < 2 * 12, "what the parent adds"
    records = by_seed()
    assert {seed: record["status"] for seed, record in records.items() if record["status"] != "ok"} == {
        1: "failed", 2: "failed", 3: "failed", 4: "timeout",
    }  # fmt: skip
    assert len(records) == 12 and ran() == [1, 2, 3, 4, *range(10, 18)]
    assert "RuntimeError: boom" in records[1]["error"]["traceback"]
    assert records[2]["error"]["exit_code"] == 3
    assert records[3]["error"]["signal"] == "SIGKILL" and "out of memory" in records[3]["error"]["message"]
    assert "launcher.timeout_s (40 s)" in records[4]["error"]["message"]
    assert records[4]["token_latencies_ms"]["samples"] == [1.0, 2.0], "what was measured before the time was up"
    assert all(record["decode_tok_s"] is None for record in records.values() if record["status"] != "ok")
    Path("sabotage").unlink()
    assert sweep(seeds, "launcher.timeout_s=40") == 0
    assert ran() == [1, 2, 3, 4] and set(statuses().values()) == {"ok"}


@pytest.mark.parametrize("error", [MemoryError(), ValueError(" "), RuntimeError("\n")], ids=lambda error: type(error).__name__)
def test_an_error_that_says_nothing_is_told_by_its_name(capsys, error):
    def silent(cfg, *, run_dir, record, phases):
        with phases("benchmark"):
            raise error

    assert main([*QUIET, "launcher.isolation=none", "seed=0"], experiment=silent) == 1
    assert by_seed()[0]["error"]["message"] == type(error).__name__
    assert f".0 failed: {type(error).__name__}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_without_a_name_and_records_that_are_gone_or_damaged(capsys):
    assert sweep("seed=7,8,20,0") == 1
    assert statuses() == {0: "ok", 7: "failed", 8: "failed", 20: "failed"}
    messages = {seed: record["error"]["message"] for seed, record in by_seed().items() if seed}
    assert f"ended by signal {signal.SIGRTMIN + 1} during benchmark" in messages[7]
    assert "exited with code 0 between two phases" in messages[8] and "exited with code 3" in messages[20]
    assert "left no record that can be read" in by_seed()[20]["notes"][0]
    said = capsys.readouterr().err
    assert "Traceback" not in said and max(map(len, said.splitlines())) <= 400
    Path("sabotage").unlink()
    assert sweep("seed=7,8,20,0") == 0 and ran() == [0, 7, 7, 8, 8, 20, 20]


@pytest.mark.slow
def test_a_crash_and_a_hang_that_does_not_listen(monkeypatch):
    monkeypatch.setattr("moeexp.sweep.process.GRACE_S", 1.0)
    assert sweep("seed=5,6,9", "launcher.timeout_s=40") == 1
    records = by_seed()
    assert statuses() == {5: "failed", 6: "timeout", 9: "ok"}
    assert records[5]["error"]["signal"] == "SIGSEGV" and "string_at" in records[5]["error"]["traceback"]
    assert "killed during benchmark" in records[6]["error"]["message"]


@pytest.mark.slow
def test_runs_spread_over_gpus_one_on_each(monkeypatch):
    gpus = [Gpu(0, "GPU-aaaa", "made up"), Gpu(1, "GPU-bbbb", "made up")]
    monkeypatch.setattr("moeexp.sweep.sweep.visible_gpus", lambda: gpus)
    assert sweep("seed=30,31", "device=cpu", "launcher.gpus=all") == 0
    assert {Path(f"gpu-{seed}").read_text() for seed in (30, 31)} == {"GPU-aaaa", "GPU-bbbb"}


@pytest.mark.slow
def test_fail_fast_stops_at_the_first():
    assert sweep("seed=10,1,11", "launcher.fail_fast=true") == 1
    assert statuses() == {1: "failed", 10: "ok"} and ran() == [1, 10]
    assert "1 of 3 cells did not run (2)" in next(Path("multirun").rglob("table.md")).read_text()


def start(*arguments):
    """The command line as a process."""
    call = f"import sys; from moeexp.cli import main; from sabotage import experiment; sys.exit(main({list(arguments)!r}, "
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    # What starts these tests in the background may have them ignore SIGINT, and children inherit that.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, "-c", call + "experiment=experiment))"], **pipes, **listening)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_and_resumed(number):
    with start(*QUIET, "seed=10,4,11") as run:
        until(lambda: Path("ran").exists() and Path("ran").read_text().split() == ["10", "4"])
        run.send_signal(number)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in output
    record = by_seed()[4]
    assert statuses() == {4: "interrupted", 10: "ok"} and record["error"]["phase"] == "benchmark"
    assert record["token_latencies_ms"]["samples"] == [1.0, 2.0]
    ran()
    Path("sabotage").unlink()
    assert sweep("seed=10,4,11") == 0
    assert statuses() == {4: "ok", 10: "ok", 11: "ok"} and ran() == [4, 11]


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_run_behind():
    with start(*QUIET, "seed=4") as run:
        until(lambda: Path("ran").exists())
        run.kill()
        run.wait()
    until(lambda: not _processes_in(os.getcwd()), seconds=10)
    assert statuses() == {4: "lost"} and by_seed()[4]["config_hash"]
    ran(), Path("sabotage").unlink()
    assert sweep("seed=4") == 0 and ran() == [4]


def _processes_in(folder):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == folder and int(entry.name) != os.getpid():
                found.append(entry.name)
        except OSError:  # it has ended meanwhile, or is not ours
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", [[], ["hydra.sweep.dir=same"]])
def test_two_sweeps_started_at_once_do_not_collide(folder):
    with start(*QUIET, "seed=10,11", *folder) as one, start(*QUIET, "seed=11,12", *folder) as two:
        outputs = [run.communicate(timeout=120)[0] for run in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    paths = [path for path in Path(".").rglob("record.json") if not path.is_symlink()]
    found = [read_record(path) for path in paths]
    assert {record["status"] for record in found} == {"ok"} and len({record["id"] for record in found}) == len(found)
    assert {record["config"]["seed"] for record in found} == {10, 11, 12}
    assert ran() in ([10, 11, 11, 12], [10, 11, 12])
    for output, seeds in zip(outputs, ((10, 11), (11, 12)), strict=True):
        assert all(f"| {seed} | ok |" in output for seed in seeds), output


@pytest.mark.slow
def test_wandb_out_of_reach_costs_one_warning_and_bounded_time(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = time.monotonic()
    assert main(["-m", "model=nano", "tracker=wandb", "tracker.mode=online", "tracker.timeout_s=10", "seed=10"],
                experiment=experiment) == 0  # fmt: skip
    assert time.monotonic() - start < 40
    (record,) = by_seed().values()
    assert record["status"] == "ok" and record["decode_tok_s"] == 10.0 and record["tracker"]["warning"]
    (output,) = Path("multirun").rglob("output.txt")
    assert output.read_text().count("warning:") == 1
