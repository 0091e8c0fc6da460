"""The line that says what a sweep's runs do."""

import io
from types import SimpleNamespace

from rich.console import Console

from moeexp.config.compose import compose
from moeexp.record.record import Record
from moeexp.sweep.terminal import Progress


def cell(tmp_path):
    record = Record(tmp_path / "record.json", id="a", config=compose(["model=nano"]), command=["python"])
    record.set(phase="compile decode")
    record.write()
    return SimpleNamespace(number=3, record=record.path)


def test_the_phase_is_shown_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress(console).shown() as progress:
        progress.show([(cell(tmp_path), 12.4), (SimpleNamespace(number=4, record=None), 0.2)])
    shown = console.file.getvalue()
    assert "[3] compile decode, 12 s" in shown and "[4] running, 0 s" in shown


def test_nothing_where_there_is_no_terminal(tmp_path):
    console = Console(file=io.StringIO())
    with Progress(console).shown() as progress:
        progress.show([(cell(tmp_path), 12.4)])
    assert console.file.getvalue() == ""
