"""Earlier runs: found, reused, repeated, kept apart."""

import os
from pathlib import Path

import pytest

from moeexp.config.compose import compose
from moeexp.record import record
from moeexp.record.head import HEAD, head
from moeexp.record.record import Record, plain, read_record
from moeexp.sweep.history import Folder, History, link, read_whole, runs_again


def run(folder: Path, *, config_hash="c", fingerprint="f", status="ok", started="2026-01-01T00:00:00+00:00", id=None):
    folder.mkdir(parents=True, exist_ok=True)
    result = Record(folder / "record.json", id=id or folder.name, config=plain(compose(["model=nano"])), command=["python"])
    result.set(config_hash=config_hash, code_fingerprint=fingerprint, started=started, check={"passed": True})
    if status == "running":
        result.write()
    else:
        result.finish(status)
    return result.path


def test_head_reads_the_first_lines_alone(tmp_path):
    path = run(tmp_path / "a", status="failed")
    whole = read_record(path)
    assert head(path) == {key: whole[key] for key in HEAD}
    assert head(run(tmp_path / "b", status="running"))["finished"] is None
    path.write_text(path.read_text()[:1024])
    assert head(path)["status"] == "failed"
    for text in ("", "{}", path.read_text().replace(record.SCHEMA, "other/1")):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not begin as a record"):
            head(path)
    with pytest.raises(FileNotFoundError):
        head(tmp_path / "nowhere" / "record.json")


def test_a_result_counts_before_a_later_failure(tmp_path):
    run(tmp_path / "a" / "0", status="ok", id="old")
    run(tmp_path / "a" / "1", status="failed", id="new", started="2026-01-02T00:00:00+00:00")
    run(tmp_path / "a" / "2", fingerprint="g", id="other-code", started="2026-01-03T00:00:00+00:00")
    history = History([tmp_path, tmp_path / "a", tmp_path / "missing"])
    assert len(history.runs) == 3
    assert history.latest("c", "f").id == "old" and history.latest("c", "g").id == "other-code"
    assert history.latest("d", "f") is None
    run(tmp_path / "b", config_hash="d", status="timeout")
    assert History([tmp_path]).latest("d", "f").status == "timeout"


@pytest.mark.parametrize(
    "status, expected",
    [
        (None, {"failed": True, "all": True, "none": True}),
        ("ok", {"failed": False, "all": True, "none": False}),
        ("incorrect", {"failed": False, "all": True, "none": False}),
        *((s, {"failed": True, "all": True, "none": False}) for s in ("failed", "timeout", "interrupted", "running")),
    ],
)
def test_what_runs_again(tmp_path, status, expected):
    if status is not None:
        run(tmp_path / "a", status=status)
    earlier = History([tmp_path]).latest("c", "f")
    assert {rerun: runs_again(earlier, rerun) for rerun in expected} == expected


def test_time_is_estimated_from_the_same_config_first(tmp_path):
    history = History([tmp_path])
    assert history.seconds("c") == (None, "no earlier run")
    for number, (config_hash, seconds) in enumerate((("c", 10), ("c", 20), ("c", 60), ("d", 500))):
        path = run(tmp_path / str(number), config_hash=config_hash, fingerprint="old code")
        text = path.read_text().replace(read_record(path)["finished"], f"2026-01-01T00:0{seconds // 60}:{seconds % 60:02}+00:00")
        path.write_text(text)
    history = History([tmp_path])
    assert history.seconds("c") == (20, "same config")
    assert history.seconds("new") == (40, "all runs")


def test_a_folder_belongs_to_one_run(tmp_path):
    first = Folder(tmp_path, "0", suffix="ab", config_hash="c")
    second = Folder(tmp_path, "0", suffix="cd", config_hash="c")
    assert (first.path.name, second.path.name) == ("0", "0-cd")
    with pytest.raises(RuntimeError, match="in use"):
        Folder(tmp_path, "0", suffix="cd", config_hash="c")
    first.release()
    assert Folder(tmp_path, "0", suffix="ef", config_hash="c").path.name == "0"


def test_a_repetition_keeps_the_record_that_it_replaces(tmp_path):
    run(tmp_path / "0", status="failed", id="old.0")
    folder = Folder(tmp_path, "0", suffix="ab", config_hash="c")
    assert folder.path.name == "0" and (folder.path / "record.old.0.json").is_file()
    assert not (folder.path / "record.json").exists()
    run(tmp_path / "1", config_hash="other")
    assert Folder(tmp_path, "1", suffix="ab", config_hash="c").path.name == "1-ab", "another config's stays"
    run(tmp_path / "2", config_hash=None, status="unsupported", id="old.2")
    assert Folder(tmp_path, "2", suffix="ab", config_hash=None).path.name == "2", "refused again"


def test_a_reused_run_is_linked_and_read_once(tmp_path):
    path = run(tmp_path / "old" / "0")
    made = link(path, tmp_path / "new", "3", suffix="ab")
    assert made == tmp_path / "new" / "3" / "record.json" and made.is_symlink() and not os.readlink(made).startswith("/")
    assert read_record(made)["id"] == "0"
    assert link(path, tmp_path / "new", "3", suffix="ab") == made
    assert link(path, tmp_path / "old", "7", suffix="ab") == path, "it lies in the sweep's own folder"
    assert len(read_whole([path, made], print)) == 1
    taken = run(tmp_path / "new" / "4")
    assert link(path, tmp_path / "new", "4", suffix="ab").parent.name == "4-ab" and not taken.is_symlink()
    assert [found.path for found in History([tmp_path]).runs if found.id == "0"] == [path.resolve()]
    path.unlink()
    assert [found.id for found in History([tmp_path]).runs] == ["4"], "a link to what has been removed"
