"""A portable artifact: a folder with the compiled methods, the weights as they are stored, and a manifest.

    manifest.json       config, methods and their constants, toolchain, digest of every file, digest of itself
    methods/*.pt2       AOTInductor packages without weights (native code: run only what you trust)
    weights/*.safetensors
    model/              config.json and tokenizer of the snapshot, where the weights came from one

`artifact=DIR` runs it: nothing is exported, quantised or read from a snapshot. The digests find damage, not malice.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeexp.config.schema import Config
from moeexp.stack.artifact_manifest import check_integrity, read_manifest

if TYPE_CHECKING:
    import torch

    from moeexp.model.qwen3_5_moe import Qwen35MoE
    from moeexp.record.phases import Phases
    from moeexp.stack.compile_cache import Artifact


def load_model(cfg: Config, device: torch.device, phases: Phases) -> Qwen35MoE:
    """The model with its stored weights on `device`, after every file's digest has been compared."""
    import torch
    from safetensors import safe_open

    from moeexp.config.sources import load_architecture
    from moeexp.model.qwen3_5_moe import Qwen35MoE

    assert cfg.artifact is not None
    folder = Path(cfg.artifact)
    manifest = read_manifest(folder)
    with phases("verify artifact"):
        check_integrity(folder, manifest, phases)
    model = Qwen35MoE(load_architecture(cfg.model), dtype=getattr(torch, cfg.dtype), device="meta")
    for name in manifest["weights"]:
        with safe_open(folder / name, framework="pt", device=str(device)) as file:
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

    assert cfg.artifact is not None
    folder = Path(cfg.artifact)
    methods = read_manifest(folder)["methods"]
    if name not in methods:
        raise ValueError(f"artifact={folder} holds the methods {', '.join(methods)}, and this run needs {name}")
    entry = methods[name]
    constants = {key: TensorSpec.from_json(spec) for key, spec in entry["constants"].items()}
    return Artifact(entry["key"], folder / entry["file"], constants, cached=True, compile_s=entry["compile_s"])
