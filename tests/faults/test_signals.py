"""SIGTERM and SIGHUP end a run as Ctrl-C does, at any moment; what a killed run leaves behind reads as lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from common import slow_after
from sabotage import experiment, ran

from moeexp.cli import main
from moeexp.config.compose import compose
from moeexp.record import disk, liveness
from moeexp.record.head import head
from moeexp.record.locks import try_lock
from moeexp.record.record import Record, read_record
from moeexp.sweep.history import History

EXPERIMENT = """
import sys, time
from moeexp.record import tracker
from moeexp.cli import main
def ready():
    print("ready", flush=True)
    time.sleep(60)
def experiment(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True})
    record.latencies_ms += [1.0]
    with phases("benchmark"):
        BODY
TRACK
sys.exit(main(["model=nano", "tracker=jsonl"], experiment=experiment))
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(body="ready()", track="", ignored=()):
    code = EXPERIMENT.replace("BODY", body.replace("\n", "\n        ")).replace("TRACK", track)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], preexec_fn=lambda: listen(ignored), **pipes)


def listen(ignored=()):
    """Whatever the tests themselves were started to ignore: `nohup make test` ignores SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def ready(run):
    for line in run.stdout:
        if line == "ready\n":
            return
    raise AssertionError(f"it ended with {run.wait()}")


def the_record():
    (path,) = Path("outputs").rglob("record.json")
    return read_record(path)


@pytest.mark.parametrize("number", slow_after(1, [signal.SIGTERM, signal.SIGHUP]))
def test_a_run_is_interrupted(number):
    with start() as run:
        ready(run)
        run.send_signal(number)
        run.send_signal(number)  # `timeout` signals its child, then the child's group: one request
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in output and "interrupted; what was measured is in" in output
    record = the_record()
    assert record["status"] == "interrupted" and record["token_latencies_ms"]["samples"] == [1.0]
    assert record["error"]["message"] == f"interrupted by {number.name} during benchmark"
    assert json.loads(Path("outputs/runs.jsonl").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_nobody_listens_any_more():
    """A terminal that hung up, or a `tee` that got the same signal."""
    with start() as run:
        ready(run)
        run.stdout.close()
        run.terminate()
        assert run.wait(60) == 130
    assert the_record()["status"] == "interrupted"
    assert json.loads(Path("outputs/runs.jsonl").read_text())["status"] == "interrupted"


SWALLOWED = "try:\n    ready()\nexcept KeyboardInterrupt:\n    pass"
ANOTHER_ERROR = "try:\n    ready()\nexcept KeyboardInterrupt:\n    raise RuntimeError('the compiler was killed')"


@pytest.mark.slow
@pytest.mark.parametrize("body", [SWALLOWED, ANOTHER_ERROR])
def test_an_interrupt_that_gets_lost_on_its_way_is_one(body):
    with start(body) as run:
        ready(run)
        run.terminate()
        run.communicate(timeout=60)
    assert run.returncode == 130
    assert the_record()["status"] == "interrupted" and the_record()["error"]["type"] == "KeyboardInterrupt"


@pytest.mark.slow
def test_a_second_one_kills():
    with start("try:\n    ready()\nexcept KeyboardInterrupt:\n    ready()") as run:
        ready(run)
        run.terminate()
        ready(run)
        time.sleep(0.6)
        run.terminate()
        run.communicate(timeout=10)
    assert run.returncode == -signal.SIGTERM
    record = the_record()
    assert record["status"] == "lost" and "is gone during benchmark" in record["error"]["message"]


@pytest.mark.slow
def test_one_that_was_ignored_stays_ignored():
    """nohup."""
    with start("print('ready', flush=True)\ntime.sleep(2)", ignored=[signal.SIGHUP]) as run:
        ready(run)
        run.send_signal(signal.SIGHUP)
        run.communicate(timeout=60)
    assert run.returncode == 0 and the_record()["status"] == "ok"


@pytest.mark.slow
def test_during_tracking_the_record_stays_whole():
    with start("pass", track="tracker.track = lambda *_, **__: ready()") as run:
        ready(run)
        run.terminate()
        run.communicate(timeout=60)
    assert run.returncode == 130
    record = the_record()
    assert record["status"] == "ok" and "tracking was interrupted; the record is whole" in record["notes"]


def test_during_imports():
    """The record is there before torch is."""
    with start() as run:
        deadline = time.monotonic() + 60
        while not list(Path(".").rglob("record.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.terminate()
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert the_record()["status"] == "interrupted" and the_record()["environment"] is None


def test_a_process_that_is_there_is_not_lost(tmp_path):
    run = Record(tmp_path / "record.json", id="a", config=compose(["model=nano"]), command=[])
    run.write()
    assert read_record(run.path)["status"] == head(run.path)["status"] == "running"


GONE = {"pid": 2**22 + 1}
# Of this process, as the kernel counts.
TICKS = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
OTHER = [
    (GONE, "lost"),
    ({"started_s": 0.5}, "lost"),  # the pid came again
    ({"started_s": None, "started_ticks": 1}, "lost"),  # as records had it
    ({"started_s": None, "started_ticks": TICKS}, "running"),
    ({"started_s": "x", "started_ticks": []}, "running"),  # not written here
    ({"boot": "another"}, "lost"),
    (GONE | {"host": "elsewhere"}, "running"),
    (GONE | {"pid_namespace": "pid:[1]"}, "running"),
    ({"pid": "x"}, "running"),
    ({"pid": 0}, "running"),
]


@pytest.mark.parametrize("changed, status", OTHER)
def test_whose_process_is_gone(tmp_path, changed, status):
    run = Record(tmp_path / "record.json", id="a", config=compose(["model=nano"]), command=[])
    run.set(process=liveness.this_process() | changed)
    run.write()
    assert read_record(run.path)["status"] == head(run.path)["status"] == History([tmp_path]).runs[0].status == status
    assert Record.load(run.path).data["status"] == "running", "only reading says so"


def test_setting_the_clock_does_not_end_a_process(monkeypatch):
    process, created, booted = liveness.this_process(), psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil, "boot_time", lambda: booted() + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
    assert not liveness.is_gone(process)


def test_one_that_waits_for_its_parent_to_notice_its_end_is_gone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = psutil.Process(child.pid).create_time() - psutil.boot_time()
        process = liveness.this_process() | {"pid": child.pid, "started_s": started}
        assert not liveness.is_gone(process)
        child.stdin.close()
        deadline = time.monotonic() + 60
        while not liveness.is_gone(process):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert child.returncode is None and psutil.pid_exists(child.pid)


def test_a_process_that_nobody_may_look_at_is_there(monkeypatch):
    def hidden(self):
        raise psutil.AccessDenied(self.pid)

    process = liveness.this_process()
    monkeypatch.setattr(psutil.Process, "status", hidden)
    assert not liveness.is_gone(process)


def test_the_next_call_closes_every_lost_record(tmp_path, monkeypatch):
    """Of any cell, not only of its own; what may not be written, or another sweep holds, stays as it is and reads as lost."""
    left = [Path(f"multirun/before/{name}") for name in ("other", "held", "there")]
    for folder in left:
        folder.mkdir(parents=True)
        run = Record(folder / "record.json", id=folder.name, config=compose(["model=nano", "seed=77"]), command=[])
        run.set(process=liveness.this_process() | (GONE if folder.name != "there" else {}), config_hash="0" * 8)
        disk.keep_space(folder)
        run.write()
    held = try_lock(left[1] / ".lock")
    arguments = ["-m", "model=nano", "tracker=jsonl", "export=eager", "seed=10", "launcher.isolation=none"]
    assert main(arguments, experiment=experiment) == 0
    held.release()
    assert [json.loads((folder / "record.json").read_text())["status"] for folder in left] == ["lost", "running", "running"]
    assert json.loads((left[0] / "record.json").read_text())["error"]["type"] == "ProcessLost"
    assert [path.name for path in left[0].iterdir()] == ["record.json"], "the room that was kept is free again"
    monkeypatch.setattr("moeexp.sweep.history.Record.finish", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert main(arguments, experiment=experiment) == 0, "somebody else's folder stops no sweep"


def start_sweep():
    arguments = ["-m", "model=nano", "tracker=jsonl", "export=eager", "seed=4"]
    Path("sabotage").touch()
    call = "import sys; from moeexp.cli import main; from sabotage import experiment; "
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-c", call + f"sys.exit(main({arguments!r}, experiment=experiment))"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.Popen(command, env=environment, preexec_fn=listen, **pipes)
    while not Path("ran").exists():
        assert run.poll() is None
        time.sleep(0.05)
    return run, arguments


@pytest.mark.slow
def test_a_sweep_that_nobody_listens_to_stops_its_runs():
    run, _ = start_sweep()
    run.stdout.close()
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 130
    (path,) = Path("multirun").rglob("record.json")
    assert json.loads(path.read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_the_next_call_of_a_sweep_closes_what_was_lost():
    run, arguments = start_sweep()
    run.kill()
    run.wait()
    (path,) = Path("multirun").rglob("record.json")
    deadline = time.monotonic() + 10
    while read_record(path)["status"] != "lost":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads(path.read_text())["status"] == "running"
    ran(), Path("sabotage").unlink()
    assert main(arguments, experiment=experiment) == 0 and ran() == [4]
    closed = json.loads(path.read_text())
    assert closed["status"] == "lost" and closed["finished"] and closed["error"]["type"] == "ProcessLost"
