"""Locks that end with their process, wherever one is taken."""

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from moeexp import probes
from moeexp.record.locks import lock, try_lock
from moeexp.stack.digests import Digests
from moeexp.sweep.history import Folder

HOLD = "import sys, time; from pathlib import Path; from moeexp.record.locks import try_lock\n"
HOLD += "held = try_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_killed_process_holds_none(tmp_path, holder):
    path = tmp_path / "lock"
    assert try_lock(path) is None
    holder.send_signal(signal.SIGKILL)
    with lock(path).acquire(timeout=10):
        assert try_lock(path) is None
    assert (found := try_lock(path)) is not None
    found.release()


def test_a_process_that_one_has_started_does_not_hold_it_on(tmp_path):
    held = try_lock(tmp_path / "lock")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        held.release()
        assert try_lock(tmp_path / "lock") is not None
    finally:
        child.communicate(b"\n")


def test_one_without_a_name_is_none(tmp_path):
    """Whoever clears a folder removes the file while holding it: who waited for it locks the next."""
    held = try_lock(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    assert (other := try_lock(tmp_path / "lock")) is not None
    held.release()
    assert (tmp_path / "lock").exists() and try_lock(tmp_path / "lock") is None
    other.release()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, error):
    """And no file is written that would stand for one, and stay."""

    def refuses(*_):
        raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(OSError, match="no locks here"), lock(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="no locks here"):
        Folder(tmp_path / "sweep", "0", suffix="ab", config_hash="c")
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    finding = probes.run("cache folder")
    assert finding.verdict == "broken" and "no locks here" in finding.detail and "MOEEXP_CACHE_DIR" in finding.remedy
    (tmp_path / "weights").write_text("w")
    Digests().of([tmp_path / "weights"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: digests of weights are not kept") and len(line) <= 400
