"""Earlier runs: found by config hash and code fingerprint, reused or run again, and what they say about time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moeexp.record.head import head
from moeexp.record.locks import try_lock
from moeexp.record.record import Record, lost_error, read_record
from moeexp.report.records import each_once, read_all

# A result; repeating it would measure the same again. The rest was not completed.
RESULTS = ("ok", "incorrect")


@dataclass(frozen=True)
class Earlier:
    path: Path
    id: str
    config_hash: str
    code_fingerprint: str
    status: str
    seconds: float | None


class History:
    """The runs under some folders, the latest last. `left_out`: a line for each record that is damaged."""

    def __init__(self, folders: Iterable[Path]):
        self.left_out: list[str] = []
        paths = each_once(path for folder in folders if folder.is_dir() for path in folder.rglob("record.json"))
        heads = [(path, self._known(path, head)) for path in paths]
        ordered = sorted(((path, known) for path, known in heads if known), key=lambda pair: _began(pair[1]))
        self.runs = [_earlier(path, known) for path, known in ordered]

    def latest(self, config_hash: str, code_fingerprint: str) -> Earlier | None:
        """A result before anything later that has none, as a failed repetition takes no result away. A record that is
        damaged beyond its first lines is none."""
        same = [r for r in self.runs if (r.config_hash, r.code_fingerprint) == (config_hash, code_fingerprint)]
        results = [run for run in same if run.status in RESULTS]
        for run in [*reversed(results), *reversed(same)]:
            if run in self.runs:
                if self._known(run.path, read_record) is not None:
                    return run
                self.runs.remove(run)
        return None

    def _known(self, path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return read(path)
        except FileNotFoundError:  # a link to a run that has been removed
            return None
        except ValueError as error:
            self.left_out.append(str(error))
            return None

    def seconds(self, config_hash: str) -> tuple[float | None, str]:
        """What a run will take, and how that is known: from runs of the same config, else from any."""
        for name, runs in (
            ("same config", [run for run in self.runs if run.config_hash == config_hash]),
            ("all runs", self.runs),
        ):
            known = [run.seconds for run in runs if run.seconds is not None and run.status in RESULTS]
            if known:
                return statistics.median(known), name
        return None, "no earlier run"


def runs_again(earlier: Earlier | None, rerun: str) -> bool:
    """rerun: `all`, `failed` (and missing), `none` (missing only)."""
    if earlier is None or rerun == "all":
        return True
    return rerun == "failed" and earlier.status not in RESULTS


def close_lost(path: Path) -> None:
    """Finishes the record of a run whose process is gone, in the file as it reads already. One whose folder a sweep holds
    is that sweep's to finish."""
    held = path.with_name(".lock")
    lock = try_lock(held) if held.exists() else None
    if held.exists() and lock is None:
        return
    try:
        record = Record.load(path)
        if record.data["status"] == "running":
            record.finish("lost", error=lost_error(record.data))
    finally:
        if lock is not None:
            lock.release()


class Folder:
    """A run's folder, held for as long as the run goes on: two sweeps in one place never write into each other's.

    The folder is `<sweep>/<name>`; where that belongs to another run, `<sweep>/<name>-<suffix>`. A record of the same
    config that a repetition replaces stays there as `record.<id>.json`."""

    def __init__(self, sweep: Path, name: str, *, suffix: str, config_hash: str | None):
        sweep.mkdir(parents=True, exist_ok=True)
        for candidate in (name, f"{name}-{suffix}"):
            self.path = sweep / candidate
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = try_lock(self.path / ".lock")
            if self._lock is None:
                continue
            if self._free(config_hash):
                return
            self.release()
        raise RuntimeError(f"{self.path} is in use by another run: choose another hydra.sweep.dir")

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _free(self, config_hash: str | None) -> bool:
        record = self.path / "record.json"
        if not record.exists() and not record.is_symlink():
            return True
        try:
            known = {} if record.is_symlink() else head(record)
        except ValueError:  # damaged: it stays where it is
            return False
        refused = config_hash is None and known.get("status") == "unsupported"  # neither has a hash
        same = bool(known) and config_hash is not None and known["config_hash"] == config_hash
        if not (same or refused):
            return False
        os.replace(record, self.path / f"record.{known['id']}.json")
        return True


def link(record: Path, sweep: Path, name: str, *, suffix: str) -> Path:
    """Makes a reused run part of this sweep's folder: `<sweep>/<name>/record.json` points to its record. A reader that
    resolves links sees each run once."""
    record = record.resolve()
    if sweep.resolve() in record.parents:
        return record
    for candidate in (name, f"{name}-{suffix}"):
        target = sweep / candidate / "record.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() and not target.is_symlink():
            target.symlink_to(os.path.relpath(record, target.parent.resolve()))
            return target
        if target.resolve() == record:
            return target
    raise RuntimeError(f"{target} exists and is another run's: choose another hydra.sweep.dir")


def read_whole(paths: Iterable[Path], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The records, each once; says a line for each that is damaged."""
    found, damaged = read_all(each_once(paths), read_record)
    for line in damaged:
        say(f"left out: {line}")
    if damaged:
        say(f"{len(damaged)} of {len(found) + len(damaged)} records left out")
    return list(found.values())


def read_running(path: Path) -> dict[str, Any]:
    """A record that another process may be about to write for the first time, or have removed or damaged."""
    try:
        return read_record(path)
    except (FileNotFoundError, ValueError):
        return {}


def _began(known: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(known["started"])


def _earlier(path: Path, known: dict[str, Any]) -> Earlier:
    seconds = None
    if known["finished"] is not None:
        seconds = (datetime.fromisoformat(known["finished"]) - _began(known)).total_seconds()
    known = {key: known[key] or "" for key in ("id", "config_hash", "code_fingerprint", "status")}
    return Earlier(path=path, seconds=seconds, **known)
