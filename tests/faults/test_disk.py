"""A disk that is full, or may only be read: one line, a status that says so, nothing partial, nothing that ends the process.

A file system of a few hundred KiB needs a namespace of mounts of one's own; root writes past permissions, so that what may
only be read is a mount, too."""

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import filling
import pytest

from moeexp.cli import main
from moeexp.record import disk
from moeexp.record.record import read_record
from moeexp.run import job
from moeexp.stack import caches

NANO = ["model=nano", "tracker=jsonl", "export=eager"]
REAL = ["model=nano", "tracker=jsonl", "repeats=1", "min_samples=1", "min_time_s=0", "new_tokens=4", "eval_bytes=0"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))


@functools.cache
def may_mount():
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif("not may_mount()", reason="no mounts of one's own here")


def mounted(script, *, size="20k", seconds=300):
    """Runs a shell's script in which `full` is a file system of that size, `moeexp` the command with experiments of filling.py,
    and `run` one of its own. Returns what they said, each line checked."""
    code = f"""
moeexp() {{ '{sys.executable}' -c 'import sys, filling; from moeexp.cli import main
sys.exit(main(sys.argv[2:], experiment=getattr(filling, sys.argv[1])))' "$@"; }}
run() {{ '{sys.executable}' -m moeexp "$@"; }}
mount -t tmpfs -o size={size} tmpfs full
{script}
"""
    paths = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = ["unshare", "-rm", "bash", "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = subprocess.run(command, env=environment, timeout=seconds, **pipes).stdout
    assert "Traceback" not in said and "terminate called" not in said and "frame #" not in said, said
    return said


FOLDERS = "find full -type f | grep -v -e hydra -e filling -e lock -e job.json -e output.txt -e yaml"


@needs_mount
def test_a_run_that_has_no_room_for_its_record_does_not_begin():
    said = mounted(f"moeexp experiment {' '.join(NANO)} hydra.run.dir=full/run; echo code $?; {FOLDERS}")
    (error, code) = said.splitlines()
    assert error.startswith("error: the run cannot begin: no space left on ") and error.endswith("elsewhere with hydra.run.dir")
    assert code == "code 1" and not Path("ran").exists()


@needs_mount
@pytest.mark.slow
def test_a_run_that_fills_the_disk_says_so_in_its_record():
    Path("fill").touch()
    said = mounted(
        f"moeexp experiment {' '.join(NANO)} hydra.run.dir=full/run seed=1; echo code $?; {FOLDERS}; cp full/run/record.json .",
        size="1m",
    )
    assert "code 1" in said and said.count("error: no space left on ") == 1
    assert said.splitlines()[-1] == "full/run/record.json", said
    record = read_record(Path("record.json"))
    assert record["status"] == "failed" and record["error"]["message"].startswith("no space left on ")
    assert record["error"]["phase"] == "benchmark" and record["token_latencies_ms"]["samples"] == [1.0, 2.0]


@needs_mount
@pytest.mark.slow
def test_a_sweep_stops_with_one_line_and_goes_on_when_there_is_room():
    Path("fill").touch()
    sweep = f"moeexp experiment -m {' '.join(NANO)} hydra.sweep.dir=full/sweep seed=0,1,2"
    said = mounted(f"{sweep}; echo code $?; rm full/sweep/filling fill ran; echo again; {sweep}; echo code $?", size="1m")
    first, second = said.split("again\n")
    assert "[0] ok" in first and "[1] failed: no space left on " in first and first.count("error: ") == 2 and "code 1" in first
    assert "error: the sweep starts no further run: no space left on " in first and "error: the table is not written" in first
    assert "1 of 3 cells did not run (2)" in first
    assert "code 0" in second and "1 of 3 cells had run before" in second and "[1] ok" in second and "[2] ok" in second


@needs_mount
@pytest.mark.slow
def test_wandb_s_folder_is_full():
    arguments = "model=nano export=eager tracker=wandb tracker.mode=offline hydra.run.dir=full/run"
    said = mounted(f"moeexp filled_for_tracking {arguments}; echo code $?; cp full/run/record.json .", size="1m")
    assert said.count("warning: ") == 1 and "W&B" in said and "code 0" in said, said
    assert read_record(Path("record.json"))["status"] == "ok"


@needs_mount
@pytest.mark.slow
def test_the_folder_of_compiled_code_is_full():
    """torch's own writer of packages ends the process."""
    run = f"MOEEXP_CACHE_DIR=$PWD/full/cache run {' '.join(REAL)}"
    said = mounted(
        f"{run}; echo code $?; find full -type f; echo again; mount -o remount,size=64m full; {run}; echo code $?", size="200k"
    )
    first, second = said.split("again\n")
    assert first.count("error: no space left on ") == 1 and "elsewhere with MOEEXP_CACHE_DIR" in first and "code 1" in first
    assert ".pt2" not in first and "partial" not in first, "nothing partial is left"
    assert "status          ok" in second and "code 0" in second


@needs_mount
@pytest.mark.slow
def test_the_folder_of_temporary_files_is_full():
    """In which a compiler also writes its answer where a system has no files in memory."""
    said = mounted(f"TMPDIR=$PWD/full run {' '.join(REAL)}; echo code $?", size="400k")
    assert said.count("error: ") == 1 and "error: no space left on " in said and "elsewhere with TMPDIR" in said, said
    assert "code 1" in said


@needs_mount
@pytest.mark.slow
def test_a_trace_that_has_no_room_leaves_no_part():
    said = mounted(
        f"run {' '.join(REAL)} export=eager profile=trace hydra.run.dir=full/run; echo code $?; {FOLDERS}", size="600k"
    )
    assert "error: no space left on " in said and "code 1" in said and said.splitlines()[-1] == "full/run/record.json", said


READ_ONLY = """
import os, sys
import filling
from moeexp.cli import main
for name, value, *arguments in eval(sys.argv[1]):
    os.environ |= {"MOEEXP_CACHE_DIR": os.environ["FINE"]} | ({name: value} if name else {})
    print(name or arguments[-1], main(arguments, experiment=filling.experiment), flush=True)
    os.environ.pop(name, None)
"""


@needs_mount
def test_folders_that_may_only_be_read_are_found_before_any_work(tmp_path):
    """In one process, as importing takes longest."""
    full = str(tmp_path / "full")
    cases = [
        ("MOEEXP_CACHE_DIR", full, "model=nano", "tracker=jsonl"),
        ("TORCHINDUCTOR_CACHE_DIR", f"{full}/inner", "model=nano", "tracker=jsonl"),
        ("TRITON_CACHE_DIR", full, "model=nano", "tracker=jsonl"),
        ("", "", "model=nano", "tracker=jsonl", f"tracker.path={full}/inner/runs.jsonl"),
        ("", "", "model=nano", "tracker=jsonl", f"hydra.run.dir={full}/run"),
        ("", "", "-m", "model=nano", "tracker=jsonl", f"hydra.sweep.dir={full}/sweep"),
        ("", "", "-m", "model=nano", "tracker=jsonl", "seed=0", f"tracker.path={full}/runs.jsonl"),
    ]
    Path("cases.py").write_text(READ_ONLY)
    said = mounted(f"mount -o remount,ro full; FINE=$PWD/fine '{sys.executable}' cases.py {json.dumps(repr(cases))}")
    lines = [line for line in said.splitlines() if line.startswith("error")]
    answers = [line for line in said.splitlines() if not line.startswith("error")]
    assert len(lines) == len(cases) == len(answers), said
    assert [answer[-1] for answer in answers] == ["2", "2", "2", "2", "1", "1", "2"]
    assert all("ead-only" in line or "cannot be written" in line for line in lines) and not Path("ran").exists()
    for (name, *_), line in zip(cases, lines, strict=True):
        assert name in line


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        chained(RuntimeError("a package cannot be made"), chained(OSError("x"), FULL)),
        RuntimeError("C++ compile error\n/usr/bin/ld: final link failed: No space left on device"),
        RuntimeError("Failed to extract zip file a to destination file b, mz_zip error string: write callback failed"),
    ],
)
def test_a_full_disk_is_known_by_whatever_became_of_it(error, tmp_path):
    found = disk.explained(error, {"TMPDIR": tmp_path})
    assert str(found) == f"no space left on {tmp_path}: free some, or write elsewhere with TMPDIR" and found.__cause__ is error


@pytest.mark.parametrize(
    "error", [ValueError("x"), chained(ValueError("set MOEEXP_CACHE_DIR"), FULL), KeyboardInterrupt(), OSError(5, "io")]
)
def test_any_other_error_is_what_it_was(error, tmp_path):
    assert disk.explained(error, {"TMPDIR": tmp_path}) is error


def test_the_disk_of_the_file_is_named_else_the_fullest(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(disk, "_device", lambda path: 1 if path.is_relative_to(a) else 2)
    monkeypatch.setattr(disk, "_left", lambda path: 100 if path == a else 5)
    folders = {"A": a, "B": b}
    assert "write elsewhere with B" in str(disk.explained(FULL, folders))
    assert "write elsewhere with A" in str(disk.explained(OSError(errno.ENOSPC, "x", str(a / "file")), folders))


def test_a_record_that_cannot_be_finished_is_one_line(monkeypatch, capsys):
    """The room that was kept is taken by somebody else."""
    finish = job.Record.finish

    def full(self, status, *, error=None):
        monkeypatch.setattr("moeexp.record.record.os.fsync", lambda descriptor: (_ for _ in ()).throw(FULL))
        finish(self, status, error=error)

    monkeypatch.setattr(job.Record, "finish", full)
    assert main([*NANO, "hydra.run.dir=run"], experiment=filling.experiment) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("benchmark")]
    assert (
        len(lines) == 1 and lines[0].startswith("error: no space left on ") and "run/record.json stays as it was (ok)" in lines[0]
    )
    assert [path.name for path in Path("run").glob("*")] == [".hydra", "record.json"] or not list(Path("run").glob(".record*"))


def test_no_folder_for_temporary_files_is_one_line(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]")

    monkeypatch.setattr(caches.tempfile, "gettempdir", none)
    with pytest.raises(ValueError, match="set TMPDIR to one that can"):
        caches.prepare()


def test_the_room_that_a_run_keeps_is_given_back(monkeypatch):
    assert main([*NANO, "hydra.run.dir=run"], experiment=filling.experiment) == 0
    assert sorted(path.name for path in Path("run").iterdir()) == [".hydra", "record.json"]
