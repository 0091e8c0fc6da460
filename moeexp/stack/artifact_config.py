"""`artifact=DIR`: the config of the run takes over what the artifact was made with, and refuses what differs from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from moeexp.config.axes import FIXED, get
from moeexp.config.compose import compose
from moeexp.config.schema import Config, ModelConfig, OpsConfig, QuantConfig
from moeexp.record.paths import expanded
from moeexp.stack.digests import ShowProgress, unseen


def adopt(cfg: Config, overrides: Sequence[str] = (), progress: ShowProgress = unseen) -> Config:
    """`cfg` with every field of `FIXED` as the artifact has it; unchanged without `artifact`.

    `ValueError` for a field that `overrides` or a recipe set to something else, and for an artifact that is damaged, a
    stranger's or made for another machine. `overrides` tells a value that was asked for from a default that it happens to
    equal. Whose it is and whether it is whole is known before any op that it names is imported."""
    if cfg.artifact is None:
        return cfg
    from moeexp.stack import artifact_key, artifact_manifest

    folder = Path(os.path.realpath(expanded(cfg.artifact)))
    manifest = artifact_manifest.read_manifest(folder)
    artifact_key.check(folder, manifest, trusted=cfg.artifact_trust)
    made = manifest["config"]
    default = _defaults()
    named = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    # Compiled into the kernels of a CPU, and into nothing of a GPU's.
    paths = [path for path in FIXED if path != "threads" or made["device"] == "cpu"]
    for path in paths:
        wish, has = get(cfg, path), get(made, path)
        asked = wish != get(default, path) or any(path == name or path.startswith(f"{name}.") for name in named)
        if asked and wish not in (None, "auto") and not _agree(path, wish, has):
            raise ValueError(
                f"{path}={_show(wish)} is not what artifact={cfg.artifact} was made with ({_show(has)}): "
                "leave it out, or export another artifact"
            )
    padded = _padded(cfg, made, asked=cfg.cuda_graph != default.cuda_graph or "cuda_graph" in named)
    artifact_manifest.check_integrity(folder, manifest, progress)
    artifact_manifest.check_runnable(folder, manifest)
    model = ModelConfig(**made["model"])
    if manifest["model"]["weights"]:
        model = replace(model, weights=str(folder / "model"))
    if manifest["model"]["heldout"] and model.heldout != "shipped":
        model = replace(model, heldout=str(folder / "model" / "heldout.txt"))
    fixed = {path: made[path] for path in paths if path in made}
    ops = OpsConfig(**made["ops"] | {"sample": cfg.ops.sample})
    return replace(cfg, artifact=str(folder), model=model, quant=QuantConfig(**made["quant"]), ops=ops, **fixed | padded)


def _padded(cfg: Config, made: dict[str, Any], *, asked: bool) -> dict[str, Any]:
    """Graphs of prompts need a prefill method that takes padding, and only they call one; other graphs are free."""
    if (cfg.cuda_graph == "all") == (made["cuda_graph"] == "all"):
        return {}
    if made["cuda_graph"] == "all" and not asked:
        return {"cuda_graph": "all"}
    raise ValueError(
        f"cuda_graph={_show(cfg.cuda_graph).lower()} with artifact={cfg.artifact}, which was made for "
        f"cuda_graph={_show(made['cuda_graph']).lower()}: `all` has a prefill method of its own; export another artifact"
    )


def _agree(path: str, wish: Any, has: Any) -> bool:
    if path == "model.architecture":
        from moeexp.config.architecture import Architecture

        return Architecture.from_hf(wish) == Architecture.from_hf(has)
    return sorted(wish) == sorted(has) if isinstance(wish, list) else wish == has


@cache
def _defaults() -> Config:
    return compose()


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
