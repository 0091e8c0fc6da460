"""Hydra's plugins: a launcher that runs each job as a process, and a sweeper that checks a grid's cells quickly.

Any sweeper that Hydra has (Optuna's, for example) works with this launcher.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from moeexp.config.groups import LauncherConfig
from moeexp.config.override_text import as_typed, quoted
from moeexp.record.objective import objective_of
from moeexp.record.paths import expanded
from moeexp.run.job import FAILED, INVALID, say
from moeexp.sweep.cells import Cell, Composer
from moeexp.sweep.sweep import Sweep

# Hydra takes a plugin only from this namespace. `register` makes it lead to this module, so that no such file is needed.
PLUGINS = "hydra_plugins.moeexp"


class ProcessLauncher(Launcher):
    __module__ = PLUGINS

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.invocation = config, task_function.invocation  # type: ignore[attr-defined]
        loader = hydra_context.config_loader
        assert isinstance(loader, ConfigLoaderImpl)  # the only one that Hydra has
        self.composer = Composer(loader, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        invocation = self.invocation
        if invocation.sweep is None:
            directory = Path(str(self.config.hydra.sweep.dir))
            invocation.sweep = Sweep(invocation.id, invocation.command, invocation.experiment, directory)
        if invocation.sweep.stopped:  # in an earlier batch, by launcher.fail_fast
            raise SystemExit(FAILED)
        cells = invocation.sweep.plan(self.composer, job_overrides, initial_job_idx)
        invocation.running = True
        invocation.sweep.run(self.composer, cells)
        invocation.running = False
        if invocation.sweep.dry_run:
            _remove_if_unused(invocation.sweep.directory)
        if invocation.sweep.interrupted:
            raise KeyboardInterrupt
        return [self._returned(cell) for cell in cells]

    def _returned(self, cell: Cell) -> JobReturn:
        """With what a sweeper that searches maximises."""
        result = JobReturn(overrides=list(cell.overrides), status=JobStatus.COMPLETED)
        result.return_value = 0.0 if cell.record is None else objective_of(cell.record)
        return result


def _remove_if_unused(sweep: Path) -> None:
    """The sweeper makes the folder, whether anything runs or not."""
    if [path.name for path in sweep.iterdir()] == ["multirun.yaml"]:
        (sweep / "multirun.yaml").unlink()
        sweep.rmdir()


class GridSweeper(Sweeper):
    """The grid of Hydra's own sweeper, without composing every cell in full only to see whether it can be: the launcher
    composes them all before the first one runs, and faster."""

    __module__ = PLUGINS

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None):
        self.max_batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        # Not above: Hydra's scan for plugins loads that module again, which makes another class of it.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        assert self.config is not None and self.launcher is not None, "Hydra calls setup first"
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        given = [as_typed(override, sweep=True) for override in given]
        batches = BasicSweeper.split_arguments(parser.parse_overrides(given), self.max_batch_size)
        directory = Path(str(self.config.hydra.sweep.dir))
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, directory / "multirun.yaml")
        returned: list[Sequence[JobReturn]] = []
        for batch in batches:
            returned.append(self.launcher.launch(batch, initial_job_idx=sum(map(len, returned))))
        return returned


class BeforeAnything(Callback):
    """`~` in `hydra.run.dir` and `hydra.sweep.dir`, wherever they were set, before Hydra makes the folders. SystemExit, as
    Hydra makes a warning of what an Exception says."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if config.dry_run:
            say("error: dry_run=true lists what a sweep would run, and hydra.mode=RUN is none: leave hydra.mode out")
            raise SystemExit(INVALID)
        self._expand(config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self._expand(config)

    def _expand(self, config: DictConfig) -> None:
        for name in ("run", "sweep"):
            given = str(config.hydra[name].dir)
            try:
                folder = str(expanded(given))
            except ValueError as error:
                say(f"error: {error}")
                raise SystemExit(INVALID) from error
            if folder != given:
                with open_dict(config.hydra):
                    config.hydra[name].dir = folder
                    # Whoever composes the config again, as launchers do for each job, begins from this list.
                    config.hydra.overrides.hydra.append(f"hydra.{name}.dir={quoted(folder)}")


def mode(*, _root_: DictConfig) -> str | None:
    """Hydra's mode of a composed config that names none: what only a sweep can do (a list of what would run, a time limit, a
    GPU of one's own, …) makes a single run a sweep of one."""
    given = [override.lstrip("+") for override in _root_.hydra.overrides.task]
    asked = any(override.startswith(("launcher.", "launcher=")) for override in given)
    default = OmegaConf.structured(LauncherConfig)
    return "MULTIRUN" if _root_.dry_run or asked or _root_.launcher != default else None


@dataclass
class LauncherConf:
    _target_: str = f"{PLUGINS}.ProcessLauncher"


@dataclass
class SweeperConf:
    _target_: str = f"{PLUGINS}.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


def register() -> None:
    """Make both Hydra's defaults, which are named `basic`. Idempotent.

    By that name, because an `override hydra/sweeper: …` in config.yaml would silently win over the one of an experiment
    that brings its own sweeper."""
    _enter_namespace()
    for plugin in (ProcessLauncher, GridSweeper):
        Plugins.instance().register(plugin)
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="basic", node=LauncherConf, provider="moeexp")
    store.store(group="hydra/sweeper", name="basic", node=SweeperConf, provider="moeexp")


def _enter_namespace() -> None:
    """`hydra_plugins.moeexp` is this module, beside whatever plugins are installed there."""
    package, _, name = PLUGINS.partition(".")
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        # A package without files: Hydra looks into it for more plugins and finds none.
        sys.modules[package] = importlib.util.module_from_spec(ModuleSpec(package, None, is_package=True))
    setattr(importlib.import_module(package), name, sys.modules[__name__])
    sys.modules[PLUGINS] = sys.modules[__name__]
