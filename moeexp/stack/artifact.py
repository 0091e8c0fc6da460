"""A portable artifact: a folder with the compiled methods, the weights as they are stored, and a manifest.

    manifest.json       config, methods and their constants, toolchain, digest of every file, digest of itself
    methods/*.pt2       AOTInductor packages without weights (native code: run only what you trust)
    weights/*.safetensors
    model/              config.json and tokenizer of the snapshot, where the weights came from one

`artifact=DIR` runs it: nothing is exported, quantised or read from a snapshot. Its digests find damage, not malice: one that
was not made here by this user is not loaded unless `artifact_trust=true`, see `artifact_key`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeexp.config.files import cut
from moeexp.config.schema import Config
from moeexp.record.text import brief
from moeexp.stack import artifact_key
from moeexp.stack.artifact_manifest import check_integrity, read_manifest

# As safetensors names them -> as torch does, of what an export writes.
TYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "U8": "uint8"}

if TYPE_CHECKING:
    import torch

    from moeexp.model.qwen3_5_moe import Qwen35MoE
    from moeexp.record.phases import Phases
    from moeexp.stack.compile_cache import Artifact


def load_model(cfg: Config, device: torch.device, phases: Phases) -> Qwen35MoE:
    """The model with its stored weights on `device`, after every file's digest, and every tensor's shape and dtype, has been
    compared."""
    import torch

    from moeexp.config.sources import load_architecture
    from moeexp.model.checkpoint import open_shard
    from moeexp.model.qwen3_5_moe import Qwen35MoE

    folder, manifest = _opened(cfg)
    with phases("verify artifact"):
        check_integrity(folder, manifest, phases.progress)
        arch = load_architecture(cfg.model)
        _check_tensors(cfg, folder, manifest)
    model = Qwen35MoE(arch, dtype=getattr(torch, cfg.dtype), device="meta")
    for name in manifest["weights"]:
        file = open_shard(folder / name, device=str(device))
        for key in file.keys():
            # A copy of its own on a CPU: a view of the mapped file is not aligned.
            tensor = file.get_tensor(key)
            model.assign(key, tensor.clone() if device.type == "cpu" else tensor)
    for name, same_as in manifest["tied"].items():
        model.assign(name, model.get_buffer(same_as))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers that the artifact has no value for: {left}"
    return model


def method(cfg: Config, name: str) -> Artifact:
    """A compiled method as the compile cache would return it."""
    from moeexp_runner.binding import TensorSpec

    from moeexp.stack.compile_cache import Artifact

    folder, manifest = _opened(cfg)
    methods = manifest["methods"]
    if name not in methods:
        raise ValueError(f"artifact={folder} holds the methods {', '.join(methods)}, and this run needs {name}")
    entry = methods[name]
    constants = {key: TensorSpec.from_json(spec) for key, spec in entry["constants"].items()}
    return Artifact(entry["key"], folder / entry["file"], constants, cached=True, compile_s=entry["compile_s"])


def _opened(cfg: Config) -> tuple[Path, dict[str, Any]]:
    """The folder and its manifest, one that may be loaded."""
    assert cfg.artifact is not None
    folder = Path(cfg.artifact)
    manifest = read_manifest(folder)
    artifact_key.check(folder, manifest, trusted=cfg.artifact_trust)
    return folder, manifest


def _check_tensors(cfg: Config, folder: Path, manifest: dict[str, Any]) -> None:
    """`ValueError` unless the files hold what the config's model has, and its methods ask for no more. Of the weights the
    headers are read."""
    import torch

    from moeexp.config.sources import load_architecture
    from moeexp.model.checkpoint import open_shard
    from moeexp.model.qwen3_5_moe import state_shapes
    from moeexp.model.weights import layout

    arch, dtype = load_architecture(cfg.model), getattr(torch, cfg.dtype)
    group_size, skip = cfg.quant.group_size or 0, tuple(cfg.quant.skip)
    wanted, tied = layout(arch, dtype=dtype, bits=cfg.quant.bits, group_size=group_size, skip=skip)
    found: dict[str, tuple[tuple[int, ...], torch.dtype | str]] = {}
    problems = []
    for file in (open_shard(folder / name) for name in manifest["weights"]):
        for key in file.keys():
            problems += [f"{brief(key)} occurs twice"] * (key in found)
            stored = file.get_slice(key)
            kind = stored.get_dtype()
            found[key] = tuple(stored.get_shape()), getattr(torch, TYPES.get(kind, ""), kind)
    problems += [f"{brief(name)} has no value" for name in sorted(wanted.keys() - found.keys() - tied.keys())]
    problems += [
        f"{brief(name)} belongs to no such model" for name in sorted(found.keys() - wanted.keys() | found.keys() & tied.keys())
    ]
    problems += [
        f"{name} is {_shown(*found[name])} and should be {_shown(*wanted[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    problems += ["other tensors are tied"] * (manifest["tied"] != tied)
    known = wanted | state_shapes(arch, batch=cfg.batch, max_seq_len=cfg.max_seq_len, dtype=dtype)
    for name, entry in manifest["methods"].items():
        for key, spec in entry["constants"].items():
            if _shown(spec["shape"], spec["dtype"]) != _shown(*known.get(key.removeprefix("model."), ((), ""))):
                problems.append(f"{name} asks for {brief(key)}, {_shown(spec['shape'], cut(spec['dtype'], 20))}")
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"artifact={folder} does not fit its config: {problems[0]}{more}; export it again")


def _shown(shape: Sequence[int], dtype: Any) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
