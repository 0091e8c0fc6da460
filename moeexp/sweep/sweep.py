"""Runs the cells of a sweep, each in a process of its own, and gives every one of them a record.

The parent composes, validates and schedules. It never touches CUDA.
"""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from moeexp.config.schema import LauncherConfig
from moeexp.record import disk
from moeexp.record.gpus import Gpu, choose, visible_gpus
from moeexp.record.paths import expanded
from moeexp.record.phases import bar
from moeexp.record.record import Record, write_atomically
from moeexp.record.text import one_line
from moeexp.report import table, terminal
from moeexp.report.markup import code
from moeexp.run import signals
from moeexp.run.identity import code_fingerprint
from moeexp.run.job import (
    FAILED,
    INTERRUPTED,
    OK,
    Job,
    RunFunction,
    check_surroundings,
    open_record,
    record_left_by,
    run_job,
    say,
    track,
    write_jobs,
)
from moeexp.sweep import groups
from moeexp.sweep import terminal as sweep_terminal
from moeexp.sweep.cells import Cell, Composer, cells_of, judge
from moeexp.sweep.history import Folder, History, close_lost, link, read_running, read_whole
from moeexp.sweep.process import Process
from moeexp.sweep.terminal import Progress

POLL_S = 0.05
ENDED_WELL = ("ok", "unsupported")


@dataclass
class Running:
    """A process and the cells that it runs: one, or a group."""

    process: Process
    cells: list[Cell]
    folders: list[Folder]
    jobs: list[Job]
    gpu: Gpu | None


@dataclass
class Sweep:
    """What one command runs. A sweeper may hand over its jobs in several batches."""

    id: str
    command: list[str]
    experiment: RunFunction
    directory: Path
    cells: list[Cell] = field(default_factory=list)
    interrupted: bool = False
    stopped: bool = False  # by the first failure, under fail_fast
    broken: bool = False  # a disk is full, or cannot be written
    settings: LauncherConfig | None = None
    dry_run: bool = False
    gpus: list[Gpu] = field(default_factory=list)
    history: History = field(default_factory=lambda: History([]))
    fingerprint: str | None = None

    def plan(self, composer: Composer, overrides: Sequence[Sequence[str]], first: int) -> list[Cell]:
        """A batch's cells, judged. `ValueError` for settings of the sweep that are not right."""
        # A design has more cells than the sweeper has jobs.
        cells = cells_of(composer, overrides, max(first, len(self.cells)))
        settings, rerun = self._agreed(cells)
        self.gpus = choose(visible_gpus(), settings.gpus)
        self.history = History([expanded(settings.root), self.directory])
        self.fingerprint = code_fingerprint()
        judge(
            cells, gpus=self.gpus, history=self.history, fingerprint=self.fingerprint, rerun=rerun, at_once=self.at_once,
            progress=_bar,
        )  # fmt: skip
        for cell in cells:
            if cell.again and cell.refusal is None:
                check_surroundings(cell.given)  # a fault of the whole sweep, not of a cell
        if settings.isolation == "group":
            groups.repeat_broken(cells)
        if damaged := self.history.left_out:
            say(f"{len(damaged)} damaged records of earlier runs are left out, the first: {damaged[0]}")
        self.cells += cells
        return cells

    @property
    def at_once(self) -> int:
        """Runs beside each other, at most: they share the cores."""
        assert self.settings is not None
        return 1 if self.settings.isolation == "none" else max(1, len(self.gpus))

    def run(self, composer: Composer, cells: Sequence[Cell]) -> None:
        """Gives each of the batch's cells a record; with dry_run, lists them."""
        assert self.settings is not None
        if self.dry_run:
            sweep_terminal.print_cells(cells, history=self.history, console=Console())
            return
        signals.raise_if_received()  # what was imported on the way may have swallowed it
        self._close_lost()
        with self._stops_where_it_cannot_write():
            self._refuse_and_reuse(cells, composer)
            left = [cell for cell in cells if cell.record is None]
            waiting = groups.of(left) if self.settings.isolation == "group" else [[cell] for cell in left]
            if self.settings.isolation == "none":
                self._run_here(waiting, composer)
            else:
                self._run_apart(waiting, composer)

    @contextmanager
    def _stops_where_it_cannot_write(self, what: str = "the sweep starts no further run") -> Iterator[None]:
        """One line. The cells that did not run have no record, and the same command runs them."""
        try:
            yield
        except OSError as error:
            self.broken = True
            folders = {"hydra.sweep.dir": self.directory, "TMPDIR": Path(tempfile.gettempdir())}
            say(f"error: {what}: {disk.explained(error, folders)}")

    def exit_code(self) -> int:
        """After `finish`."""
        if self.dry_run or self.settings is None:  # None: refused before the first cell
            return OK
        if self.interrupted:
            return INTERRUPTED
        if self.broken:
            return FAILED
        good = ("ok",) if self.settings.strict else ENDED_WELL
        statuses = [_status(cell) for cell in self.cells]
        return OK if all(status in good for status in statuses) else FAILED

    def finish(self) -> None:
        """The combined table, on the terminal and in the sweep's folder."""
        done = [cell.record for cell in self.cells if cell.record is not None]
        if self.dry_run or not (records := read_whole(done, say)):
            return
        path = self.directory / "table.md"
        notes = "".join(f"\n{line}\n" for line in self._notes())
        with self._stops_where_it_cannot_write("the table is not written"):
            write_atomically(path, f"{code(shlex.join(self.command))}\n\n" + table.markdown(records) + notes)
        terminal.print_sweep(records, path=path, console=Console())
        for line in self._notes():
            print(line)

    def _notes(self) -> Iterator[str]:
        reused = [cell for cell in self.cells if cell.record is not None and not cell.again]
        missing = [cell for cell in self.cells if cell.record is None]
        if reused:
            ids = ", ".join(cell.earlier.id for cell in reused if cell.earlier)
            yield f"{len(reused)} of {len(self.cells)} cells had run before and were reused ({ids}); rerun=all repeats them"
        if missing:
            numbers = ", ".join(str(cell.number) for cell in missing)
            yield f"{len(missing)} of {len(self.cells)} cells did not run ({numbers}); the same command runs them"

    def _agreed(self, cells: Sequence[Cell]) -> tuple[LauncherConfig, str]:
        """The settings of the sweep, which are no axis of it."""
        views = [
            (dataclasses.replace(cell.given.launcher, cells=[], only=[]), cell.given.rerun, cell.given.dry_run) for cell in cells
        ]
        if any(view != views[0] for view in views):
            raise ValueError("launcher.*, rerun and dry_run are settings of a whole sweep: give each one value")
        self.settings, rerun, self.dry_run = views[0]
        check_settings(self.settings, rerun)
        return self.settings, rerun

    def _close_lost(self) -> None:
        """The records of earlier calls that were killed, as far as they may be written: they read as lost in any case."""
        for run in self.history.runs:
            if run.status == "lost":
                with suppress(OSError):
                    close_lost(run.path)

    def _refuse_and_reuse(self, cells: Sequence[Cell], composer: Composer) -> None:
        for cell in cells:
            if cell.refusal is not None:
                folder = self._folder(cell, composer)
                record = open_record(self._job(cell, folder, composer))
                kind = {"type": "ValueError", "message": str(cell.refusal), "phase": None, "traceback": None}
                record.finish("unsupported", error=kind)
                folder.release()
                cell.record = record.path
                say(f"[{cell.number}] {cell.title}\n[{cell.number}] unsupported: {one_line(str(cell.refusal))}")
        for cell in cells:
            if cell.refusal is None and not cell.again:
                assert cell.earlier is not None
                name = composer.subdir(cell.overrides, cell.number)
                cell.record = link(cell.earlier.path, self.directory, name, suffix=self.id)
                say(f"[{cell.number}] {cell.title}\n[{cell.number}] {cell.earlier.status}, from an earlier run")

    def _run_here(self, waiting: Sequence[list[Cell]], composer: Composer) -> None:
        """launcher.isolation=none: in this process, for debugging."""
        for cell in (cell for cells in waiting for cell in cells):
            say(f"[{cell.number}] {cell.title}")
            folder = self._folder(cell, composer)
            job = self._job(cell, folder, composer)
            cell.record = Path(job.run_dir) / "record.json"
            code = run_job(job, job.composed(), self.experiment)
            folder.release()
            self.interrupted = code == INTERRUPTED
            self._stop_if_failed([cell])
            if self.interrupted or self.stopped:
                return

    def _run_apart(self, waiting: list[list[Cell]], composer: Composer) -> None:
        """A process each; as many at a time as there are GPUs, else one."""
        free: list[Gpu | None] = list(self.gpus) or [None]
        waiting, running = list(waiting), list[Running]()
        with signals.repeated(), Progress(Console(stderr=True)).shown() as progress:
            try:
                while waiting or running:
                    while waiting and free and not self.stopped:
                        with self._stops_where_it_cannot_write():
                            running.append(self._start(waiting.pop(0), composer, free.pop(0)))
                        if self.broken:  # those that are under way may end well
                            waiting.clear()
                    for ended in [entry for entry in running if entry.process.ended()]:
                        running.remove(ended)
                        free.append(ended.gpu)
                        self._conclude(ended)
                    if self.stopped:
                        waiting.clear()
                        for entry in running:
                            entry.process.interrupt()
                    progress.show((cell, entry.process.seconds()) for entry in running for cell in entry.cells)
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                self.interrupted = True
                self._stop_all(running)

    def _stop_all(self, running: list[Running]) -> None:
        for entry in running:
            entry.process.interrupt()
        say("interrupted: stopping the runs that are under way; again to kill them")
        try:
            while not all([entry.process.ended() for entry in running]):
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            for entry in running:
                entry.process.kill()
            while not all([entry.process.ended() for entry in running]):
                time.sleep(POLL_S)
        for entry in running:
            self._conclude(entry)

    def _start(self, cells: list[Cell], composer: Composer, gpu: Gpu | None) -> Running:
        assert self.settings is not None
        folders = [self._folder(cell, composer) for cell in cells]
        jobs = [self._job(cell, folder, composer) for cell, folder in zip(cells, folders, strict=True)]
        records = list[Record]()
        try:
            for cell, job in zip(cells, jobs, strict=True):
                # Written here, so that there is one whatever becomes of the process.
                records.append(open_record(job))
                cell.record = records[-1].path
                say(f"[{cell.number}] {cell.title}")
            file, limit = folders[0].path / "job.json", self.settings.timeout_s
            write_jobs(file, jobs, self.experiment)
            process = Process(
                file, folders[0].path / "output.txt", gpu=gpu.id if gpu else None,
                timeout_s=None if limit is None else limit * len(cells), at_once=self.at_once,
            )  # fmt: skip
        except OSError as error:
            for record in records:
                record.finish("failed", error={"type": "OSError", "message": str(error), "phase": None, "traceback": None})
            raise
        return Running(process, cells, folders, jobs, gpu)

    def _conclude(self, entry: Running) -> None:
        """Finishes the record of a run that could not, and says how each ended."""
        for cell, folder, job in zip(entry.cells, entry.folders, entry.jobs, strict=True):
            record: Record | None = None
            with self._stops_where_it_cannot_write():
                record = record_left_by(job)
                self._complete(record, entry.process, job)
            folder.release()
            outcome = terminal.outcome(record.data) if record else "lost"
            say(f"[{cell.number}] {outcome}  ({entry.process.seconds():.1f} s)")
        self._stop_if_failed(entry.cells)

    def _complete(self, record: Record, process: Process, job: Job) -> None:
        if record.data["status"] == "running":
            status, error = process.cause(record.data["phase"])
            record.finish(status, error=error)
            if status != "interrupted":
                track(record, FAILED, group=job.group)
        elif process.describe_end() and not process.interrupted:
            record.note(f"after the record was complete, the run's process {process.describe_end()}")
            record.write()

    def _stop_if_failed(self, cells: Sequence[Cell]) -> None:
        assert self.settings is not None
        if self.settings.fail_fast and any(_status(cell) not in ENDED_WELL for cell in cells):
            self.stopped = True

    def _folder(self, cell: Cell, composer: Composer) -> Folder:
        name = composer.subdir(cell.overrides, cell.number)
        return Folder(self.directory, name, suffix=self.id, config_hash=cell.config_hash)

    def _job(self, cell: Cell, folder: Folder, composer: Composer) -> Job:
        assert self.settings is not None
        config: Any = OmegaConf.to_container(composer.compose(cell.overrides), resolve=True)
        group = f"{self.directory.parent.name}/{self.directory.name}"
        return Job(
            id=f"{self.id}.{cell.number}", run_dir=str(folder.path), config=config, overrides=cell.overrides,
            command=self.command, sweep=True, group=group, design=cell.design, timeout_s=self.settings.timeout_s,
            config_hash=cell.config_hash, code_fingerprint=self.fingerprint if cell.config_hash else None,
        )  # fmt: skip


def check_settings(settings: LauncherConfig, rerun: str) -> None:
    """The rules of validate.py that concern the sweep, before any cell is judged. `ValueError`, one line."""
    from moeexp.config.validate import check_value

    for name, value in vars(settings).items():
        check_value(f"launcher.{name}", value)
    check_value("rerun", rerun)


@contextmanager
def _bar(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        say(f"{what}: {total} ...")
    with bar(console, what, total=total) as advance:
        yield advance


def _status(cell: Cell) -> str:
    return "missing" if cell.record is None else read_running(cell.record).get("status", "missing")
