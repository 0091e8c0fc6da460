"""Named phases of a run: a line on the terminal for each, its seconds into the record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from moeexp.record.record import Record


class Phases:
    """`with phases("export"): …`; inside it, `with phases.progress("layers", total=8) as advance: … advance()`.

    A name that comes again adds to its time. Phases may nest; the inner one's time is part of the outer one's."""

    def __init__(self, record: Record, console: Console):
        self.record = record
        self.console = console
        self.failed: str | None = None  # the innermost phase that an exception left
        self._spinner: Status | None = None
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str, *, quiet: bool = False) -> Iterator[None]:
        """`quiet`: one of many short parts of a phase, of which nothing is printed."""
        outermost = self._spinner is None and self.console.is_terminal and not quiet
        shown: AbstractContextManager[Any] = nullcontext()
        if outermost:
            shown = self._spinner = self.console.status(name)
        elif not self.console.is_terminal and not quiet:
            self.console.print(f"{name} ...")
        self._open.append(name)
        # Should the process end without a word, the record tells where it was.
        self.record.set(phase=name)
        self.record.write()
        start = time.perf_counter()
        with shown:
            try:
                yield
            except BaseException:
                self.failed = self.failed or name
                self._close(name, start, outermost, "failed after ", quiet=False)
                raise
        self._close(name, start, outermost, "", quiet=quiet)
        self.record.write()

    def _close(self, name: str, start: float, outermost: bool, how: str, *, quiet: bool) -> None:
        seconds = time.perf_counter() - start
        self.record.add("phases_s", **{name: round(self.record.data["phases_s"].get(name, 0.0) + seconds, 4)})
        self._open.pop()
        self.record.set(phase=self._open[-1] if self._open else None)
        if not quiet:
            self.console.print(f"{name:<16} {how}{seconds:.2f} s", style="dim", highlight=False)
        if outermost:
            self._spinner = None

    @contextmanager
    def progress(self, what: str, *, total: int) -> Iterator[Callable[..., None]]:
        """A bar for a long phase, on a terminal only. Yields `advance(steps=1)`."""
        if not self.console.is_terminal:
            yield _ignored
            return
        if self._spinner is not None:
            self._spinner.stop()  # a terminal shows one live display at a time
        with bar(self.console, what, total=total) as advance:
            yield advance
        if self._spinner is not None:
            self._spinner.start()


def _ignored(steps: int = 1) -> None:
    """Where there is no bar."""


@contextmanager
def bar(console: Console, what: str, *, total: int) -> Iterator[Callable[..., None]]:
    """On a terminal that shows nothing else. Yields `advance(steps=1)`."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=total)

        def advance(steps: int = 1) -> None:
            shown.advance(task, steps)

        yield advance
