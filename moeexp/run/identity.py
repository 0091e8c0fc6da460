"""What a run measures, for whoever asks whether it was measured before: settings, contents of files, code, software, device.

A record's `identity` says which weights, held-out text, tokenizer and software; its `config_hash` is a digest of that and
of the config. Where a file lies is no part of either: a snapshot is the same through any path or link, and another one in
its place is another.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moeexp.config import axes
from moeexp.config.files import is_inside, read_object
from moeexp.config.schema import Config
from moeexp.record import cpus, environment
from moeexp.record.record import plain
from moeexp.stack.digests import Digests, ShowProgress, unseen
from moeexp.stack.source_files import PACKAGES, files_of

# Of a snapshot: what our loader or transformers reads for the weights.
WEIGHTS = re.compile(r"\.safetensors$|\.safetensors\.index\.json$|^(generation_)?config\.json$")
# What a tokenizer may be made of. A file too many costs a repetition, one too few a wrong result.
TOKENIZER = re.compile(r"\.(json|jsonl|txt|model|jinja|tiktoken|bpe|vocab)$")
# Beside those of torch itself: what quantises, tokenises and computes references and the baseline.
DISTRIBUTIONS = ("torch", "triton", "hqq", "transformers", "tokenizers")


class Identities:
    """Looks at a file once, and asks for a driver once: of the thousands of cells of a sweep most read the same ones."""

    def __init__(self, progress: ShowProgress = unseen):
        self._progress = progress
        self._digests = Digests()
        self._seen: dict[Any, Any] = {}

    def of(self, cfg: Config, *, gpu: str | None) -> dict[str, Any]:
        """{weights, heldout, tokenizer, software} of a resolved config on the GPU of that name. `ValueError` for a file that
        cannot be read."""
        return self.files(cfg) | {"software": self._once(("software", cfg.device, cfg.allocator, gpu), software, cfg, gpu)}

    def files(self, cfg: Config) -> dict[str, Any]:
        from moeexp.config.sources import heldout_file, weights_folder

        folder = weights_folder(cfg.model)
        heldout = heldout_file(cfg.model) if cfg.eval_bytes and folder is not None else None
        if cfg.artifact is not None:
            found = self._once(("artifact", cfg.artifact), self._of_artifact, Path(cfg.artifact))
        elif folder is None:
            found = {"weights": {"seed": cfg.model.seed}, "tokenizer": None}
        else:
            own = cfg.model.tokenizer == "auto"
            found = {
                "weights": self._once(("weights", folder), self._contents, folder, lambda: weight_files(folder)),
                "tokenizer": self._once(("tokenizer", folder), self._tokenizer, folder) if own else None,
            }
        text = None if heldout is None else self._once(("text", heldout), lambda: self._digests.of([heldout])[0])
        return {"weights": found["weights"], "heldout": text, "tokenizer": found["tokenizer"]}

    def _tokenizer(self, folder: Path) -> str:
        return self._contents(folder, lambda: tokenizer_files(folder))["sha256"]

    def _of_artifact(self, folder: Path) -> dict[str, Any]:
        """What its weights were made from, as its manifest says, and the files that it holds now."""
        from moeexp.stack.artifact_manifest import read_manifest

        manifest = read_manifest(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        made_from = manifest["identity"]
        return made_from | {"weights": made_from["weights"] | {"artifact": self._contents(folder, lambda: files)["sha256"]}}

    def _contents(self, folder: Path, files: Callable[[], list[Path]]) -> dict[str, Any]:
        """{sha256, files, bytes}; the digest is over names in the folder and contents."""
        paths = sorted(files())
        digests = self._digests.of(paths, self._progress)
        named = [f"{os.path.relpath(path, folder)} {one}" for path, one in zip(paths, digests, strict=True)]
        total = hashlib.sha256("\n".join(named).encode()).hexdigest()
        return {"sha256": total, "files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}

    def _once(self, key: tuple, make: Callable[..., Any], *arguments: Any) -> Any:
        if key not in self._seen:
            self._seen[key] = make(*arguments)
        return self._seen[key]


def weight_files(folder: Path) -> list[Path]:
    """Those of the folder, and what its index names elsewhere. What is missing or damaged the loader refuses, not we."""
    found = {path for path in folder.iterdir() if WEIGHTS.search(path.name)}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            found |= {folder / name for name in read_object(index)["weight_map"].values() if is_inside(name)}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return [path for path in found if path.is_file()]


def tokenizer_files(folder: Path) -> list[Path]:
    """Templates may lie in a folder of their own."""
    found = [*folder.iterdir(), *folder.glob("*/*.jinja")]
    return [path for path in found if TOKENIZER.search(path.name) and not WEIGHTS.search(path.name) and path.is_file()]


def software(cfg: Config, gpu: str | None) -> dict[str, Any]:
    """What beside the code and its inputs decides a speed: a result is for these alone. The same in a sweep's parent, which
    asks no CUDA, and in its runs."""
    import torch

    from moeexp.stack import allocator
    from moeexp.stack.inductor import compiling

    cuda = cfg.device == "cuda"
    return {
        "python": platform.python_version(),
        **{name: environment.version(name) for name in DISTRIBUTIONS},
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "driver": environment.driver() if cuda else None,
        "allocator": allocator.described(cfg.allocator) if cuda else None,
        "cpu": None if cuda else {"name": cpus.name(), "cores": len(cpus.usable())},
        "compiling": compiling(),
    }


def confirm(cfg: Config, identity: dict[str, Any] | None) -> None:
    """After loading. `RuntimeError` if the files are not those that were looked at before it: what was loaded may be either.
    None where nobody looked, as in an experiment that is called by itself."""
    if identity is None:
        return
    found = Identities().files(cfg)
    changed = [name for name, value in found.items() if plain(value) != identity[name]]
    if changed:
        raise RuntimeError(
            f"{' and '.join(changed)} of model.weights={cfg.model.weights} changed while the run loaded them: run it again"
        )


def config_hash(cfg: Config, identity: dict[str, Any]) -> str:
    """Digest of a resolved config and its identity: two runs with the same one measure the same thing.

    The tracker and how a sweep is run change nothing that is measured. Code that the config names (users' own ops, an
    artifact) counts with its contents, and so do the weights and texts, instead of their paths."""
    values = plain(cfg)
    settings = axes.counted(values)
    model = settings.pop("model")
    parts = {"config": settings, "model": model, "identity": plain(identity), "named": outside_code(values)}
    return _digest([json.dumps(parts, sort_keys=True).encode()])


def outside_code(settings: dict[str, Any]) -> list[str]:
    """Digests of the code that a config (as plain values) names: users' own ops, and the artifact."""
    from moeexp_kernels import user_ops

    own = {op: name for op, name in (settings.get("ops") or {}).items() if name and user_ops.is_user_op(name)}
    found = [f"{op}={name}@{user_ops.digest(name)}" for op, name in sorted(own.items())]
    if settings.get("artifact"):
        from moeexp.stack.artifact_manifest import read_manifest

        found.append(read_manifest(Path(settings["artifact"]))["sha256"])
    return found


def code_fingerprint() -> str:
    """Digest of every source file and tuning table of the packages, by relative path and content."""
    parts: list[bytes] = []
    for package in PACKAGES:
        for name, path in files_of(package).items():
            parts += [name.encode(), path.read_bytes()]
    return _digest(parts)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
