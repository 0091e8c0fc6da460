"""The cells of a sweep: what each would run, whether it may, and whether it has run before."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from moeexp.config import memory_need, resolve, schema
from moeexp.config.override_text import as_typed
from moeexp.record import free_memory, renamed
from moeexp.record.gpus import Gpu
from moeexp.report import records
from moeexp.run.identity import Identities, config_hash
from moeexp.stack.artifact_config import adopt
from moeexp.stack.digests import ShowProgress, unseen
from moeexp.sweep.history import Earlier, History, runs_again


@dataclass
class Cell:
    """`refusal` is None for a config that may run; only that one has a hash."""

    number: int
    overrides: list[str]
    design: dict[str, Any] | None
    given: schema.Config
    config: schema.Config | None = None  # resolved
    refusal: ValueError | None = None
    config_hash: str | None = None
    earlier: Earlier | None = None
    again: bool = True
    record: Path | None = None  # where its result is, once known
    title: str = ""


class Composer:
    """Hydra's composition of one config per job, with the part that choices of groups decide kept: a sweep has few of
    those, and composing anew takes 90 ms, where setting values in a copy takes 5."""

    def __init__(self, loader: ConfigLoaderImpl, master: DictConfig):
        self.loader, self.master = loader, master
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._groups: dict[str, bool] = {}
        self._parse = functools.cache(lambda text: OverridesParser.create().parse_overrides([as_typed(text)])[0])

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The task's config without Hydra's node. Raises what Hydra raises."""
        base, values = self._split(overrides)
        config = copy.deepcopy(base)
        try:
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except OmegaConfBaseException as error:  # as Hydra's own composition reports it
            raise ConfigCompositionException(str(error)) from error
        return config

    def config(self, overrides: Sequence[str]) -> schema.Config:
        return schema.to_config(self.compose(overrides))

    def _split(self, overrides: Sequence[str]) -> tuple[DictConfig, list[Override]]:
        parsed = [self._parse(text) for text in overrides]
        groups = tuple(override.input_line or "" for override in parsed if not self._is_value(override))
        if groups not in self._bases:
            composed = self.loader.load_sweep_config(self.master, list(groups))
            with open_dict(composed):
                del composed["hydra"]
            self._bases[groups] = composed
        return self._bases[groups], [override for override in parsed if self._is_value(override)]

    def subdir(self, overrides: Sequence[str], number: int) -> str:
        """`hydra.sweep.subdir` of one job, in full."""
        sweep: Any = OmegaConf.to_container(self.master.hydra.sweep, resolve=False)
        if sweep["subdir"] == "${hydra.job.num}":
            return str(number)
        config = self.loader.load_sweep_config(self.master, list(map(as_typed, overrides)))
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        return str(config.hydra.sweep.subdir)

    def _is_value(self, override: Override) -> bool:
        return override.package is None and not self._is_group(override.key_or_group)

    def _is_group(self, key: str) -> bool:
        # `hydra.*` values belong to the base too: they decide where things are written.
        if key not in self._groups:
            self._groups[key] = key.startswith("hydra") or self.loader.repository.group_exists(key)
        return self._groups[key]


def cells_of(composer: Composer, jobs: Sequence[Sequence[str]], first: int) -> list[Cell]:
    """One cell per job, or those of the design that a job's config holds in `launcher.cells`. `ValueError` for a
    design that cannot be read; what cannot be composed raises what Hydra raises."""
    cells: list[Cell] = []
    for job in jobs:
        given = composer.config(job)
        if not given.launcher.cells:
            cells.append(Cell(first + len(cells), list(job), None, given))
            continue
        for overrides, design in _design(given.launcher, job):
            cells.append(Cell(first + len(cells), overrides, design, composer.config(overrides)))
    counts = collections.Counter(text for cell in cells for text in set(cell.overrides))
    for cell in cells:
        # What tells it from the others; all that it sets, where there are no others.
        own = [text for text in cell.overrides if counts[text] < len(cells)]
        cell.title = cell.design["cell"] if cell.design else " ".join(map(_shown, own or cell.overrides)) or "(defaults)"
    return cells


def _design(launcher: schema.LauncherConfig, job: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """A design's cells with their overrides. What a cell sets goes before what the command line sets: it is the axis."""
    names = [cell.name for cell in launcher.cells]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"launcher.cells has two cells named {name!r}: every cell needs a name of its own")
    wanted = _wanted(names, launcher.only)
    for index, cell in enumerate(launcher.cells):
        if index in wanted:
            keys = {text.partition("=")[0].lstrip("+~") for text in cell.set}
            kept = [text for text in job if text.partition("=")[0].lstrip("+~") not in keys]
            # Emptied, so that these overrides alone compose this cell again.
            yield [*kept, *cell.set, "launcher.cells=[]"], {"name": launcher.design, "cell": cell.name, "index": index}


def _shown(override: str) -> str:
    key, is_set, value = override.partition("=")
    return key + is_set + records.unescaped(value)


def _wanted(names: list[str], only: Any) -> set[int]:
    """`only`: numbers and names, or a single one without brackets; none is all."""
    choices = [str(choice) for choice in (only if isinstance(only, list) else [] if only is None else [only])]
    if not choices:
        return set(range(len(names)))
    by_name = {name: index for index, name in enumerate(names)} | {str(index): index for index in range(len(names))}
    for choice in choices:
        if renamed.CELLS.get(choice) in by_name:
            now = renamed.CELLS[choice]
            raise ValueError(f"launcher.only={choice}: that cell is now named {now}: write launcher.only=[{now}]")
        if choice not in by_name:
            listed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
            raise ValueError(f"launcher.only={choice} is not a cell of the design; allowed: {listed}")
    return {by_name[choice] for choice in choices}


def judge(
    cells: Sequence[Cell], *, gpus: Sequence[Gpu], history: History, fingerprint: str, rerun: str, at_once: int = 1,
    progress: ShowProgress = unseen,
) -> None:  # fmt: skip
    """Validates and resolves each cell, as the process that runs it will beside `at_once` - 1 others, and looks up what it has
    been before. Fills the cells."""
    identities = Identities(progress)
    available = functools.cache(lambda device: free_memory.of_host() if device == "cpu" else free_memory.of_gpus(gpus))
    for cell in cells:
        try:
            given = adopt(cell.given, cell.overrides, progress)
            cell.config = resolve.resolved(given, cuda_available=bool(gpus), at_once=at_once)
            memory_need.check_fits(cell.config, available)
            gpu = gpus[0].name if cell.config.device == "cuda" else None
            cell.config_hash = config_hash(cell.config, identities.of(cell.config, gpu=gpu))
        except ValueError as refusal:
            cell.refusal = refusal
            continue
        cell.earlier = history.latest(cell.config_hash, fingerprint)
        cell.again = runs_again(cell.earlier, rerun)
