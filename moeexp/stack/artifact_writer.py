"""Writes an artifact."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeexp import __version__
from moeexp.config.schema import Config
from moeexp.record.record import plain
from moeexp.stack import artifact_key
from moeexp.stack.artifact_manifest import MANIFEST, VERSION, here, seal
from moeexp.stack.source_files import file_digest

if TYPE_CHECKING:
    from moeexp.stack.factory import Stack


SHARD_BYTES = 4 << 30
# What of a snapshot a run needs beside its weights.
MODEL_FILES = re.compile(
    r"^(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)"
    r"\.(json|txt|model|jinja)$"
)


def write(out: Path, cfg: Config, stack: Stack, *, made_in_s: dict[str, float], identity: dict[str, Any]) -> dict[str, Any]:
    """Writes the artifact of a stack of compiled methods and returns its manifest. `out` appears whole or not at all.
    `identity`: {weights, tokenizer} that it is made from."""
    from moeexp_kernels import registry

    from moeexp.stack.compile_cache import toolchain

    artifact_key.prepare()
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "methods").mkdir(parents=True)
    try:
        methods = {}
        for name, compiled in stack.artifacts.items():
            file = f"methods/{name}.pt2"
            shutil.copyfile(compiled.package, scratch / file)
            methods[name] = {
                "file": file,
                "key": compiled.key,
                "constants": {key: asdict(spec) for key, spec in compiled.constants.items()},
                "compile_s": compiled.compile_s,
            }
        tied, weights = _write_weights(scratch, stack)
        copied = _copy_model_files(scratch, cfg)
        names = {op: name for op, name in stack.ops.items() if op != "sample"}
        manifest = {
            "version": VERSION,
            "moeexp": __version__,
            "config": plain(cfg),
            "runs_on": here(cfg.device),
            "toolchain": toolchain(cfg.device),
            "ops": registry.identities(names),
            "methods": methods,
            "weights": weights,
            "tied": tied,
            "model": copied,
            "identity": {key: identity[key] for key in ("weights", "tokenizer")},
            "made_in_s": made_in_s,
            "files": {
                path.relative_to(scratch).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
                for path in sorted(scratch.rglob("*"))
                if path.is_file()
            },
        }
        manifest = json.loads(json.dumps(manifest))
        manifest |= {"sha256": seal(manifest)}
        manifest |= {"made_by": artifact_key.code(manifest)}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _write_weights(scratch: Path, stack: Stack) -> tuple[dict[str, str], list[str]]:
    """Every buffer but state, in files of at most `SHARD_BYTES` (one tensor may be larger), each tensor once."""
    from safetensors.torch import save_file

    from moeexp.model.qwen3_5_moe import state_shapes

    state = state_shapes(stack.arch, batch=1, max_seq_len=1, dtype=stack.model.embed_tokens.weight.dtype)
    (scratch / "weights").mkdir()
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    files: list[str] = []
    shard: dict[str, Any] = {}

    def flush() -> None:
        if shard:
            files.append(f"weights/{len(files):05}.safetensors")
            save_file(shard, scratch / files[-1])
            shard.clear()

    for name, buffer in stack.model.named_buffers(remove_duplicate=False):
        if name in state:
            continue
        first = owner.setdefault(buffer.data_ptr(), name)
        if first != name:
            tied[name] = first
            continue
        if sum(tensor.nbytes for tensor in shard.values()) + buffer.nbytes > SHARD_BYTES:
            flush()
        shard[name] = buffer
    flush()
    return tied, files


def _copy_model_files(scratch: Path, cfg: Config) -> dict[str, Any]:
    """{weights, heldout}: whether `model/` stands for the snapshot, and the held-out text's name in it, if it has one."""
    from moeexp.config.sources import heldout_file, weights_folder

    folder, heldout = weights_folder(cfg.model), heldout_file(cfg.model)
    target = scratch / "model"
    target.mkdir()
    if folder is not None:
        for path in folder.iterdir():
            if path.is_file() and MODEL_FILES.match(path.name):
                shutil.copyfile(path, target / path.name)
    if heldout is not None:
        shutil.copyfile(heldout, target / "heldout.txt")
    return {"weights": folder is not None, "heldout": heldout is not None}
