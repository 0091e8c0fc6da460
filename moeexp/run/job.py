"""One run: validate, run, record, track, show. In the caller's process, or in one of its own, see `moeexp.sweep.worker`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from moeexp.config import axes, memory_need, resolve, schema, sources, threads, validate
from moeexp.config.override_text import without_interpolation
from moeexp.record import disk, free_memory, streams, tracker
from moeexp.record.phases import Phases
from moeexp.record.record import Record, write_atomically
from moeexp.report import terminal
from moeexp.run import signals
from moeexp.run.identity import Identities, code_fingerprint, config_hash
from moeexp.stack import allocator, caches, compilers

OK, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {
    "ok": OK, "incorrect": FAILED, "failed": FAILED, "timeout": FAILED, "unsupported": INVALID, "interrupted": INTERRUPTED,
}  # fmt: skip

# Phases that read what the user gave: a ValueError in one of them is about that input. Later it is a fault of the work.
READING = {"weights", "verify artifact", "identity"}

RunFunction = Callable[..., None]


class TimeUp(KeyboardInterrupt):
    """The run's time is over; what it has measured is kept, as after an interrupt."""


@dataclass
class Job:
    """Plain values only, so that it can be handed to another process."""

    id: str
    run_dir: str
    config: dict[str, Any]  # as composed
    overrides: list[str]
    command: list[str]
    sweep: bool = False
    group: str | None = None  # the tracker's
    design: dict[str, Any] | None = None
    timeout_s: float | None = None
    # What the sweep looks for when it is repeated; the run computes both itself as well.
    config_hash: str | None = None
    code_fingerprint: str | None = None

    def composed(self) -> DictConfig:
        """`config` is resolved: what looks like an interpolation in it is text."""
        merged = OmegaConf.merge(OmegaConf.structured(schema.Config), _texts(self.config))
        assert isinstance(merged, DictConfig)
        return merged


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return without_interpolation(value) if isinstance(value, str) else value


def run_job(job: Job, cfg: DictConfig, experiment: RunFunction) -> int:
    """Runs one config. Returns the exit code; the record holds the status."""
    with signals.deferred():  # between its first and its last writing nothing ends without a word
        try:
            record = open_record(job)
        except OSError as error:
            say(f"error: the run cannot begin: {disk.explained(error, folders_of(job))}")
            return FAILED
        phases = Phases(record, Console(stderr=True))
        config, status = None, "ok"
        failure: BaseException | None = None
        try:
            with signals.allowed():
                config = prepare(cfg, record, phases, compiles=experiment is default_experiment)
                experiment(config, run_dir=Path(job.run_dir), record=record, phases=phases)
                signals.raise_if_received()  # where something in the run swallowed the interrupt
                status = verdict(config, record)
        except BaseException as raised:
            status, failure = status_of(raised, sweep=job.sweep), raised
        return conclude(job, record, phases, config, status, failure)


def open_record(job: Job) -> Record:
    path = Path(job.run_dir) / "record.json"
    disk.keep_space(path.parent)
    record = Record(path, id=job.id, config=job.config, command=job.command, overrides=job.overrides)
    record.set(design=job.design, config_hash=job.config_hash, code_fingerprint=job.code_fingerprint)
    record.write()
    return record


def record_left_by(job: Job) -> Record:
    """By the run's process, which has ended; begun anew where that took the file away or put something else in its place."""
    path = Path(job.run_dir) / "record.json"
    try:
        return Record.load(path)
    except (FileNotFoundError, ValueError) as error:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = open_record(job)
        record.note(f"the run's process left no record that can be read: {streams.fitted(str(error))}")
        return record


def folders_of(job: Job) -> dict[str, Path]:
    """{what moves it: where a run writes}"""
    found = {"hydra.sweep.dir" if job.sweep else "hydra.run.dir": Path(job.run_dir)}
    with suppress(ValueError, OSError):
        found |= caches.folders()
    return found


def prepare(cfg: DictConfig, record: Record, phases: Phases, *, compiles: bool = True) -> schema.Config:
    """Validates and resolves; the record then says what runs, and on what. compiles: the run will, where its config says so."""
    composed = schema.to_config(cfg)
    validate.check_values(composed)
    allocator.prepare(composed)
    check_surroundings(composed)
    threads.prepare()
    if compiles:
        compilers.start_ahead(composed)
    with signals.deferred():  # in the middle of an import an interrupt may be swallowed, or become another error
        import torch

        from moeexp.model.inputs import check_inputs, note_of_context, note_of_generation
        from moeexp.record import environment
        from moeexp.stack import artifact_config

    @contextmanager
    def progress(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
        with phases("identity"), phases.progress(what, total=total) as advance:
            yield advance

    composed = artifact_config.adopt(composed, record.data["overrides"], progress)
    config = resolve.resolved(composed, cuda_available=torch.cuda.is_available())
    check_inputs(config)
    memory_need.check_fits(config, free_memory.of_device)
    chosen = threads.choose(composed.threads, sources.load_architecture(composed.model))
    threads.apply(chosen, config.device)
    gpu = environment.gpu_name() if config.device == "cuda" else None

    identity = Identities(progress).of(config, gpu=gpu)
    record.set(
        config=config,
        config_hash=config_hash(config, identity),
        identity=identity,
        code_fingerprint=code_fingerprint(),
        random_weights=config.model.weights == "random",
        not_applicable=axes.not_applicable(config, environment.compute_capability(config.device)),
        environment=environment.collect(config.device, threads.describe(chosen)),
    )
    if chosen.number > (most := threads.granted().cores):
        record.note(f"{chosen.number} threads on {most} granted core(s): they wait for each other at every barrier")
    if beyond := note_of_context(config):
        record.note(beyond)
    if unapplied := note_of_generation(config):
        record.note(streams.fitted(unapplied))
        say(f"warning: {unapplied}")
    record.write()
    return config


def check_surroundings(config: schema.Config) -> None:
    """What is wrong with the environment rather than with the config, before any work. `ValueError`, one line."""
    tracker.check_environment(dataclasses.asdict(config.tracker))
    if config.engine == "moeexp" and (config.export != "eager" or config.device != "cpu"):  # else nothing is compiled
        caches.prepare()
        if config.export == "aoti" and config.artifact is None:
            caches.check()


def verdict(config: schema.Config, record: Record) -> str:
    if config.check == "off":
        return "ok"
    passed = (record.data["check"] or {}).get("passed")
    assert isinstance(passed, bool), f"the run ended with check={record.data['check']!r}, without a verdict"
    return "ok" if passed else "incorrect"


def status_of(raised: BaseException, *, sweep: bool) -> str:
    """In a sweep a cell that may not run is `unsupported`: the others go on, and it fails nothing. `conclude` makes that
    `failed` where work had begun."""
    if isinstance(raised, TimeUp):
        return "timeout"
    if isinstance(raised, KeyboardInterrupt) or signals.received():
        return "interrupted"
    return "unsupported" if sweep and isinstance(raised, ValueError) else "failed"


def conclude(
    job: Job, record: Record, phases: Phases, config: schema.Config | None, status: str, error: BaseException | None
) -> int:
    """Finishes the record, tracks and shows it. Returns the exit code. Only tracking can be interrupted."""
    compilers.end_ahead()
    error = None if error is None else disk.explained(error, folders_of(job))
    begun = set(record.data["phases_s"])
    if status == "unsupported" and begun - {"identity"}:  # of a snapshot that was read only to know it, nothing was begun
        status = "failed"
    if status == "interrupted" and not isinstance(error, KeyboardInterrupt):
        error = signals.stopped(error)  # the signal reached a child too, whose end came first
    invalid = isinstance(error, ValueError) and begun <= READING
    with signals.deferred():
        if config is not None and config.device == "cuda":
            from moeexp.record import environment

            record.add("environment", gpu_after=environment.gpu_state())
        try:
            record.finish(status, error=_describe(error, phases))
        except OSError as unwritten:
            say(f"error: {disk.explained(unwritten, folders_of(job))}; {os.path.relpath(record.path)} stays as it was ({status})")
            return EXIT_CODES[status] or FAILED
        code = INVALID if invalid else EXIT_CODES[status]
        if config is not None:  # a config that was refused measured nothing that a tracker should show
            track(record, code, group=job.group)
        if error is not None:
            _report(error, record, phases, invalid=invalid)
        if not invalid:
            terminal.print_run(record.data, path=record.path, console=Console())
    return code


def track(record: Record, exit_code: int, *, group: str | None) -> None:
    try:
        with signals.allowed():
            found = tracker.track(record.data, run_dir=record.path.parent, exit_code=exit_code, group=group)
    except KeyboardInterrupt:
        record.note("tracking was interrupted; the record is whole")
        record.write()
        raise
    record.set(tracker=found)
    try:
        record.write()
    except OSError as error:
        say(f"warning: what became of tracking is not in {os.path.relpath(record.path)}: {error}")
    if found["warning"]:
        say(f"warning: {found['warning']}")


def _describe(error: BaseException | None, phases: Phases) -> dict[str, Any] | None:
    if error is None:
        return None
    lines = "".join(traceback.format_exception(error))
    message = str(error).strip() or type(error).__name__
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, TimeUp):
        by = f" by {error}" if isinstance(error, signals.Stopped) else ""
        kind, message = "KeyboardInterrupt", f"interrupted{by}" + (f" during {phases.failed}" if phases.failed else "")
    return {"type": kind, "message": message, "phase": phases.failed, "traceback": lines}


def _report(error: BaseException, record: Record, phases: Phases, *, invalid: bool) -> None:
    """One line. The traceback of what is not the user's doing lies beside the record, and in it."""
    message = " ".join(str(error).split())
    if isinstance(error, TimeUp):
        say(f"error: {message}; what was measured is in {os.path.relpath(record.path)}")
    elif isinstance(error, KeyboardInterrupt):
        say(f"interrupted; what was measured is in {os.path.relpath(record.path)}")
    elif invalid:
        say(f"error: {message}")
    elif isinstance(error, disk.NoSpace):
        say(f"error: {message}")
    else:
        path = record.path.with_name("traceback.txt")
        write_atomically(path, record.data["error"]["traceback"])
        during = f" during {phases.failed}" if phases.failed else ""
        say(f"error: {type(error).__name__}{during}: {message} (traceback: {os.path.relpath(path)})")


def say(line: str) -> None:
    """To the user; each line fits a terminal and a log."""
    try:
        print("\n".join(map(streams.fitted, line.split("\n"))), file=sys.stderr)
    except OSError:
        if not signals.received():
            raise
        streams.outlive()  # the listener went a moment after the signal


def default_experiment(*arguments: Any, **keywords: Any) -> None:
    # Imported at the first run, after validation: `--help`, `--cfg` and a mistyped key need no model code.
    with signals.deferred():
        from moeexp.run.experiment import run_experiment

    run_experiment(*arguments, **keywords)


def reference_to(experiment: RunFunction) -> str:
    """`module:function`, by which a process of its own finds the experiment again."""
    assert experiment.__module__ != "__main__" and "<" not in experiment.__qualname__, (
        f"{experiment.__qualname__} of {experiment.__module__} cannot be imported by another process"
    )
    return f"{experiment.__module__}:{experiment.__qualname__}"


def write_jobs(path: Path, jobs: list[Job], experiment: RunFunction) -> None:
    jobs_as_plain = [dataclasses.asdict(job) for job in jobs]
    content = {"experiment": reference_to(experiment), "parent": os.getpid(), "jobs": jobs_as_plain}
    write_atomically(path, json.dumps(content))
