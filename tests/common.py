"""Small models, Hugging Face snapshots of them, and eager sessions, for the tests of loader and runtime.

Import this before any module of the packages: `kernels_common` has to precede triton.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import kernels_common  # noqa: F401  sets triton's interpreter up
import pytest
import reference_model
import torch
from moeexp_kernels import registry
from moeexp_runner.arena import Arena
from moeexp_runner.sampler import Sampler
from moeexp_runner.session import Session
from safetensors.torch import save_file
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.model.qwen3_5_moe import Qwen35MoE, state_shapes
from moeexp.model.weights import Random, Source, load
from moeexp.stack.methods import MODULES

torch.set_num_threads(1)

# Two layers in which no two sizes agree: odd head counts, one key head for three value heads.
ODD_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "shared_expert_intermediate_size": 36,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "eos_token_id": [3, 60],
}
ODD = Architecture.from_hf(ODD_CONFIG)

# Three layers of sizes that groups of 32 divide.
EVEN = dataclasses.replace(
    reference_model.ARCHITECTURE,
    num_hidden_layers=3,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
)


def transformers_tensors(model, *, layout: str = "fused", prefix: str = "model.") -> dict[str, Tensor]:
    """A transformers model's tensors as a checkpoint names them. layout: "fused" (experts in 3-D tensors) or
    "per_expert"; prefix: "model." or "model.language_model.". A tied head is left out."""
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            if not model.config.tie_word_embeddings:
                tensors[key] = tensor.clone()
            continue
        key = prefix + key.removeprefix("model.")
        base, _, leaf = key.rpartition(".")
        if layout == "fused" or leaf not in ("gate_up_proj", "down_proj"):
            tensors[key] = tensor.clone()
            continue
        for expert, matrix in enumerate(tensor):
            if leaf == "down_proj":
                tensors[f"{base}.{expert}.down_proj.weight"] = matrix.clone()
            else:
                gate, up = matrix.chunk(2)
                tensors[f"{base}.{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{base}.{expert}.up_proj.weight"] = up.clone()
    return tensors


def write_snapshot(folder: Path, arch: Architecture, tensors: dict[str, Tensor], *, shards: int = 0, nested: bool = False):
    """`config.json` and weights; shards 0 is a single file without an index. nested: a multimodal config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "qwen3_5_moe_text", **arch.to_hf()}
    if nested:
        tied = config.pop("tie_word_embeddings")
        config = {"model_type": "qwen3_5_moe", "text_config": config, "vision_config": {}, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


PREFIXES = ("model.", "model.language_model.")
VISION = {
    "model.visual.patch_embed.proj.weight": torch.zeros(4, 3),
    "mtp.fc.weight": torch.zeros(2, 2),
    "mtp.layers.0.mlp.gate.weight": torch.zeros(2, 2),
}


def build_snapshot(
    folder: Path,
    arch: Architecture,
    *,
    layout: str = "fused",
    prefix: str = "model.",
    shards: int = 0,
    tied: bool | None = None,
    vision: bool = False,
    seed: int = 0,
):
    """Writes a random float32 `Qwen3_5MoeForCausalLM` as a snapshot and returns it. vision: with tensors of a vision
    tower and of multi-token prediction, and the config nested as a multimodal one."""
    if tied is not None:
        arch = dataclasses.replace(arch, tie_word_embeddings=tied)
    model = reference_model.build_model(arch, seed)
    tensors = transformers_tensors(model, layout=layout, prefix=prefix)
    write_snapshot(folder, arch, tensors | (VISION if vision else {}), shards=shards, nested=vision)
    return model


def load_model(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bits: int = 16,
    group_size: int = 16,
    skip: tuple[str, ...] = NEVER_QUANTISED,
) -> Qwen35MoE:
    device_ = torch.device(device)
    return load(source.arch, source, dtype=dtype, device=device_, bits=bits, group_size=group_size, skip=skip)


def reference_ops() -> dict[str, Any]:
    names = registry.resolve(default="reference", chosen={}, device="cpu")
    return {op: registry.OPS[op][name] for op, name in names.items()}


def build_session(
    model: Qwen35MoE | Architecture = EVEN,
    *,
    seed: int = 0,
    batch: int = 1,
    max_seq_len: int = 96,
    device: str = "cpu",
    sampler: Sampler | None = None,
    **options,
) -> Session:
    """An eager session of reference ops, with another sampler if given. Several may share a model."""
    if isinstance(model, Architecture):
        model = load_model(Random(model, seed), device=device)
    dtype, where = model.embed_tokens.weight.dtype, model.norm.device
    arena = Arena(state_shapes(model.arch, batch=batch, max_seq_len=max_seq_len, dtype=dtype), device=where)
    ops, own = reference_ops(), {"attached_state": arena.tensors}
    return Session(
        prefill=MODULES["prefill"](model, ops, **own),
        decode=MODULES["decode"](model, ops, **own),
        sample=sampler or Sampler(ops["sample"]),
        arena=arena,
        batch=batch,
        max_seq_len=max_seq_len,
        vocab_size=model.arch.vocab_size,
        device=where,
        **options,
    )


def random_tokens(batch: int, length: int, *, seed: int = 0, vocab: int = 61, device: str = "cpu") -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bitwise: NaN equals NaN."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


def slow_after(count, cases):
    """The first so many cases as they are, the others as slow ones."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] if index >= count else []) for index, case in enumerate(cases)]
