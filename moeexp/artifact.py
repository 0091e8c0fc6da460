"""A portable artifact: a folder with the compiled methods, the weights as they are stored, and a manifest.

    manifest.json       config, methods and their constants, toolchain, digest of every file, digest of itself
    methods/*.pt2       AOTInductor packages without weights (native code: run only what you trust)
    weights/*.safetensors
    model/              config.json and tokenizer of the snapshot, where the weights came from one

`artifact=DIR` runs it: nothing is exported, quantised or read from a snapshot. The digests find damage, not malice.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeexp import __version__
from moeexp.record import plain
from moeexp.schema import Config

if TYPE_CHECKING:
    import torch

    from moeexp.compile_cache import Artifact
    from moeexp.factory import Stack
    from moeexp.model import Qwen35MoE
    from moeexp.phases import Phases

VERSION = 3  # 2: without `threads` in the config and the identity of what it was made from; 1: without l2_prefetch
MANIFEST = "manifest.json"
SHARD_BYTES = 4 << 30
# What of a snapshot a run needs beside its weights.
MODEL_FILES = re.compile(
    r"^(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)"
    r"\.(json|txt|model|jinja)$"
)
# Instruction sets: Inductor compiles for the very CPU that it runs on.
CPU_FLAGS = re.compile(r"^(sse|ssse|avx|fma|bmi|f16c|amx|vaes|vpclmul|pclmul|gfni|adx|sha_ni|movbe|popcnt|aes|abm)")


def here(device: str) -> dict[str, Any]:
    """What compiled code asks of the machine that runs it; `device` is `cpu` or `cuda`."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "cpu_flags": _cpu_flags()}
    if device == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        found |= {"cuda": torch.version.cuda, "gpu_arch": "sm_{}{}".format(*capability) if capability else None}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own digest fits. `ValueError` for a folder that is no artifact of this version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"artifact={folder} holds no {MANIFEST}: give a folder that `python -m moeexp.export` wrote")
    try:
        manifest = json.loads(path.read_text())
        sealed, version = manifest.pop("sha256"), manifest["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} cannot be read; export it again") from error
    if sealed != _seal(manifest):
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} does not fit its own digest; export it again")
    if version != VERSION:
        raise ValueError(f"artifact={folder} has version {version}, this moeexp reads {VERSION}; export it again")
    return manifest | {"sha256": sealed}


def check_runnable(folder: Path, manifest: dict[str, Any]) -> None:
    """`ValueError` if this machine, torch or a user's op is not what the methods were compiled for."""
    from moeexp_kernels import registry

    device = manifest["config"]["device"]
    made, now = manifest["runs_on"], here(device)
    for key, value in made.items():
        if key == "cpu_flags":
            lacking = sorted(set(value) - set(now[key]))
            if lacking:
                names = ", ".join(lacking[:4])
                raise ValueError(f"artifact={folder} was made for a CPU with {names}, which this one lacks; export here")
        elif now[key] != value:
            raise ValueError(f"artifact={folder} was made for {key} {value}, and this is {now[key]}: export it again here")
    settings = manifest["config"]["ops"]
    chosen = {op: name for op, name in settings.items() if op != "default"}
    names = registry.identities(registry.resolve(default=settings["default"], chosen=chosen, device=device))
    other = sorted(op for op, name in manifest["ops"].items() if names.get(op) != name)
    if other:
        raise ValueError(f"artifact={folder} holds another source of ops.{other[0]} than is here now: export it again")


def verify(folder: Path, manifest: dict[str, Any], phases: Phases) -> None:
    """Reads every file once. `ValueError` names what is missing, altered, or not the artifact's."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    expected = manifest["files"]
    problems = [f"{name} is missing" for name in sorted(set(expected) - found)]
    problems += [f"{name} does not belong to it" for name in sorted(found - set(expected))]
    with phases.progress("verify artifact", total=len(expected)) as advance:
        for name in sorted(found & set(expected)):
            if file_digest(folder / name) != expected[name]["sha256"]:
                problems.append(f"{name} is not the file that was written")
            advance(1)
    if problems:
        raise ValueError(f"artifact={folder} is damaged: {'; '.join(problems[:5])}; export it again or copy it anew")


def load_model(cfg: Config, device: torch.device, phases: Phases) -> Qwen35MoE:
    """The model with its stored weights on `device`, after every file's digest has been compared."""
    import torch
    from safetensors import safe_open

    from moeexp.model import Qwen35MoE
    from moeexp.validate import load_architecture

    assert cfg.artifact is not None
    folder = Path(cfg.artifact)
    manifest = read_manifest(folder)
    with phases("verify artifact"):
        verify(folder, manifest, phases)
    model = Qwen35MoE(load_architecture(cfg.model), dtype=getattr(torch, cfg.dtype), device="meta")
    for name in manifest["weights"]:
        with safe_open(folder / name, framework="pt", device=str(device)) as file:
            for key in file.keys():
                # A copy of its own on a CPU: a view of the mapped file is not aligned.
                tensor = file.get_tensor(key)
                _assign(model, key, tensor.clone() if device.type == "cpu" else tensor)
    for name, same_as in manifest["tied"].items():
        _assign(model, name, model.get_buffer(same_as))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that the artifact has no value for: {left}"
    return model


def method(cfg: Config, name: str) -> Artifact:
    """A compiled method as the compile cache would return it."""
    from moeexp_runner.binding import TensorSpec

    from moeexp.compile_cache import Artifact

    assert cfg.artifact is not None
    folder = Path(cfg.artifact)
    methods = read_manifest(folder)["methods"]
    if name not in methods:
        raise ValueError(f"artifact={folder} holds the methods {', '.join(methods)}, and this run needs {name}")
    entry = methods[name]
    constants = {key: TensorSpec.from_json(spec) for key, spec in entry["constants"].items()}
    return Artifact(entry["key"], folder / entry["file"], constants, cached=True, compile_s=entry["compile_s"])


def write(
    out: Path, cfg: Config, stack: Stack, *, made_in_s: dict[str, float], identity: dict[str, Any]
) -> dict[str, Any]:
    """Writes the artifact of a stack of compiled methods and returns its manifest. `out` appears whole or not at all.
    `identity`: {weights, tokenizer} that it is made from."""
    from moeexp_kernels import registry

    from moeexp.compile_cache import toolchain

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
        (scratch / MANIFEST).write_text(json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1) + "\n")
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_weights(scratch: Path, stack: Stack) -> tuple[dict[str, str], list[str]]:
    """Every buffer but state, in files of at most `SHARD_BYTES` (one tensor may be larger), each tensor once."""
    from safetensors.torch import save_file

    from moeexp.model import state_shapes

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
    from moeexp.validate import heldout_file, weights_folder

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


def _assign(model: Qwen35MoE, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_buffer(leaf, tensor)


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _cpu_flags() -> list[str]:
    """The instruction sets of this CPU where Linux tells, else none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if CPU_FLAGS.match(flag))
