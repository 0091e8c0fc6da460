"""Digests of files: right after any change that the file system can tell, and no contents read where there was none."""

import hashlib
import json
import multiprocessing
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeexp.stack import digests
from moeexp.stack.digests import Digests

OPENED: list[str] | None = None


def _hook(event, arguments):
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.path.realpath(arguments[0]))


sys.addaudithook(_hook)  # of every test after this one too, where it does nothing


@contextmanager
def opened(folder):
    """The files under `folder` that this process opens."""
    global OPENED
    found = []
    OPENED = []
    try:
        yield found
    finally:
        found += [path for path in OPENED if Path(path).is_relative_to(os.path.realpath(folder))]
        OPENED = None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def restore_mtime(path, before):
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def test_a_second_look_reads_nothing(folder):
    paths = [folder / name for name in "abc"]
    for path in paths:
        path.write_bytes(os.urandom(1000))
    (folder / "empty").touch()
    with opened(folder) as first:
        found = Digests().of([*paths, folder / "empty"])
    assert found == [*map(sha, paths), hashlib.sha256(b"").hexdigest()] and len(first) == 4
    with opened(folder) as second:
        assert Digests().of([*paths, folder / "empty"]) == found
    assert second == []


def test_a_link_is_the_file_that_it_leads_to(folder):
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")
    (folder / "link").symlink_to("a")
    a, b = Digests().of([folder / "a", folder / "b"])
    with opened(folder) as read:
        assert Digests().of([folder / "link", folder / ".." / "files" / "a"]) == [a, a]
        (folder / "link").unlink()
        (folder / "link").symlink_to("b")
        assert Digests().of([folder / "link"]) == [b]
    assert read == []


@pytest.mark.parametrize("how", ["rewritten", "replaced", "one byte", "appended"])
def test_any_change_is_found(folder, how):
    """Also one of equal size with the old mtime, at once after a look."""
    path = folder / "a"
    path.write_bytes(b"0" * 5000)
    before = path.stat()
    first = Digests().of([path])
    if how == "replaced":
        (folder / "new").write_bytes(b"1" * 5000)
        os.replace(folder / "new", path)
    elif how == "one byte":
        with open(path, "r+b") as file:
            file.seek(4999)
            file.write(b"1")
    else:
        path.write_bytes(b"1" * (5001 if how == "appended" else 5000))
    if how != "appended":
        restore_mtime(path, before)
    assert Digests().of([path]) == [sha(path)] != first


def test_a_change_while_it_is_read_is_not_kept(folder, monkeypatch):
    """Read, half of it old and half new: right for neither."""
    path = folder / "a"
    path.write_bytes(b"0" * 100)
    before, digest = path.stat(), digests._digest

    def changed_behind(stamp, path, advance):
        found = digest(stamp, path, lambda steps: (path.write_bytes(b"1" * 100), restore_mtime(path, before)))
        assert not found[1]
        return found

    monkeypatch.setattr(digests, "_digest", changed_behind)
    Digests().of([path])
    monkeypatch.setattr(digests, "_digest", digest)
    assert Digests().of([path]) == [sha(path)]


def test_what_is_written_within_one_tick_of_the_clock_is_found(folder, monkeypatch):
    """As far as the file system's clock goes, both versions are of one instant: the later one is read, or not kept."""
    path, sleep = folder / "a", digests.time.sleep
    path.write_bytes(b"0")
    instant = path.stat()

    def meanwhile(seconds):
        path.write_bytes(b"1")  # its stamp, so it is as if in the same tick
        sleep(seconds)

    monkeypatch.setattr(digests.time, "sleep", meanwhile)
    monkeypatch.setattr(digests, "_stamp_of", lambda found: (found.st_dev, found.st_ino, 1, 0, instant.st_ctime_ns))
    monkeypatch.setattr(digests.time, "time", lambda: instant.st_ctime_ns / 1e9)
    assert Digests().of([path]) == [hashlib.sha256(b"1").hexdigest()]


DAMAGE = {
    "empty": "",
    "cut": '{"version": 1, "files": {"1 2',
    "a list": "[]",
    "no files": '{"version": 1}',
    "garbled key": '{"version": 1, "files": {"1 2": "%s"}}' % ("0" * 64),
    "garbled digest": '{"version": 1, "files": {"1 2 3 4 5": 7}}',
    "short digest": '{"version": 1, "files": {"1 2 3 4 5": "00"}}',
    "other version": '{"version": 0, "files": {}}',
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(folder, damage):
    path = folder / "a"
    path.write_bytes(b"0")
    found, cache = Digests().of([path]), Digests().path
    cache.write_bytes(DAMAGE[damage] if isinstance(DAMAGE[damage], bytes) else DAMAGE[damage].encode())
    for reads in (1, 0):
        with opened(folder) as read:
            assert Digests().of([path]) == found
        assert len(read) == reads


def test_it_stays_small_and_keeps_the_latest(folder, monkeypatch):
    monkeypatch.setattr(digests, "MOST", 3)
    paths = [folder / f"{i}" for i in range(5)]
    for path in paths:
        path.write_text(path.name)
        Digests().of([path])
    paths[2].write_text("again, and so the latest")
    Digests().of([paths[2]])
    (folder / "more").write_text("more")
    Digests().of([folder / "more"])
    assert len(json.loads(Digests().path.read_text())["files"]) == 3
    with opened(folder) as read:
        Digests().of([paths[4], paths[2], folder / "more"])
    assert read == []


def test_an_older_state_of_a_file_is_dropped(folder):
    for text in "abc":
        (folder / "a").write_text(text)
        Digests().of([folder / "a"])
    assert len(json.loads(Digests().path.read_text())["files"]) == 1


def test_processes_do_not_lose_each_others_digests(folder):
    paths = [folder / f"{i}" for i in range(40)]
    for path in paths:
        path.write_text(path.name)

    def look(mine):
        for path in mine:
            Digests().of([path])

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=look, args=(paths[i::4],)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = list(map(sha, paths))
    with opened(folder) as read:
        assert Digests().of(paths) == expected
    assert read == []
    assert len(json.loads(Digests().path.read_text())["files"]) == 40


def test_without_a_place_to_keep_them_they_are_right_and_it_is_said(folder, monkeypatch, capsys):
    (folder / "a").write_text("a")
    (folder / "file").touch()
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(folder / "file" / "below"))
    for _ in range(2):
        assert Digests().of([folder / "a"]) == [sha(folder / "a")]
        assert capsys.readouterr().err.startswith("warning: digests of weights are not kept")


def test_what_cannot_be_read_is_named(folder):
    (folder / "link").symlink_to("nowhere")
    (folder / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            Digests().of([folder / name])


def test_only_what_takes_long_is_shown(folder, monkeypatch):
    shown = []

    @contextmanager
    def progress(what, *, total):
        shown.append((what, total))
        yield shown.append

    (folder / "a").write_bytes(b"0" * (3 << 20))
    Digests().of([folder / "a"], progress)
    assert shown == []
    os.utime(folder / "a")
    monkeypatch.setattr(digests, "WORTH_SHOWING", 1 << 20)
    Digests().of([folder / "a"], progress)
    assert shown[0] == ("reading weights, MiB", 3) and sum(shown[1:]) == 3
