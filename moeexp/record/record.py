"""`record.json`: what one run was and what it found. The source of truth; trackers and reports read it.

It is written whole (a temporary file, fsync, rename) when the run starts, after each phase and when it ends, so that a
reader finds either the previous version or the new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeexp.record import disk, renamed
from moeexp.record.json_file import MAX_INT, read_json
from moeexp.record.liveness import is_gone, this_process
from moeexp.record.migration import STEPS, migrate
from moeexp.record.names import STATUSES
from moeexp.record.published import withheld
from moeexp.record.text import brief

SCHEMA = "moeexp.record/3"
SCHEMAS = (*STEPS, SCHEMA)  # those that are read

# Raw samples in milliseconds, by key the attribute of `Record` that takes them.
SAMPLES = {"token_latencies_ms": "latencies_ms", "prefill_latencies_ms": "prefill_ms", "ttft_latencies_ms": "ttft_ms"}

MAX_BYTES = 200_000
MOST_READ = 5 * MAX_BYTES  # of a record that another program has laid out anew
FULL_CONFIG = "config.json"  # beside a record whose config had to be cut
# (raw samples; tokens or characters; entries or characters of anything else) to keep; the first row that fits MAX_BYTES counts.
LIMITS = (
    (4000, 8000, None), (4000, 8000, 8000), (4000, 8000, 2000), (400, 800, None), (400, 800, 2000),
    (0, 80, 2000), (0, 80, 400), (0, 80, 100), (0, 20, 40),
)  # fmt: skip
MAX_TRACEBACK = 20_000

# Raw newlines are layout only, never inside a JSON string.
NUMBER_LIST = re.compile(r"\[\n\s*((?:-?[\d.e+-]+,\n\s*)*-?[\d.e+-]+)\n\s*\]")

# In the order in which the file shows them; None until known.
KEYS = (
    "id",
    "config_hash",
    "code_fingerprint",
    "status",
    "started",
    "finished",
    "phase",
    "process",
    "design",
    "command",
    "overrides",
    "config",
    "full_config",
    "identity",
    "random_weights",
    "check",
    "decode_tok_s",
    "prefill_tok_s",
    "ttft_s",
    "stalls",
    "verify",
    "token_latencies_ms",
    "prefill_latencies_ms",
    "ttft_latencies_ms",
    "rounds",
    "telemetry",
    "group",
    "generated_ids",
    "generated_text",
    "prompt_text",
    "bits_per_byte",
    "evaluation",
    "bytes_per_token",
    "bandwidth_share",
    "kernels_per_token",
    "time_split",
    "step_budget",
    "trace",
    "joules_per_token",
    "energy",
    "phases_s",
    "memory_gib",
    "quantised_coverage",
    "first_token_s",
    "ops",
    "not_applicable",
    "environment",
    "tracker",
    "error",
    "notes",
    "migrated",
)


class Record:
    """A dict of plain values with its file; `data` is for reading, the methods change it. `latencies_ms` takes raw per-token
    samples while the run goes on, `prefill_ms` and `ttft_ms` those of prefills and of first tokens."""

    def __init__(self, path: Path, *, id: str, config: Any, command: list[str], overrides: Sequence[str] = ()):
        self.path = path
        self.latencies_ms: list[float] = []
        self.prefill_ms: list[float] = []
        self.ttft_ms: list[float] = []
        self.data: dict[str, Any] = {"schema": SCHEMA} | dict.fromkeys(KEYS)
        self.set(id=id, config=config, command=command, overrides=list(overrides))
        self.set(status="running", started=_now(), process=this_process(), phases_s={}, notes=[])

    @classmethod
    def load(cls, path: Path) -> Record:
        """The record that another process left at `path`, to be finished here."""
        record = cls.__new__(cls)
        record.path, record.data = path, _read(path)
        for key, name in SAMPLES.items():
            setattr(record, name, list((record.data[key] or {}).get("samples", [])))
        return record

    def set(self, **values: Any) -> None:
        """Set top-level keys. Dataclasses, paths, tuples and non-finite floats are made plain, see `plain`."""
        for key, value in values.items():
            assert key in self.data, f"{key!r} is not a key of a record; add it to record.KEYS"
            self.data[key] = plain(value)

    def add(self, key: str, /, **values: Any) -> None:
        """More of what a key's table holds, as `set` makes it plain."""
        assert isinstance(self.data.get(key), dict), f"{key!r} is not a key of a record with a table"
        self.set(**{key: self.data[key] | values})

    def note(self, text: str) -> None:
        """A line for whoever reads the record: something was shortened, a tracker did not answer."""
        if text not in self.data["notes"]:
            self.data["notes"].append(text)

    def add_not_applicable(self, axis: str) -> None:
        """An axis of which the run itself finds that it has no effect here."""
        if axis not in self.data["not_applicable"]:
            self.data["not_applicable"].append(axis)

    def finish(self, status: str, *, error: dict[str, Any] | None = None) -> None:
        """Set the final status, drop what may not be published, and write.

        `error`: {type, message, phase, traceback}."""
        assert status in STATUSES and status != "running", status
        if error is not None:
            text = error.get("traceback") or ""
            error = error | {"traceback": text if len(text) <= MAX_TRACEBACK else "…" + text[-MAX_TRACEBACK:]}
        self.set(status=status, error=error, finished=_now(), phase=None)
        dropped = withheld(self.data)
        self.set(**dropped)
        for name in (name for key, name in SAMPLES.items() if key in dropped):
            setattr(self, name, [])
        disk.free_space(self.path.parent)
        self.write()

    def write(self) -> None:
        """Replace the file by the present state, shortened where that is needed to stay under MAX_BYTES."""
        for key, name in SAMPLES.items():
            self.data[key] = latency_summary(getattr(self, name)) if getattr(self, name) else None
        shown = shorten(self.data)
        if shown["config"] != self.data["config"]:
            text = json.dumps(self.data["config"])
            digest = hashlib.sha256(text.encode()).hexdigest()
            if (self.data.get("full_config") or {}).get("sha256") != digest:
                self.data["full_config"] = {"file": FULL_CONFIG, "sha256": digest}
                write_atomically(self.path.with_name(FULL_CONFIG), text)
            shown["full_config"] = self.data["full_config"]
        write_atomically(self.path, _dump(shown))


def shorten(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of `data`, cut until it fits MAX_BYTES: raw samples, tokens, and what a user gave, which can be of any length
    anywhere. `notes` says what was cut."""
    for samples, tokens, text in LIMITS:
        result, cut = dict(data), []
        limits = {"generated_ids": tokens, "generated_text": tokens, "rounds": samples}
        for key in SAMPLES:
            if data[key]:
                kept, note = _cut(data[key]["samples"], samples, f"{key}.samples")
                result[key] = data[key] | {"samples": kept}
                cut += note
        for key, limit in limits.items():
            result[key], note = _cut(data[key], limit, key)
            cut += note
        if text is not None:
            others = [key for key in data if key not in (*SAMPLES, *limits)]
            shorter = {key: _cut_anywhere(data[key], text) for key in others}
            if changed := [key for key in others if shorter[key] != data[key]]:
                cut.append(f"{', '.join(changed)}: texts and lists are kept here up to {text} characters or entries")
            result |= shorter
        result["notes"] = [*result["notes"], *cut]
        if len(_dump(result)) < MAX_BYTES:
            return result
    raise AssertionError(f"{len(_dump(result))} bytes: something large was set that is neither list nor text")


def _cut_anywhere(value: Any, limit: int) -> Any:
    if isinstance(value, dict):
        return {_cut_text(key, limit): _cut_anywhere(item, limit) for key, item in [*value.items()][:limit]}
    if isinstance(value, list):
        return [_cut_anywhere(item, limit) for item in value[:limit]]
    return _cut_text(value, limit) if isinstance(value, str) else value


def _cut_text(text: str, limit: int) -> str:
    """With its digest: two texts that begin alike stay two."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{text[:limit]}… [{len(text)} characters, sha256 {digest}]"


def _cut(value: Any, limit: int, key: str) -> tuple[Any, list[str]]:
    """The first `limit` entries of a list or text, or of each row of a batch, and the note about it."""
    if isinstance(value, list) and value and isinstance(value[0], (list, str)):
        rows = [_cut(row, limit, key) for row in value]
        return [row for row, _ in rows], [note for _, notes in rows[:1] for note in notes]
    if value is None or len(value) <= limit:
        return value, []
    return value[:limit], [f"{key}: the first {limit} of {len(value)} are kept here; statistics are over all"]


def latency_summary(samples_ms: list[float]) -> dict[str, Any]:
    """{samples, p50, p90, p99, mean, sd, n}; percentiles are nearest-rank, so each is a latency that was measured."""
    ordered, n = sorted(samples_ms), len(samples_ms)
    rank = {f"p{p}": round(ordered[math.ceil(p / 100 * n) - 1], 5) for p in (50, 90, 99)}
    return {
        "samples": [round(x, 4) for x in samples_ms],
        **rank,
        "mean": round(statistics.fmean(samples_ms), 5),
        "sd": round(statistics.stdev(samples_ms), 5) if n > 1 else 0.0,
        "n": n,
    }


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a run that is killed at any moment, finds the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk; writing does not say of which file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def plain(value: Any) -> Any:
    """JSON types only. Non-finite floats, of which strict JSON has none, and numbers beyond `MAX_INT` become text. A tensor is
    our own bug."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not -MAX_INT < value < MAX_INT:  # nobody would read it
        return str(value)
    if isinstance(value, Path):
        return str(value)
    assert value is None or isinstance(value, (str, int, bool)), f"{type(value).__name__} in a record: {value!r}"
    return value


def read_record(path: Path) -> dict[str, Any]:
    """As the present schema has it; an earlier one is migrated, and its file left as it is. `ValueError` (one line, with the
    path) for a file that is no record, one of a schema that this version does not know, or one that is not of its schema's
    shape (`moeexp.record.shape`); `FileNotFoundError`. A record that says `running` while its process is gone reads as
    `lost`."""
    data = _read(path)
    if data["status"] == "running" and is_gone(data.get("process")):
        data |= {"status": "lost", "error": lost_error(data)}
    return data


def lost_error(data: dict[str, Any]) -> dict[str, Any]:
    phase = data.get("phase")
    during = f" during {phase}" if phase else ""
    message = f"the run's process is gone{during} and left no word: it was killed, or the machine went down"
    return {"type": "ProcessLost", "message": message, "phase": phase, "traceback": None}


def _read(path: Path) -> dict[str, Any]:
    from moeexp.record import conformance  # here: most commands read none, and pydantic takes a while to import

    data = read_json(path, MOST_READ)
    found = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(found, str) or found not in SCHEMAS:
        known = ", ".join(map(repr, SCHEMAS))
        raise ValueError(f"{path} has schema={brief(found)}; this version reads {known}: remove it, or run again")
    try:
        if found != SCHEMA:
            conformance.check(renamed.record(data))  # a step counts on it, too
        data = {"schema": SCHEMA} | dict.fromkeys(KEYS) | migrate(data)  # a key that came later is not known
        conformance.check(data)
    except ValueError as error:
        raise ValueError(f"{path} is no whole record: {error}; remove it, or run again") from error
    return data


def full_config(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config of the record at `path`, whole where the record has it cut. `ValueError` where it is not to be had."""
    from moeexp.record import conformance

    if not record.get("full_config"):
        return record["config"]
    file = path.with_name(FULL_CONFIG)
    if not file.is_file():
        raise ValueError(f"the config of {path} is cut, and {FULL_CONFIG} beside it, which has it whole, is missing")
    config = renamed.config(read_json(file))
    if hashlib.sha256(file.read_bytes()).hexdigest() != record["full_config"]["sha256"]:
        raise ValueError(f"{file} is not the config of {path}: its digest is another one")
    try:
        conformance.check_config(config)
    except ValueError as error:
        raise ValueError(f"{file} is no config of a run: {error}") from error
    return config


def is_prepared(record: dict[str, Any]) -> bool:
    """Whether the run began: its config is then the resolved one. A cell that was refused, or killed before, has the
    config as it was composed, with every `auto` and null still in it, and says nothing of a machine."""
    return record["environment"] is not None


def _dump(data: dict) -> str:
    """Indented, but a list of numbers on one line: samples one to a line would be thousands of lines."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return NUMBER_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
