"""What a sweep's runs are doing, in one line on a terminal; nothing where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console

from moeexp.cells import Cell
from moeexp.resume import read_running

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
