"""The cache's folder stays within its limit: what is used stays, what is not goes, the least recently used first."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeexp import cache
from moeexp.record.locks import lock, try_lock
from moeexp.stack import cache_entries, caches, compile_cache
from moeexp.stack.cache_entries import entries, lock_of, remove, trim

HOUR, KIB = 3600.0, 2**10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MOEEXP_CACHE_GIB", raising=False)
    return tmp_path / "cache"


def aged(path, hours):
    inside = sorted(path.rglob("*"), reverse=True) if path.is_dir() else []
    for one in (*inside, path):
        os.utime(one, (time.time() - hours * HOUR,) * 2)


def compiled(folder, key, *, hours, size=KIB):
    """An entry as `compile_cache` leaves it."""
    path = folder / "compiled" / key
    path.mkdir(parents=True)
    (path / "decode.pt2").write_bytes(b"0" * size)
    (path / "manifest.json").write_text("{}")
    lock_of(path).touch()
    for one in (path, lock_of(path)):
        aged(one, hours)
    return path


def names():
    return [entry.name for entry in entries()]


def total():
    return sum(entry.size for entry in entries())


def test_the_least_recently_used_goes_first_and_no_more_than_needed(folder):
    for key, hours in (("b", 5), ("a", 9), ("c", 2), ("d", 7)):
        compiled(folder, key, hours=hours)
    assert names() == ["a", "d", "b", "c"] and [entry.kind for entry in entries()] == ["compiled decode"] * 4
    assert trim(total()) == []
    assert [entry.name for entry in trim(total() - 1)] == ["a"] and names() == ["d", "b", "c"]
    size = total()
    assert [entry.name for entry in trim(size / 3 + 1)] == ["d", "b"] and names() == ["c"]
    assert sorted(path.name for path in (folder / "compiled").iterdir()) == [".c.lock", "c"], "their locks went with them"


def test_nothing_of_the_last_hour_goes(folder):
    compiled(folder, "old", hours=1.1)
    compiled(folder, "young", hours=0.9)
    trim(0)
    assert names() == ["young"]


def test_what_another_process_holds_stays(folder):
    compiled(folder, "held", hours=9)
    compiled(folder, "free", hours=5)
    code = (
        "import sys; from pathlib import Path; from moeexp.record.locks import try_lock\n"
        "held = try_lock(Path(sys.argv[1])); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(folder / "compiled" / ".held.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert [entry.name for entry in trim(0)] == ["free"]
        assert cache.main(["--clear"]) == 0 and names() == ["held"]
        holder.kill()
    trim(0)
    assert names() == []


def test_what_is_used_between_the_look_and_the_removal_stays(folder):
    path = compiled(folder, "a", hours=9)
    (entry,) = entries()
    os.utime(lock_of(path))
    assert not remove(entry, unless_used=True) and names() == ["a"]
    assert remove(entry) and names() == []


def test_two_processes_that_trim_at_once_remove_each_entry_once(folder):
    for number in range(60):
        compiled(folder, f"{number:02}", hours=10 - number / 10, size=4 * KIB)
    limit = total() / 2
    code = f"from moeexp.stack.cache_entries import trim; print('ready', flush=True); input(); print(len(trim({limit})))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    removed = [int(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert total() <= limit and sum(removed) == 30 and names()[0] == "30"


@pytest.fixture
def compiler(monkeypatch):
    """Of a kilobyte in no time."""

    class Program:
        graph = ""

    monkeypatch.setattr(compile_cache, "_compiler", lambda: "g++: 1.0")
    monkeypatch.setattr(compile_cache, "_constants", lambda program: {})
    monkeypatch.setattr(compile_cache, "compile_method", lambda program, path, config: path.write_bytes(b"0" * KIB))

    def get(method):
        settings = {"device": "cpu"}
        return compile_cache.get_or_compile(compile_cache.MethodSpec(method=method, settings=settings), Program)

    return get


def test_a_run_keeps_the_cache_within_its_limit_and_what_it_touches(folder, compiler, monkeypatch, capsys):
    for method in ("decode", "prefill"):
        assert not compiler(method).cached
    for entry in entries():
        for path in (*entry.paths, *entry.locks):
            if path.exists():
                aged(path, 9)
    assert compiler("decode").cached, "and so used now"
    monkeypatch.setenv("MOEEXP_CACHE_GIB", "0")
    assert not compiler("other").cached
    assert sorted(entry.kind for entry in entries()) == ["compiled decode", "compiled other"]
    assert compiler("decode").cached and not compiler("prefill").cached
    monkeypatch.setattr(cache_entries, "remove", refuse)
    for path in (folder / "compiled").iterdir():
        aged(path, 9)
    assert not compiler("more").cached, "it runs all the same"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the cache stays larger than MOEEXP_CACHE_GIB says") and "another's" in line


def refuse(*_, **__):
    raise PermissionError("another's")


def test_what_a_killed_compilation_left_is_seen_and_goes(folder):
    left = folder / "compiled" / ".k.partial"
    left.mkdir(parents=True)
    (left / "decode.pt2").write_bytes(b"half")
    aged(left, 2)
    assert names() == ["k"]
    with lock(lock_of(folder / "compiled" / "k")):
        assert trim(0) == [], "it is being compiled"
    aged(lock_of(folder / "compiled" / "k"), 2)
    trim(0)
    assert names() == [] and list((folder / "compiled").iterdir()) == []


@pytest.mark.parametrize("kind", caches.OTHERS)
def test_caches_of_torch_and_triton_in_ours_are_in_use_while_a_process_is(folder, kind):
    (folder / kind / "ab").mkdir(parents=True)
    (folder / kind / "ab" / "kernel").write_bytes(b"0" * KIB)
    code = f"from moeexp.stack import caches; print(caches._own({kind!r}), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout.readline() == f"{folder / kind}\n"
        for path in folder.iterdir():
            aged(path, 2)
        assert [entry.kind for entry in entries()] == [kind] and trim(0) == [] and total() >= KIB
        user.kill()
    assert [entry.kind for entry in trim(0)] == [kind] and names() == []
    assert caches.users(folder) == (), "what the killed one left is gone too"


def test_digests_are_an_entry(folder):
    folder.mkdir()
    (folder / "digests.json").write_text("{}")
    assert [(entry.kind, entry.size) for entry in entries()] == [("digests", 2)]
    held = try_lock(folder / ".digests.lock")
    assert not remove(entries()[0])
    held.release()
    assert remove(entries()[0]) and entries() == []


def test_the_command_shows_trims_and_clears(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cache.main([]) == 0
    assert capsys.readouterr().out == f"{folder}: 0 entries, 0.0 MiB; limit: 20 GiB (MOEEXP_CACHE_GIB)\n"
    compiled(folder, "a", hours=3, size=2**20)
    compiled(folder, "b", hours=2, size=3 * 2**20)
    assert cache.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    when = time.strftime("%F %T", time.localtime(entries()[1].used))
    assert lines[1].split() == ["compiled", "decode", "b", "3.0", *when.split()] and lines[2].split()[2] == "a"
    assert cache.main(["--limit", "0.0035"]) == 0
    assert capsys.readouterr().out.startswith("removed 1 entries, 1.0 MiB\n") and names() == ["b"]
    compiled(folder, "c", hours=0)
    assert cache.main(["--clear"]) == 0 and names() == []
    assert capsys.readouterr().out.startswith("removed 2 entries, 3.0 MiB\n")


@pytest.mark.parametrize("text", ["-1", "nan", "20GiB", "x" * 500])
def test_a_limit_that_is_none_is_one_line(folder, monkeypatch, capsys, text):
    for given_by in ("--limit", "MOEEXP_CACHE_GIB"):
        if given_by != "--limit":
            monkeypatch.setenv(given_by, text)
        assert cache.main([f"--limit={text}"] if given_by == "--limit" else []) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {given_by}={text[:9]}") and "number of GiB" in line and len(line) <= 400
    with pytest.raises(ValueError, match="MOEEXP_CACHE_GIB="):
        caches.check()
    monkeypatch.setenv("MOEEXP_CACHE_GIB", "inf")
    caches.check()


def test_one_of_both(folder, capsys):
    assert cache.main(["--clear", "--limit", "1"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_no_home_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(cache_entries, "cache_dir", caches.cache_dir)
    monkeypatch.setenv("MOEEXP_CACHE_DIR", "~nobody_here/c")
    assert cache.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "set HOME" in line


def test_an_entry_that_vanishes_meanwhile_is_none(folder, monkeypatch):
    compiled(folder, "a", hours=2)
    seen, size = os.lstat, total()

    def gone(path):
        if Path(path).name == "decode.pt2":
            raise FileNotFoundError(path)
        return seen(path)

    monkeypatch.setattr(cache_entries.os, "lstat", gone)
    assert total() == size - KIB and names() == ["a"]
