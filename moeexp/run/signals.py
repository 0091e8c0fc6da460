"""Ctrl-C, SIGTERM and SIGHUP: each ends a run as an interrupt, whose record is then finished.

The first raises `Stopped` (a KeyboardInterrupt) in the main thread. Under `deferred` it waits, so that no record stays
unfinished. A second SIGTERM or SIGHUP ends the process at once; a second Ctrl-C interrupts again. One request often comes
as two signals (`timeout` signals its child, then its child's group): what follows within `ECHO_S` is the same one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from moeexp.record import streams

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 0.5


class Stopped(KeyboardInterrupt):
    """Its text is the signal's name."""


class _State:
    """Of this process: signals are the process's own, too."""

    def __init__(self) -> None:
        self.last: float | None = None  # when one came
        self.name = ""  # of the first
        self.depth = 0  # of `deferred`
        self.pending: tuple[int, bool] | None = None  # a signal that waits, and whether it is the second
        self.again = False  # a second one interrupts again, too


_state = _State()


@contextmanager
def handled(*, even_if_ignored: tuple[int, ...] = ()) -> Iterator[None]:
    """Within, the signals interrupt. Ones that the caller set to be ignored (nohup, a shell's background job) stay ignored."""
    global _state
    if threading.current_thread() is not threading.main_thread():  # only that one may, and gets them
        yield
        return
    before: dict[int, Any] = {}
    outer, _state = _state, _State()
    for number in NUMBERS:
        current = signal.getsignal(number)
        if current is not None and (current is not signal.SIG_IGN or number in even_if_ignored):
            before[number] = signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)
        _state = outer


@contextmanager
def repeated() -> Iterator[None]:
    """Within, a second signal interrupts again, as a second Ctrl-C does: a sweep first ends its runs."""
    before, _state.again = _state.again, True
    try:
        yield
    finally:
        _state.again = before


@contextmanager
def deferred() -> Iterator[None]:
    """Within, nothing is interrupted; a signal that came meanwhile interrupts at the end."""
    with _depth(_state.depth + 1):
        yield


@contextmanager
def allowed() -> Iterator[None]:
    """The part of a `deferred` that may be interrupted."""
    with _depth(0):
        _stop_if_pending()
        yield


@contextmanager
def _depth(depth: int) -> Iterator[None]:
    before, _state.depth = _state.depth, depth
    try:
        yield
    finally:
        _state.depth = before
        _stop_if_pending()


def _stop_if_pending() -> None:
    if _state.depth == 0 and _state.pending is not None:
        (number, second), _state.pending = _state.pending, None
        _stop(number, second=second)


def received() -> bool:
    """Whether a signal came, also where the interrupt was swallowed or became another error on its way (a compiler that got
    the signal as well and failed)."""
    return _state.last is not None


def raise_if_received() -> None:
    if received():
        raise Stopped(_state.name)


def stopped(cause: BaseException | None) -> Stopped:
    """The interrupt that the signal received would have been, in the place of what else it caused."""
    error = Stopped(_state.name)
    error.__cause__ = cause
    return error


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    before, _state.last = _state.last, now
    if before is not None and now - before < ECHO_S:
        return
    second = before is not None
    _state.name = _state.name or signal.Signals(number).name
    if _state.depth:
        _state.pending = number, second
        return
    _stop(number, second=second)


def _stop(number: int, *, second: bool) -> None:
    if second and number != signal.SIGINT and not _state.again:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    streams.outlive()
    raise Stopped(signal.Signals(number).name)
