"""Damaged records: what to start from, what is changed in them, and every reader of records, in this process."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from moeexp import compare, reproduce, sync
from moeexp.record.head import head
from moeexp.record.objective import objective_of
from moeexp.record.record import read_record
from moeexp.report import __main__ as report
from moeexp.report import terminal
from moeexp.sweep.history import History, read_whole

ROOT = Path(__file__).resolve().parents[2]
# Of all schemas; of a GPU and of a CPU; with energy, of a design and a group.
SOURCES = (
    ROOT / "tests" / "data" / "record_1.json",
    ROOT / "tests" / "data" / "record_2.json",
    ROOT / "tests" / "data" / "record_3.json",
    ROOT / "results" / "readme_example" / "record.json",
    ROOT / "results" / "headline_qwen3_5_35b_a3b_int4_h200" / "0" / "record.json",
)
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
TERMINAL = "a\x1b[31mb\u202ec\r\nd|e`f`[g](javascript:h)"
VALUES: tuple[Any, ...] = (
    None, "text", "", [], {}, [None], {"a": 1}, True, False, -1, 0, 1, 0.5, 1e-300, 1e308, -1e308, 10**40, 10**99, "9" * 5000,
    "x" * 100_000, MARKUP, TERMINAL, "nan", "2026-01-01", "2026-13-01T00:00:00+00:00", [[1], "a"], {"": {"": []}},
)  # fmt: skip
# Of JSON that is none, or that Python would read and nobody may have written.
RAW = (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"9" * 10_000, b"[" * 5000, b'{"a":' * 5000, b"\xff", b'"\\ud800"',
       b'{"a":1,"a":2}')  # fmt: skip
SECONDS = 20  # of all readers together


def seeded() -> random.Random:
    """Another one every time; MOEEXP_FUZZ_SEED shows a failure again."""
    seed = int(os.environ.get("MOEEXP_FUZZ_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"MOEEXP_FUZZ_SEED={seed}")
    return random.Random(seed)


def bases() -> list[dict[str, Any]]:
    """With short lists: each of their entries is read like the next."""
    found = [json.loads(path.read_text()) for path in SOURCES]
    for one in found:
        for key in ("token_latencies_ms", "prefill_latencies_ms", "ttft_latencies_ms", "telemetry"):
            if one.get(key):
                one[key]["samples"] = one[key]["samples"][:40]
        name = "tolerances" if one["schema"] == "moeexp.record/3" else "gates"
        one["check"]["parts"] = [part | {name: part[name][:2]} for part in one["check"]["parts"][:2]]
    return found


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a record; of a long list the first three entries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


def replaced(record: dict[str, Any], path: tuple, value: Any) -> Any:
    if not path:
        return value
    result = copy.deepcopy(record)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def deleted(record: dict[str, Any], path: tuple) -> Any:
    result = copy.deepcopy(record)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return result


def dumped(record: Any) -> bytes:
    return json.dumps(record, indent=1).encode()


Damage = tuple[str, bytes]


def damages(record: dict[str, Any], generator: random.Random) -> Iterator[Damage]:
    """(what was done, the file's bytes), without end; every kind as often as another."""
    places, whole = [path for path in nodes(record) if path], dumped(record)
    while True:
        path = generator.choice(places)
        where = ".".join(map(str, path))
        value = generator.choice(VALUES)
        yield f"{where} = {value!r:.60}", dumped(replaced(record, path, value))
        other = generator.choice([place for place in places if place[0] != path[0]])
        both = replaced(replaced(record, path, value), other, again := generator.choice(VALUES))
        yield f"{where} = {value!r:.60}, {'.'.join(map(str, other))} = {again!r:.60}", dumped(both)
        raw = generator.choice(RAW)
        yield f"{where} = {raw[:20]!r}", dumped(replaced(record, path, "\0here")).replace(b'"\\u0000here"', raw)
        yield f"{where} deleted", dumped(deleted(record, path))
        cut = generator.randrange(len(whole))
        yield f"cut to {cut} bytes", whole[:cut]
        at, byte = generator.randrange(len(whole)), generator.randrange(256)
        yield f"byte {at} = {byte}", whole[:at] + bytes([byte]) + whole[at + 1 :]


def texts(value: Any) -> Iterator[tuple]:
    """Every place that holds a text, of long lists as `nodes`."""
    for place in nodes(value):
        inner = value
        for key in place:
            inner = inner[key]
        if isinstance(inner, str):
            yield place


@contextlib.contextmanager
def in_time(what: str, seconds: float = SECONDS) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"a reader hung: {what}")

    before, start = signal.signal(signal.SIGALRM, late), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        assert time.monotonic() - start < seconds, f"a reader hung, and hid it: {what}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Readers:
    """A folder of a whole record and a damaged one, and all that reads them."""

    def __init__(self, folder: Path, good: dict[str, Any]):
        self.folder, self.out = folder / "runs", folder / "out"
        self.damaged = self.folder / "damaged" / "record.json"
        for path in (self.damaged.parent, self.folder / "whole", self.out, self.damaged.parent / "wandb" / "offline-run-1"):
            path.mkdir(parents=True)
        self.whole = self.folder / "whole" / "record.json"
        shutil.copy(SOURCES[1], self.whole)
        self.whole.write_bytes(dumped(good))
        (self.damaged.parent / "wandb" / "offline-run-1" / "run.wandb").touch()

    def read(self, what: str, data: bytes) -> bool:
        """Every reader on the damaged record; whether it was read, and not refused."""
        self.damaged.write_bytes(data)
        with in_time(what):
            try:
                read_record(self.damaged)
                refused = None
            except ValueError as error:
                refused = str(error)
                assert "\n" not in refused and str(self.damaged) in refused, (what, refused)
            self._commands(what, refused)
            self._sweep(what, refused)
        return refused is None

    def _commands(self, what: str, refused: str | None) -> None:
        pair, alone = [str(self.folder)], [str(self.damaged.parent)]
        for to in ("md", "html", "wandb"):
            out = ["--to", to, "--out", str(self.out / f"report.{to}")]
            out += ["--project", "p", "--entity", "e"] * (to == "wandb")  # of two it asks for one
            said = run(report.main, [*pair, *out], 0, what)
            assert ("1 of 2 records left out" in said) == (refused is not None), (what, to, said)
            run(report.main, [*alone, *out], 2 if refused else (0, 2) if to == "wandb" else 0, what)
        for a, b in ((self.whole, self.damaged), (self.damaged, self.whole)):
            run(compare.main, [str(a), str(b)], 2 if refused else 0, what)
        run(sync.main, ["--dry-run", str(self.damaged.parent)], 0, what)
        if refused:
            run(reproduce.main, [str(self.damaged)], 2, what)
            return
        with contextlib.suppress(ValueError):
            old = reproduce.read(self.damaged)
            reproduce.arguments_of(old)
            reproduce.judge(old, read_record(self.whole))

    def _sweep(self, what: str, refused: str | None) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            assert objective_of(self.damaged) >= 0
        said: list[str] = []
        records = read_whole([self.whole, self.damaged], said.append)
        assert len(records) == 2 - (refused is not None) and len(said) == 2 * (refused is not None), what
        for is_terminal in (True, False):
            console = Console(file=io.StringIO(), force_terminal=is_terminal, color_system=None, width=100)
            terminal.print_sweep(records, path=self.whole, console=console)
            for one in records:
                terminal.print_run(one, path=self.whole, console=console)
                terminal.outcome(one)
            assert "\x1b[31m" not in console.file.getvalue() and "\u202e" not in console.file.getvalue(), what
        history = History([self.folder])
        assert len(history.runs) + len(history.left_out) == 2, (what, history.left_out)
        with contextlib.suppress(ValueError):
            known = head(self.damaged)
            found = history.latest(known["config_hash"], known["code_fingerprint"])
            assert found is None or found.path != self.damaged or not refused, what


def run(main: Callable, arguments: list[str], code: int | tuple[int, ...], what: str) -> str:
    """A command: its exit code as wanted, no line of its errors too long; returns its errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main(arguments)
    said = err.getvalue()
    assert found in (code if isinstance(code, tuple) else (code,)), (what, arguments, found, said)
    assert max(map(len, said.split("\n"))) <= 400 and "Traceback" not in said, (what, said)
    assert found == 0 or said, (what, arguments)
    assert not {"\x1b", "\r", "\u202e"} & set(said + out.getvalue()), (what, arguments, said)
    return said
