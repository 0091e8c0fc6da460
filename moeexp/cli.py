"""`python -m moeexp`: one config or a sweep of them through Hydra, one record each, one exit code.

0 ok, 1 incorrect or failed, 2 invalid config or input, 130 interrupted (Ctrl-C, SIGTERM, SIGHUP).
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moeexp.config import schema
from moeexp.config.axes_text import help_text
from moeexp.config.errors import HELP, explain
from moeexp.config.override_text import as_typed
from moeexp.record import streams
from moeexp.record.objective import objective_of
from moeexp.record.paths import expanded
from moeexp.record.text import MAX_OVERRIDES
from moeexp.run import signals
from moeexp.run.job import FAILED, INTERRUPTED, INVALID, OK, Job, RunFunction, default_experiment, run_job, say
from moeexp.sweep import hydra_plugins
from moeexp.sweep.sweep import Sweep

MULTIRUN = ("-m", "--multirun")
CONFIG_FOLDER = ("--config-dir", "-cd", "--config-path", "-cp")


@dataclass
class Invocation:
    """What one command keeps across its runs."""

    command: list[str]
    experiment: RunFunction
    id: str = field(default_factory=lambda: secrets.token_hex(3))
    sweep: Sweep | None = None
    exit_code: int = OK
    running: bool = False  # inside a run, as opposed to inside Hydra

    def register(self) -> None:
        """What composing our config takes, in this process."""
        schema.register()
        hydra_plugins.register()
        OmegaConf.register_new_resolver("moeexp_id", lambda: self.id, replace=True)
        OmegaConf.register_new_resolver("moeexp_axes", help_text, replace=True)
        OmegaConf.register_new_resolver("moeexp_mode", hydra_plugins.mode, replace=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A cluster launcher sends the task to another process, which composes the job there."""
        self.__dict__.update(state)
        self.register()


def main(arguments: Sequence[str] | None = None, *, experiment: RunFunction = default_experiment) -> int:
    """Runs the command line and returns the exit code. `experiment`, a function of a module, replaces
    `run_experiment` (in a sweep's processes too), for tests."""
    streams.prepare()
    with signals.handled():
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments), experiment)
        except KeyboardInterrupt:  # after the last record was complete
            return INTERRUPTED
        except Exception:
            if not signals.received():
                raise
            streams.outlive()  # nobody listens any more, or an import made another error of it
            return INTERRUPTED


def _main(arguments: list[str], experiment: RunFunction) -> int:
    # argparse takes overrides before a flag or after it, not both.
    if any("\ud800" <= character <= "\udfff" for argument in arguments for character in argument):
        return _say("error: an argument is not UTF-8 text: write it in UTF-8, and let the locale say so (LANG=C.UTF-8)", INVALID)
    if len(arguments) > MAX_OVERRIDES:
        said = f"error: {len(arguments)} arguments are more than {MAX_OVERRIDES}: write settings into a file of a --config-dir"
        return _say(said, INVALID)
    arguments.sort(key=lambda argument: argument not in MULTIRUN)
    invocation = Invocation(["python", "-m", "moeexp", *arguments], experiment)
    invocation.register()

    def task(cfg: DictConfig) -> float:
        return _task(cfg, invocation)

    task.invocation = invocation  # type: ignore[attr-defined] # for our launcher, which Hydra makes
    try:
        arguments = [as_typed(argument) for argument in _expanded_folders(arguments)]
    except ValueError as error:
        return _say(f"error: {error}", INVALID)
    command = hydra.main(version_base="1.3", config_path=str(schema.conf_dir()), config_name="config")(task)
    code = _guarded(command, arguments, invocation)
    if invocation.sweep is not None:
        invocation.sweep.finish()
        code = max(code, invocation.sweep.exit_code())
    return code or invocation.exit_code


def _expanded_folders(arguments: Sequence[str]) -> Iterator[str]:
    """`~` in Hydra's own flags that take a folder."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, is_set, value = argument.partition("=")
        if is_set and flag in CONFIG_FOLDER:
            yield f"{flag}={expanded(value)}"
        else:
            yield str(expanded(argument)) if before in CONFIG_FOLDER else argument


def _guarded(command: Callable[[], Any], arguments: list[str], invocation: Invocation) -> int:
    """Runs Hydra and turns what it raises into one line and an exit code. Runs report their own failures."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with _hydra_process_state(arguments):
            command()
    except KeyboardInterrupt:
        return _interrupted(invocation)
    except SystemExit as stop:  # argparse, and Hydra after --help
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else INVALID
    except BrokenPipeError:  # the reader of --help or --cfg has seen enough
        if invocation.running:
            raise
        sys.stdout = open(os.devnull, "w")
    except Exception as error:
        if signals.received():  # in the middle of an import it becomes what it likes
            return _interrupted(invocation)
        if invocation.running:
            raise  # a bug in this file; what a run raises is in its record
        # Hydra's error for a missing config is an OSError too.
        if isinstance(error, OSError) and not isinstance(error, HydraException):
            return _say(f"error: cannot write the run's folder: {error}", FAILED)
        if wants_traceback:
            traceback.print_exc()
        return _say(f"error: {explain(error)}", INVALID)
    return OK


def _interrupted(invocation: Invocation) -> int:
    """A run and a sweep have said so themselves."""
    if invocation.exit_code == OK and not (invocation.sweep and invocation.sweep.interrupted):
        say("interrupted")
    return INTERRUPTED


def _one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Instead of Hydra's usage, which names none of our settings."""
    raise ValueError(f"{message}; {HELP}")


@contextmanager
def _hydra_process_state(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv through argparse, and raises (rather than prints and exits) only where HYDRA_FULL_ERROR is set."""
    argv, full, usage = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), argparse.ArgumentParser.error
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["moeexp", *arguments], "1"
    argparse.ArgumentParser.error = _one_line  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sys.argv, argparse.ArgumentParser.error = argv, usage  # type: ignore[method-assign]
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _task(cfg: DictConfig, invocation: Invocation) -> float:
    """A single run, called by Hydra, or one job of a sweep under another launcher than ours. Returns its
    objective, for a sweeper that searches. Raises KeyboardInterrupt only, which ends such a sweep; the rest is in the
    record."""
    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    sweep = settings.mode == RunMode.MULTIRUN
    if cfg.dry_run:
        raise ValueError("dry_run=true lists what a sweep would run by our own launcher: leave hydra/launcher out")
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    job = Job(
        id=f"{invocation.id}.{settings.job.num}" if sweep else invocation.id,
        run_dir=str(run_dir),
        config=config,
        overrides=list(settings.overrides.task),
        command=invocation.command,
        sweep=sweep,
        group=f"{run_dir.parent.parent.name}/{run_dir.parent.name}" if sweep else None,
    )
    invocation.running = True
    invocation.exit_code = max(invocation.exit_code, run_job(job, cfg, invocation.experiment))
    invocation.running = False
    if invocation.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    return objective_of(run_dir / "record.json") if sweep else 0.0


def _say(line: str, code: int) -> int:
    say(line)
    return code
