"""Interrupts while the command starts, where most time goes into imports; a Triton that cannot be imported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeexp.record.record import read_record

# As `python -m moeexp`, which sends itself a signal when it is about to import a module, or in the middle of what that does.
START = """
import importlib.abc, os, runpy, signal, sys
MODULE, NUMBER, ERROR = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), NUMBER)
                for _ in range(1000): pass
            except KeyboardInterrupt:
                if ERROR == "swallowed": return None
                if ERROR: raise RecursionError("maximum recursion depth exceeded")
                raise
sys.meta_path.insert(0, Interrupting())
runpy.run_module("moeexp", run_name="__main__", alter_sys=True)
"""
RUN = ["model=nano", "tracker=jsonl", "export=eager"]
# In the order in which a run imports them.
EARLY = ["moeexp.cli", "hydra", "omegaconf", "rich.console", "moeexp.sweep.sweep"]
LATE = ["torch", "numpy", "moeexp.stack.artifact_config", "moeexp.run.experiment", "moeexp.check.verify"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def listen():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(module, *arguments, number=signal.SIGINT, error=""):
    command = [sys.executable, "-c", START, module, str(int(number)), error, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, preexec_fn=listen, timeout=120, **pipes)


def expect_interrupted(done):
    assert done.returncode == 130 and "Traceback" not in done.stdout and "error" not in done.stdout, done.stdout
    assert done.stdout.count("interrupted") >= 1, done.stdout
    assert all(read_record(path)["status"] == "interrupted" for path in Path(".").rglob("record.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_anything_is_there(number):
    done = start("moeexp.cli", *RUN, number=number)
    assert (done.returncode, done.stdout) == (130, "interrupted\n")
    assert not list(Path(".").iterdir()), "nothing had begun"


@pytest.mark.slow
@pytest.mark.parametrize("module", [*EARLY[1:], *LATE])
def test_in_the_middle_of_any_import(module):
    expect_interrupted(start(module, *RUN))


@pytest.mark.parametrize("error", ["raised", pytest.param("swallowed", marks=pytest.mark.slow)])
def test_an_import_that_makes_something_else_of_it(error):
    """As numpy's did, of whose extension it was a RecursionError."""
    done = start("numpy", *RUN, error=error)
    expect_interrupted(done)
    (path,) = Path(".").rglob("record.json")
    assert read_record(path)["environment"] is None, "it did not go on"


@pytest.mark.slow
@pytest.mark.parametrize("error", ["", "raised", "swallowed"])
@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_a_sweep_that_is_about_to_begin(module, error):
    """The parent looks for GPUs, for which it imports torch."""
    expect_interrupted(start(module, "-m", *RUN, "seed=0,1", error=error))
    assert not list(Path(".").rglob("record.json"))


def broken_triton(tmp_path):
    (tmp_path / "broken" / "triton").mkdir(parents=True)
    (tmp_path / "broken" / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), os.environ["PYTHONPATH"]])}


def test_a_triton_that_cannot_be_imported_is_one_line(tmp_path):
    """It runs on no path that goes round it, on a CPU either; tests/gpu/test_gpu_faults.py asks a GPU's run."""
    command = [sys.executable, "-m", "moeexp", *RUN, "hydra.run.dir=run"]
    done = subprocess.run(command, env=broken_triton(tmp_path), capture_output=True, text=True, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 1 and line.startswith("error: ImportError: libtriton.so: undefined symbol"), done.stderr
    record = json.loads(Path("run/record.json").read_text())
    assert record["status"] == "failed" and record["decode_tok_s"] is None and "weights" not in record["phases_s"]
