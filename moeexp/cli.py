"""`python -m moeexp`: one config or a sweep of them through Hydra, one record each, one exit code.

0 ok, 1 incorrect or failed, 2 invalid config or input, 130 interrupted.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from moeexp import report, schema, summary, tracker
from moeexp.composition_error import explain
from moeexp.objective import objective
from moeexp.phases import Phases
from moeexp.record import Record, code_fingerprint, config_hash, read_record, write_atomically

OK, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {"ok": OK, "incorrect": FAILED, "failed": FAILED, "unsupported": INVALID, "interrupted": INTERRUPTED}

Experiment = Callable[..., None]


@dataclass
class Session:
    """What one command keeps across its runs."""

    command: list[str]
    experiment: Experiment
    id: str = field(default_factory=lambda: secrets.token_hex(3))
    sweep_dir: Path | None = None
    strict: bool = False
    exit_code: int = OK
    running: bool = False  # inside a run, as opposed to inside Hydra

    def register(self) -> None:
        """What composing our config takes, in this process."""
        schema.register()
        OmegaConf.register_new_resolver("moeexp_id", lambda: self.id, replace=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A cluster launcher sends the task to another process, which composes the job there."""
        self.__dict__.update(state)
        self.register()


def main(arguments: Sequence[str] | None = None, *, experiment: Experiment | None = None) -> int:
    """Runs the command line and returns the exit code. `experiment` replaces `run_experiment`, for tests."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # argparse takes overrides before a flag or after it, not both.
    arguments.sort(key=lambda argument: argument not in ("-m", "--multirun"))
    session = Session(["python", "-m", "moeexp", *arguments], experiment or _run_experiment)
    session.register()

    def task(cfg: DictConfig) -> float:
        return _task(cfg, session)

    command = hydra.main(version_base="1.3", config_path=str(schema.conf_dir()), config_name="config")(task)
    code = _guarded(command, arguments, session)
    if session.sweep_dir is not None:
        code = max(code, _finish_sweep(session))
    return code or (session.exit_code if session.sweep_dir is None else OK)


def _guarded(command: Callable[[], Any], arguments: list[str], session: Session) -> int:
    """Runs Hydra and turns what it raises into one line and an exit code. Runs report their own failures."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with _hydra_process_state(arguments):
            command()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:  # argparse, and Hydra after --help
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else INVALID
    except BrokenPipeError:  # the reader of --help or --cfg has seen enough
        if session.running:
            raise
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        if session.running:
            raise  # a bug in this file; what a run raises is in its record
        # Hydra's error for a missing config is an OSError too.
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            return _say(f"error: cannot write the run's folder: {error}", FAILED)
        if wants_traceback:
            traceback.print_exc()
        return _say(f"error: {explain(error)}", INVALID)
    return OK


@contextmanager
def _hydra_process_state(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and raises (rather than prints and exits) only where HYDRA_FULL_ERROR is set."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["moeexp", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _task(cfg: DictConfig, session: Session) -> float:
    """One run, called by Hydra; returns its objective, for a sweeper that searches. Raises KeyboardInterrupt only, which
    ends a sweep; the rest is in the record."""
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    id, sweep = session.id, settings.mode == RunMode.MULTIRUN
    if sweep:
        session.sweep_dir = run_dir.parent
        id = f"{session.id}.{settings.job.num}"
        overrides = " ".join(settings.overrides.task) or "(defaults)"
        print(f"[{settings.job.num}] {overrides}", file=sys.stderr)
    session.strict = bool(cfg.launcher.get("strict"))
    session.running = True
    session.exit_code = run_one(cfg, run_dir=run_dir, id=id, session=session, sweep=sweep)
    session.running = False
    if session.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    return objective(read_record(run_dir / "record.json"))


def run_one(cfg: DictConfig, *, run_dir: Path, id: str, session: Session, sweep: bool) -> int:
    """Validate, run, record, track and show one config. Returns the exit code; the record holds the status."""
    from moeexp import environment

    record = Record(
        run_dir / "record.json",
        id=id,
        config=OmegaConf.to_container(cfg),
        command=session.command,
        overrides=list(HydraConfig.get().overrides.task),
    )
    record.write()
    phases = Phases(record, Console(stderr=True))
    config, error = None, None
    try:
        config = _prepare(cfg, record)
        record.write()
        session.experiment(config, run_dir=run_dir, record=record, phases=phases)
        status = _verdict(config, record)
    except KeyboardInterrupt as interrupt:
        status, error = "interrupted", interrupt
    except ValueError as invalid:
        status, error = "unsupported" if sweep else "failed", invalid
    except (Exception, SystemExit) as failure:
        status, error = "failed", failure
    if config is not None and config.device == "cuda":
        record.data["environment"]["gpu_after"] = environment.gpu_state()
    record.finish(status, error=_describe(error, phases))
    code = INVALID if isinstance(error, ValueError) else EXIT_CODES[status]
    if config is not None:  # a config that was refused measured nothing that a tracker should show
        _track(record, run_dir, code, group=f"{run_dir.parent.parent.name}/{run_dir.parent.name}" if sweep else None)
    if error is not None:
        _report_error(error, record, run_dir, phases)
    if not isinstance(error, ValueError):
        summary.print_run(record.data, path=record.path, console=Console())
    return code


def _track(record: Record, run_dir: Path, exit_code: int, *, group: str | None) -> None:
    record.set(tracker=tracker.track(record.data, run_dir=run_dir, exit_code=exit_code, group=group))
    record.write()
    if record.data["tracker"]["warning"]:
        _say(f"warning: {record.data['tracker']['warning']}", OK)


def _prepare(cfg: DictConfig, record: Record) -> schema.Config:
    """Validates and resolves; the record then says what runs, and on what."""
    import torch

    from moeexp import adopt, environment, validate

    config = adopt.adopt(schema.to_config(cfg), record.data["overrides"])
    cuda = torch.cuda.is_available()
    validate.validate(config, cuda_available=cuda)
    config = validate.resolve(config, cuda_available=cuda)
    gpu = environment.gpu_name() if config.device == "cuda" else None
    record.set(
        config=config,
        config_hash=config_hash(config, device=config.device, gpu=gpu),
        code_fingerprint=code_fingerprint(),
        random_weights=config.model.weights == "random",
        not_applicable=validate.not_applicable(config),
        environment=environment.collect(config.device),
    )
    return config


def _verdict(config: schema.Config, record: Record) -> str:
    if config.check == "off":
        return "ok"
    passed = (record.data["check"] or {}).get("passed")
    assert isinstance(passed, bool), f"the run ended with check={record.data['check']!r}, without a verdict"
    return "ok" if passed else "incorrect"


def _describe(error: BaseException | None, phases: Phases) -> dict[str, Any] | None:
    if error is None:
        return None
    lines = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "phase": phases.failed, "traceback": lines}


def _report_error(error: BaseException, record: Record, run_dir: Path, phases: Phases) -> None:
    """One line. The traceback of what is not the user's doing lies beside the record, and in it."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        _say(f"interrupted; what was measured is in {os.path.relpath(record.path)}", INTERRUPTED)
    elif isinstance(error, ValueError):
        _say(f"error: {message}", INVALID)
    else:
        path = run_dir / "traceback.txt"
        write_atomically(path, record.data["error"]["traceback"])
        during = f" during {phases.failed}" if phases.failed else ""
        _say(f"error: {type(error).__name__}{during}: {message} (traceback: {os.path.relpath(path)})", FAILED)


def _finish_sweep(session: Session) -> int:
    """The combined table, from the records on disk; FAILED if one of them did not end well."""
    assert session.sweep_dir is not None
    records = report.load_records([session.sweep_dir])
    path = session.sweep_dir / "table.md"
    title = f"`{shlex.join(session.command)}`\n\n"
    write_atomically(path, title + report.markdown(records))
    summary.print_sweep(records, path=path, console=Console())
    good = ("ok",) if session.strict else ("ok", "unsupported")
    return OK if all(record["status"] in good for record in records) else FAILED


def _run_experiment(*arguments: Any, **keywords: Any) -> None:
    # Imported at the first run, after validation: `--help`, `--cfg` and a mistyped key need no model code.
    from moeexp.experiment import run_experiment

    run_experiment(*arguments, **keywords)


def _say(line: str, code: int) -> int:
    """One line to the user, on stderr. Returns `code`."""
    print(line, file=sys.stderr)
    return code
