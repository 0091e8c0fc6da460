"""Processes that compile what the cache lacks: quick ones are played by a script, real ones are slow."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moeexp import cli
from moeexp.config import threads
from moeexp.config.compose import compose
from moeexp.config.memory_need import need_of
from moeexp.config.resolve import resolve
from moeexp.record import free_memory
from moeexp.stack import compile_cache, compilers
from moeexp.stack.compile_cache import key_of
from moeexp.stack.packages import package_specs

NANO = ["model=nano", "quant=int4", "max_seq_len=64", "new_tokens=4", "eval_bytes=0", "export=aoti"]
CFG = resolve(compose(NANO), cuda_available=False)
SCRIPT = """#!{python} -S
import os, pickle, signal, subprocess, sys, time
def log(*words):
    with open({log!r}, "a") as file:
        print(*words, file=file, flush=True)
{body}
"""
MADE = "log('made'); pickle.dump(True, sys.stdout.buffer)"


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Has a script play the child; returns a function for the lines that it has logged."""
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(threads, "granted", lambda: SimpleNamespace(cores=2))
    monkeypatch.setattr(compilers, "room", lambda configs: 2)
    log = tmp_path / "log"

    def play(body):
        path = tmp_path / "child"
        path.write_text(SCRIPT.format(python=sys.executable, log=str(log), body=body))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return lambda: log.read_text().splitlines() if log.exists() else []

    return play


def keys(cfg=CFG):
    return {spec.method: key_of(spec) for spec in package_specs(cfg)}


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("there", [[], ["prefill"], ["prefill", "decode"]])
def test_one_process_for_each_method_that_the_cache_lacks(play, monkeypatch, there):
    logged = play(MADE)
    monkeypatch.setattr(compile_cache, "find", lambda key, spec: spec if spec.method in there else None)
    with compilers.Compilers([CFG]) as running:
        made = {method: running.join(key) for method, key in keys().items()}
    assert made == {method: method not in there for method in ("prefill", "decode")}
    assert logged() == ["made"] * (2 - len(there))


@pytest.mark.parametrize("other", [{"export": "eager"}, {"export": "compile"}, {"artifact": "somewhere"}])
def test_what_is_no_package_to_be_made_starts_none(play, other):
    logged = play(MADE)
    with compilers.Compilers([replace(CFG, **other)]) as running:
        assert not any(map(running.join, keys().values()))
    assert logged() == []


def test_what_several_runs_share_is_compiled_once(play):
    logged = play(MADE)
    explicit = replace(CFG, state="explicit")
    with compilers.Compilers([CFG, replace(CFG, seed=1), explicit]) as running:
        assert all(map(running.join, [*keys().values(), *keys(explicit).values()]))
    assert len(logged()) == 4


AHEAD = """
log('begun', *sys.argv[4:])
told = sys.stdin.buffer.read()
log('told', bool(told))
if told:
    pickle.dump(True, sys.stdout.buffer)
"""


@pytest.fixture
def ahead(play, monkeypatch):
    """As `play` with a child that waits for its job."""
    monkeypatch.setattr(free_memory, "of_device", lambda device: None)
    monkeypatch.setattr("moeexp.record.gpus.visible_gpus", lambda: [])
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    yield play(AHEAD)
    compilers.end_ahead()


def test_where_the_cache_is_empty_they_are_started_ahead_and_told_later(ahead):
    compilers.start_ahead(CFG)
    compilers.start_ahead(CFG)  # of a second run in the process
    until(lambda: ahead() == [f"begun {os.getpid()}"] * 2)
    with compilers.Compilers([CFG]) as running:
        assert all(map(running.join, keys().values()))
    assert ahead()[2:] == ["told True"] * 2, "and no others"


@pytest.mark.parametrize(
    "other", [{"export": "eager"}, {"export": "compile"}, {"artifact": "somewhere"}, {"engine": "transformers"}]
)
def test_none_is_started_ahead_where_nothing_may_have_to_be_compiled(ahead, tmp_path, other):
    compilers.start_ahead(replace(CFG, **other))
    (tmp_path / "cache" / "compiled" / "something").mkdir(parents=True)
    compilers.start_ahead(CFG)
    assert not compilers._ahead


def test_those_without_a_job_end(ahead, monkeypatch):
    compilers.start_ahead(CFG)
    pids = [process.pid for process, *_ in compilers._ahead]
    monkeypatch.setattr(compile_cache, "find", lambda key, spec: spec if spec.method == "prefill" else None)
    with compilers.Compilers([CFG]) as running:
        assert running.join(keys()["decode"])
    assert len(pids) == 2 and not compilers._ahead
    until(lambda: not any(map(runs, pids)), 5)
    compilers.start_ahead(CFG)
    pids = [process.pid for process, *_ in compilers._ahead]
    with compilers.Compilers([replace(CFG, export="eager")]):
        assert len(pids) == 2 and not any(map(runs, pids))


def test_what_torch_adds_changes_nothing(ahead, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compilers.start_ahead(CFG)
    monkeypatch.setenv("TEARDOWN_CUPTI", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    with compilers.Compilers([CFG]) as running:
        assert all(map(running.join, keys().values()))
    assert ahead().count("told True") == 2 and len(ahead()) == 4, ahead()


@pytest.mark.parametrize("change", ["variable", "path", "dead"])
def test_one_that_would_compile_something_else_is_not_told(ahead, monkeypatch, change):
    compilers.start_ahead(CFG)
    first = list(compilers._ahead)
    if change == "variable":
        monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    elif change == "path":
        monkeypatch.setattr(sys, "path", [*sys.path, "/elsewhere"])
    else:
        os.kill(first[0][0].pid, signal.SIGKILL)
        until(lambda: not runs(first[0][0].pid))
    with compilers.Compilers([CFG]) as running:
        assert all(map(running.join, keys().values())), "by others"
    assert not any(runs(process.pid) for process, *_ in first)
    assert ahead().count("told True") == 2


def test_no_more_at_once_than_the_machine_grants(play, monkeypatch):
    logged = play(f"log('begun'); time.sleep(0.2); {MADE}")
    monkeypatch.setattr(threads, "granted", lambda: SimpleNamespace(cores=1))
    with compilers.Compilers([CFG]) as running:
        assert all(map(running.join, keys().values()))
    assert logged() == ["begun", "made"] * 2


def test_no_more_at_once_than_there_is_memory_for(play, monkeypatch):
    logged = play(f"log('begun'); time.sleep(0.2); {MADE}")
    monkeypatch.setattr(compilers, "room", lambda configs: 1)
    with compilers.Compilers([CFG]) as running:
        assert all(map(running.join, keys().values()))
    assert logged() == ["begun", "made"] * 2


def test_where_memory_is_short_the_run_itself_compiles(play, monkeypatch):
    logged = play(MADE)
    monkeypatch.setattr(compilers, "room", lambda configs: 0)
    with compilers.Compilers([CFG]) as running:
        assert not any(map(running.join, keys().values()))
    assert logged() == []


def test_room_is_what_the_runs_leave(monkeypatch):
    free = {"cpu": 9 << 30, "cuda": 9 << 30}
    monkeypatch.setattr(free_memory, "of_device", lambda device: free[device])
    gpu = replace(CFG, device="cuda")
    assert (compilers.room([CFG]), compilers.room([gpu])) == (5, 4)  # of 1.5 and of 2 GiB
    free["cuda"] = (4 << 30) + need_of(gpu).total
    assert compilers.room([gpu]) == 2
    assert compilers.room([gpu, replace(gpu, seed=1)]) == 1, "weights are shared, state is not"
    free["cuda"] -= 4 << 30
    assert compilers.room([gpu]) == 0
    free["cuda"] = None
    assert compilers.room([gpu]) == 6, "unknown; by the host"
    free["cpu"] = 1 << 30
    assert compilers.room([gpu]) == compilers.room([CFG]) == 0


def test_its_job(play, tmp_path, monkeypatch):
    """The parent's import path, and nothing of the working directory before it."""
    logged = play(f"log(*sys.argv[1:], os.environ['PYTHONPATH']); open('job', 'wb').write(sys.stdin.buffer.read()); {MADE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(compile_cache, "find", lambda key, spec: spec if spec.method == "prefill" else None)
    with compilers.Compilers([CFG]) as running:
        running.join(keys()["decode"])
    path = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    assert logged()[0] == f"-P -m moeexp.stack.compilers {path}"
    assert pickle.loads(Path("job").read_bytes()) == (os.getpid(), CFG, "decode", keys()["decode"], torch.get_num_threads(), 1)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("pickle.dump(ValueError('no good'), sys.stdout.buffer)", ValueError, "no good"),
        ("os.kill(os.getpid(), 9)", RuntimeError, "compiled decode was ended by SIGKILL; if nobody killed it, the machine may"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", RuntimeError, f"was ended by signal {signal.SIGRTMIN + 1}$"),
        ("sys.exit(0)", RuntimeError, "compiled decode exited with code 0 without an answer"),  # as a user's op may
        ("sys.exit(3)", RuntimeError, "compiled decode exited with code 3 without an answer"),
    ],
)
def test_what_went_wrong_there_is_raised_here(play, body, kind, message):
    play(body)
    with compilers.Compilers([CFG]) as running:
        for _ in range(2):  # of two runs that share the method
            with pytest.raises(kind, match=message):
                running.join(keys()["decode"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_told_to_end_says_nothing(number):
    command = [sys.executable, "-P", "-m", "moeexp.stack.compilers"]
    own = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    with subprocess.Popen(command, env=env, **own) as process:
        until(lambda: "compilers" in Path(f"/proc/{process.pid}/cmdline").read_text() and waits_for_signals(process.pid))
        process.send_signal(number)
        assert process.wait(20) == 128 + number and process.communicate() == (b"", b"")


def waits_for_signals(pid):
    """Whether all of the three have handlers."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return all(caught >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def test_job_and_answer_need_no_disk(play, monkeypatch, tmp_path):
    """A disk that is full is what an answer may be about."""
    play("pickle.dump(OSError(28, 'No space left on device'), sys.stdout.buffer)")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with compilers.Compilers([CFG]) as running, pytest.raises(OSError, match="No space left"):
        running.join(keys()["decode"])


class Odd(Exception):
    """No pickle knows what to call it with."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no such", "file"), Odd(1, 2), Odd(lambda: 0, 2)])
def test_an_error_keeps_what_it_says_and_where_it_came_from(error):
    try:
        raise error
    except Exception as raised:
        sent = pickle.loads(pickle.dumps(compilers._to_send(raised)))
    assert str(sent) == (str(error) if isinstance(error, OSError) else f"Odd: {error}")
    assert type(sent) is (type(error) if isinstance(error, OSError) else RuntimeError)
    shown = "".join(traceback.format_exception(sent))
    assert "In the process that compiled it" in shown and "raise error" in shown


KILLED = """
import os, signal
from moeexp.stack import compilers
from test_compilers import CFG
running = compilers.Compilers([CFG]).__enter__()
print(*(process.pid for _, process, _ in running._running.values()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_none_outlives_a_parent_that_is_killed_as_it_starts(tmp_path):
    """Before it can ask the system to be told."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MOEEXP_CACHE_DIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", KILLED], env=env, stdout=subprocess.PIPE, text=True).stdout
    numbers = list(map(int, said.split()))
    try:
        until(lambda: numbers and not any(map(runs, numbers)), 20)
    finally:
        for number in filter(runs, numbers):
            os.kill(number, signal.SIGKILL)


STUBBORN = """
told = lambda *_: log('told')
signal.signal(signal.SIGTERM, told)
log('begun', os.getpid(), subprocess.Popen(['sleep', '600']).pid)
while True:
    time.sleep(0.01)
"""


def test_leaving_ends_them_with_what_they_have_started(play, monkeypatch):
    monkeypatch.setattr(compilers, "GRACE_S", 0.3)
    logged = play(STUBBORN)
    begun = lambda: [line.split()[1:] for line in logged() if "begun" in line]  # noqa: E731
    with pytest.raises(KeyboardInterrupt), compilers.Compilers([CFG]):
        until(lambda: len(begun()) == 2)
        raise KeyboardInterrupt
    assert logged().count("told") == 2
    until(lambda: not any(runs(int(number)) for pair in begun() for number in pair), 5)


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes(mark):
    """Those of this machine, but ours, whose environment holds it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = mark.encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if mine and int(folder.name) != os.getpid() and runs(int(folder.name)):
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


OP = """
import torch
from moeexp_kernels.ops.linear import reference_linear

def linear(**arguments):
    {wrong}
    return reference_linear(**arguments)
"""


@pytest.mark.slow
def test_an_ops_error_is_one_line_and_its_traceback_is_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    Path("own_op.py").write_text(OP.format(wrong="if torch.compiler.is_exporting(): raise TypeError('not for export')"))
    try:
        assert cli.main([*NANO, "ops.linear=own_op:linear", "hydra.run.dir=run"]) == 1
    finally:
        sys.modules.pop("own_op", None)
    record = json.loads(Path("run/record.json").read_text())
    assert record["status"] == "failed" and record["error"]["phase"] == "compile prefill"
    assert (record["error"]["type"], "not for export" in record["error"]["message"]) == ("TypeError", True)
    assert "own_op.py" in record["error"]["traceback"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: TypeError during compile prefill: ") and "not for export" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_none_behind(tmp_path, number):
    mark = f"COMPILERS_TEST={tmp_path}"
    env = os.environ | dict([mark.split("=", 1)]) | {"MOEEXP_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "moeexp", *NANO, "hydra.run.dir=run"]
    run = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    scratch = lambda: list((tmp_path / "cache" / "compiled").glob(".*.partial"))  # noqa: E731
    until(lambda: run.poll() is not None or scratch() and any("cc1plus" in line for line in processes(mark)), 120)
    assert any("moeexp.stack.compilers" in line for line in processes(mark))
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    until(lambda: not processes(mark), 20)
    assert scratch() == []
    if number != signal.SIGKILL:
        assert run.returncode == 130 and "Traceback" not in said
        assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "interrupted"
