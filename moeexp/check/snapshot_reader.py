"""A snapshot's tensors as transformers itself finds them: its rules for names, slices, experts and ties, not ours.

transformers' loader fills a model on the meta device a few parameters at a time, which are given up before the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moeexp.check.pure_torch import eager
from moeexp.model.checkpoint import open_shards

# Of the parameters that are in memory at one time, unless a single one has more.
BATCH_ELEMENTS = 2**27


class SnapshotReader:
    """Parameters of `Qwen3_5MoeForCausalLM` by their names there, e.g. `model.layers.0.mlp.experts.gate_up_proj`.

    `missing`: parameters that the snapshot has nothing for, ties counted; `unused`: its tensors that transformers would
    warn of."""

    def __init__(self, folder: Path, config: Any):
        from transformers import Qwen3_5MoeForCausalLM

        self._load = _loader()
        with torch.device("meta"):
            self._model = Qwen3_5MoeForCausalLM(eager(config))
        self._mapping = self._load.mapping(self._model)
        self._slices = {key: handle.get_slice(key) for handle in open_shards(folder).values() for key in handle.keys()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self._sources: dict[str, list[str]] = {}  # parameter -> the tensors that make it up
        unused = self._find_sources()
        ties = self._model.get_expanded_tied_weights_keys(all_submodels=True)
        self._tied = ties | {source: target for target, source in ties.items()}  # whichever of the two is there counts
        self.missing = [name for name in self.shapes if self._home(name) not in self._sources]
        ignored = self._model._keys_to_ignore_on_load_unexpected or []
        self.unused = [key for key in unused if not any(re.search(pattern, key) for pattern in ignored)]

    def _find_sources(self) -> list[str]:
        """Sorts the snapshot's tensors by the parameter that transformers renames them to; returns the others."""
        unused = []
        renamings = [entry for entry in self._mapping if isinstance(entry, self._load.renaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, self._load.converter)]
        for key in self._slices:
            name, _ = self._load.rename(key, renamings, converters, self._model.base_model_prefix, self.shapes)
            name = key if name not in self.shapes and key in self.shapes else name
            if name in self.shapes:
                self._sources.setdefault(name, []).append(key)
            else:
                unused.append(key)
        return unused

    def _home(self, name: str) -> str:
        return name if name in self._sources else self._tied.get(name, name)

    def read(self, names: list[str], device: torch.device) -> Iterator[tuple[str, Tensor | None]]:
        """Parameters in the snapshot's own dtype on `device`, a few at a time; None where its tensors do not make one up."""
        batch: list[str] = []
        for name in names:
            if sum(math.prod(self.shapes[other]) for other in (*batch, name)) > BATCH_ELEMENTS and batch:
                yield from self._read(batch, device).items()
                batch = []
            batch.append(name)
        yield from self._read(batch, device).items()

    def _read(self, names: list[str], device: torch.device) -> dict[str, Tensor | None]:
        slices: dict[str, Any] = {}
        places = {name: self._place(self._home(name)) for name in names}
        empty = {place: _parameter(*place) for place in places.values()}
        try:
            for name, (owner, leaf) in places.items():
                parts = {key: self._slices[key] for key in self._sources[self._home(name)]}
                slices |= parts
                like = _parameter(owner, leaf).to(_dtype(next(iter(parts.values()))))  # else the loader would cast
                owner._parameters[leaf] = nn.Parameter(like, requires_grad=False)
            settings = self._load.settings(dtype=torch.float32, device_map={"": device}, weight_mapping=self._mapping)
            with _no_bar():
                self._load.load(self._model, slices, settings)
            found = {name: _parameter(owner, leaf).detach() for name, (owner, leaf) in places.items()}
        finally:
            for (owner, leaf), parameter in empty.items():
                owner._parameters[leaf] = parameter
        return {name: None if tensor.is_meta else tensor for name, tensor in found.items()}

    def _place(self, name: str) -> tuple[nn.Module, str]:
        return self._model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]


def _parameter(owner: nn.Module, leaf: str) -> nn.Parameter:
    parameter = owner._parameters[leaf]
    assert parameter is not None, f"{leaf} is no parameter"
    return parameter


def _dtype(stored: Any) -> torch.dtype:
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    if stored.get_dtype() not in names:
        raise ValueError(f"the snapshot holds tensors of type {stored.get_dtype()}; supported: {', '.join(names)}")
    return names[stored.get_dtype()]


def _loader() -> SimpleNamespace:
    """transformers' own functions that load a checkpoint; `RuntimeError` where this version has others."""
    import transformers

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            convert_and_load_state_dict_in_model,
            rename_source_key,
        )
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError as error:
        raise RuntimeError(
            f"transformers {transformers.__version__} loads checkpoints by other functions than are known here ({error}): "
            "use a tested version (5.17 to 5.23)"
        ) from error
    return SimpleNamespace(
        mapping=get_model_conversion_mapping, converter=WeightConverter, renaming=WeightRenaming,
        rename=rename_source_key, load=convert_and_load_state_dict_in_model, settings=LoadStateDictConfig,
    )  # fmt: skip


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' loader draws a progress bar for each call."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
