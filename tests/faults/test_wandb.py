"""W&B that refuses, hangs or answers nonsense: bounded time, one warning, the record whole, an offline run for `sync`. And what
W&B is told of a run that failed."""

import contextlib
import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sabotage import experiment
from test_sync import WANDB, offline_run
from test_tracker import make, track
from wandb.proto import wandb_internal_pb2

from moeexp import sync
from moeexp.cli import main
from moeexp.record import tracker
from moeexp.record.record import read_record

ONLINE_S = 8.0


class Answer(http.server.BaseHTTPRequestHandler):
    """To every request of a kind the same."""

    def do_GET(self):
        self.server.asked += 1
        if self.server.kind == "hangs":
            self.server.over.wait(300)
            return
        status, body = {
            "401": (401, b'{"errors": [{"message": "user is not logged in"}]}'),
            "500": (500, b"internal error"),
            "rubbish": (200, b"<html>\xff\x00 a captive portal</html>"),
            "empty": (200, b"{}"),
        }[self.server.kind]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_GET

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def listener(kind):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.kind, server.asked, server.over = kind, 0, threading.Event()
    if kind == "refuses":
        server.server_close()  # nobody listens at that port any more
        yield server
        return
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def online(monkeypatch):
    @contextlib.contextmanager
    def of(kind):
        with listener(kind) as server:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
            monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
            monkeypatch.delenv("WANDB_MODE", raising=False)
            yield server

    return of


def logged(folder):
    """What W&B's own log of a run holds, in the order in which it was written. It is LevelDB's: parts of records, each after
    seven bytes (checksum, length, which part it is), in blocks of 32 KiB, of which the first begins with seven of W&B's."""
    (path,) = folder.glob("*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        size, part = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


BLOCK, FULL, LAST = 1 << 15, 1, 4


def exit_code_of(folder):
    (code,) = [record.exit.exit_code for record in logged(folder) if record.WhichOneof("record_type") == "exit"]
    return code


KINDS = [
    pytest.param(kind, marks=[] if kind == "401" else pytest.mark.slow)
    for kind in ("refuses", "hangs", "401", "500", "rubbish", "empty")
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_does_not_take_it(kind, tmp_path, online, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "outputs" / "run", "tracker.mode=online", f"tracker.timeout_s={ONLINE_S:g}")
    before = run.path.read_bytes()
    with online(kind) as server:
        start = time.monotonic()
        found = track(run)
        assert time.monotonic() - start < ONLINE_S + tracker.OFFLINE_S
        assert server.asked or kind == "refuses"
    assert found["mode"] == "offline" and found["url"] is None
    assert found["warning"].startswith("W&B ") and "\n" not in found["warning"]
    assert found["warning"].endswith(f"logged offline, upload it with: python -m moeexp.sync {found['path']}")
    assert run.path.read_bytes() == before and read_record(run.path)["status"] == "ok"
    assert not "".join(capfd.readouterr())
    (kept,) = sync.find([tmp_path / "outputs"])
    assert kept.folder == tmp_path / found["path"] and not kept.synced and "ab12 ok" in kept.what
    assert exit_code_of(kept.folder) == 0


def fails(cfg, *, run_dir, record, phases):
    with phases("benchmark"):
        raise {1: RuntimeError("boom"), 2: KeyboardInterrupt()}[cfg.seed]


@pytest.mark.parametrize("seed, code, status", [(1, 1, "failed"), pytest.param(2, 130, "interrupted", marks=pytest.mark.slow)])
def test_a_run_that_does_not_end_well_is_marked_failed_in_wandb(seed, code, status, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["model=nano", "tracker=wandb", "tracker.mode=offline", "tracker.timeout_s=120", "export=eager", f"seed={seed}"]
    assert main(overrides, experiment=fails) == code
    (folder,) = tmp_path.rglob("offline-run-*")
    assert exit_code_of(folder) == code, "W&B shows a run with another code than 0 as failed"
    (run,) = [record.run for record in logged(folder) if record.WhichOneof("record_type") == "run"]
    assert status in run.tags


def test_a_whole_run_that_cannot_be_tracked_online_is_ok(tmp_path, online, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with online("401"):
        assert (
            main(["model=nano", "tracker=wandb", "export=eager", "tracker.timeout_s=30", "seed=10"], experiment=experiment) == 0
        )
    (path,) = tmp_path.glob("outputs/*/*/record.json")
    record = read_record(path)
    assert record["status"] == "ok" and record["decode_tok_s"] == 10.0 and record["tracker"]["mode"] == "offline"
    assert capfd.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize("broken", ["Popen", "TemporaryFile"])
def test_a_machine_that_gives_no_process_or_no_file_costs_no_run(broken, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    run = make(tmp_path / "run", "tracker.mode=offline")
    monkeypatch.setattr(tracker.subprocess if broken == "Popen" else tracker.tempfile, broken, full)
    assert "No space left on device" in track(run)["warning"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "hangs", "401", "500", "rubbish", "empty"])
def test_sync_to_a_server_that_does_not_take_it_keeps_the_run(kind, tmp_path, online, monkeypatch, capfd):
    """With W&B's own command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert track(make(tmp_path / "outputs" / "run", "tracker.timeout_s=120"))["warning"] is None
    with online(kind):
        start = time.monotonic()
        assert sync.main(["--timeout", "10"]) == 1
        assert time.monotonic() - start < 30
    (run,) = sync.find([tmp_path / "outputs"])
    assert not run.synced and "was not uploaded; its record is whole, try again" in capfd.readouterr().err


# As the tests' fake of `wandb sync`, which stops in the middle of a batch until it is told to go on.
PATIENT = WANDB.replace('if "hanging" in', 'if not pathlib.Path("go").exists() and "3" in')


def test_sync_of_many_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").touch()
    (tmp_path / "fake" / "wandb" / "__main__.py").write_text(PATIENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    runs = [offline_run(f"outputs/{number}", str(number)) for number in range(6)]

    def interrupt():
        while not (runs[2] / "run-2.wandb.synced").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert sync.main([]) == 130
    assert [sync.OfflineRun(run).synced for run in runs] == [True] * 3 + [False] * 3
    assert not still_running(tmp_path), "what it had started is gone"
    Path("go").touch()
    capfd.readouterr()
    assert sync.main([]) == 0
    uploaded = [line for line in capfd.readouterr().out.splitlines() if line.startswith("uploading")]
    assert uploaded == [f"uploading offline-run-{number}" for number in (3, 4, 5)], "and nothing twice"


def still_running(folder):
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if f"{folder}/" in line and "ps -eo" not in line]


def test_a_line_that_the_disk_has_no_room_for_leaves_no_part(tmp_path, monkeypatch):
    """A short write is no exception."""
    path = tmp_path / "runs.jsonl"
    run = make(tmp_path / "a", "tracker=jsonl", f"tracker.path={path}")
    assert track(run)["warning"] is None
    before = path.read_bytes()
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from moeexp.record import tracker\n"
        "from moeexp.record.record import read_record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, {len(before) + 100}))\n"
        f"record = read_record(Path({str(run.path)!r}))\n"
        f"print(tracker.track(record, run_dir=Path({str(tmp_path)!r}), exit_code=0, group=None)['warning'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not write" in done.stdout, done.stderr
    assert path.read_bytes() == before and json.loads(before)
