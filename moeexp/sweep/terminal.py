"""What a sweep shows: what it would do, cell by cell, and what its runs are doing, in one line on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from moeexp.report.terminal import short_path
from moeexp.sweep.cells import Cell
from moeexp.sweep.history import History, read_running

INTERVAL_S = 1.0


class Progress:
    def __init__(self, console: Console):
        self.console = console
        self._line = console.status("") if console.is_terminal else None
        self._last = 0.0

    def show(self, running: Iterable[tuple[Cell, float]]) -> None:
        """(cell, seconds since its start) of what is under way. The phase is the one that its record tells."""
        now = time.monotonic()
        if self._line is None or now - self._last < INTERVAL_S:
            return
        self._last = now
        parts = []
        for cell, seconds in running:
            phase = read_running(cell.record).get("phase") if cell.record else None
            parts.append(f"[{cell.number}] {phase or 'running'}, {seconds:.0f} s")
        self._line.update("  ".join(parts).replace("[", "\\["))

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        if self._line is None:
            yield self
            return
        with self._line:
            yield self


def print_cells(cells: Sequence[Cell], *, history: History, console: Console) -> None:
    """What a sweep would do, one line a cell; the reason of each that may not run; the time that it will take."""
    total, unknown, to_run = 0.0, 0, 0
    for cell in cells:
        if cell.refusal is not None:
            line = f"unsupported  {' '.join(str(cell.refusal).split())}"
        elif not cell.again and cell.earlier is not None:
            line = f"done         {cell.earlier.status}, {short_path(cell.earlier.path)}"
        else:
            before = f"{cell.earlier.status} before, " if cell.earlier is not None else ""
            seconds, source = history.seconds(cell.config_hash or "")
            line = f"to run       {before}" + ("time unknown" if seconds is None else f"~{seconds:.0f} s ({source})")
            total, unknown, to_run = total + (seconds or 0.0), unknown + (seconds is None), to_run + 1
        print(f"[{cell.number}] {cell.title}  {line}", file=console.file)  # of thousands: no time for styles
    about = f"about {total / 60:.1f} min, one after the other" if to_run > unknown else "time unknown"
    console.print(f"{len(cells)} cells, {to_run} to run, {about}", markup=False, highlight=False, soft_wrap=True)
