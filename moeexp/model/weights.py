"""Fills a model's buffers from a Hugging Face snapshot or from a seed, quantising each as it comes.

A buffer of `Qwen35MoE` is assembled from one or more *pieces* (checkpoint tensors stacked by rows). The piece table is
the single place that knows both naming schemes: the loader reads it forwards, `DequantisedWeights` backwards. The check
does not take it on trust: `moeexp.check.weight_agreement` compares what came of it with what transformers' own loader finds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.config.quantisation import check_skip, kind_of
from moeexp.model.checkpoint import Snapshot
from moeexp.model.quantise import quantise
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.model.rope import inverse_frequencies


class Random:
    """Well-conditioned weights from a seed, drawn on the device where they will live: activations stay of order one
    through any depth, decays spread over short and long memories, routing is near uniform with distinct choices."""

    def __init__(self, arch: Architecture, seed: int):
        self.arch, self.seed = arch, seed

    def assemble(self, name: str, buffer: Tensor) -> None:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator(device=buffer.device).manual_seed(seed)
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        if leaf == "a_log":
            buffer.uniform_(1.0, 16.0, generator=generator).log_()
        elif leaf == "dt_bias":
            # Inverse softplus of time steps log-uniform in [1e-3, 1e-1].
            step = buffer.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
            buffer.copy_(step + torch.log(-torch.expm1(-step)))
        elif leaf == "norm" and name.endswith("mixer.norm"):
            buffer.normal_(1.0, 0.1, generator=generator)
        elif leaf.endswith("norm"):
            buffer.normal_(0.0, 0.1, generator=generator)
        else:
            # Outputs into the residual stream are scaled so that L layers add up to order one.
            into_residual = leaf in ("out_proj", "down", "shared_down")
            std = 1.0 if leaf == "embed_tokens" else buffer.shape[-1] ** -0.5
            if into_residual:
                std *= 2.0 / math.sqrt(2 * self.arch.num_hidden_layers)
            buffer.normal_(0.0, std, generator=generator)

    def check_tied_head(self, embedding: Tensor) -> None:
        """Nothing to check: a tied head is drawn once, as the embedding."""


Source = Snapshot | Random


def load(
    arch: Architecture,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    bits: int,
    group_size: int,
    skip: tuple[str, ...],
    on_buffer: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Qwen35MoE:
    """A model whose every buffer is filled exactly once. Each matrix is assembled in `dtype` on `device`, quantised where
    its kind is not in `skip`, and released before the next, so that no unquantised copy of the model ever exists.

    bits 16 leaves all as `dtype`; on_buffer(name, bytes as stored) reports progress."""
    check_skip(skip)
    model = Qwen35MoE(arch, dtype=dtype, device="meta")
    for name, meta in list(model.named_buffers()):
        if name == "inv_freq" or (arch.tie_word_embeddings and name == "head.weight"):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        buffer = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        source.assemble(name, buffer)
        if bits != 16 and kind_of(name) not in (None, *skip):
            buffer, owner.scales = quantise(buffer, bits=bits, group_size=group_size, name=name)
        owner.register_buffer(name.rpartition(".")[2], buffer)
        on_buffer(name, buffer.nbytes)
    if arch.tie_word_embeddings:
        source.check_tied_head(model.embed_tokens.weight)
        model.head.register_buffer("weight", model.embed_tokens.weight)
        if bits != 16 and "head" not in skip:
            stored, scales = quantise(model.head.weight, bits=bits, group_size=group_size, name="head.weight")
            model.head.register_buffer("weight", stored)
            model.head.scales = scales
    model.register_buffer("inv_freq", inverse_frequencies(arch).to(device))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers left without a value: {left}"
    return model


def unfilled(
    arch: Architecture, *, dtype: torch.dtype, device: torch.device, bits: int, group_size: int, skip: tuple[str, ...]
) -> Qwen35MoE:
    """A model with the buffers that `load` leaves, none of which has a value."""
    model = Qwen35MoE(arch, dtype=dtype, device="meta")
    shapes, tied = layout(arch, dtype=dtype, bits=bits, group_size=group_size, skip=skip)
    for name, (shape, kind) in shapes.items():
        model.assign(name, torch.empty(shape, dtype=kind, device=device))
    for name, same_as in tied.items():
        model.assign(name, model.get_buffer(same_as))
    return model


def layout(
    arch: Architecture, *, dtype: torch.dtype, bits: int, group_size: int, skip: tuple[str, ...]
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, str]]:
    """(shape and dtype of every buffer as `load` leaves it, {a tied buffer: the one that it is})."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, buffer in Qwen35MoE(arch, dtype=dtype, device="meta").named_buffers():
        *rows, features = buffer.shape
        if bits == 16 or kind_of(name) in (None, *skip):
            found[name] = tuple(buffer.shape), buffer.dtype
        else:
            found[name] = (*rows, features * bits // 8), torch.uint8
            found[f"{name.removesuffix('weight')}scales"] = (*rows, features // group_size, 2), torch.float16
    tied = arch.tie_word_embeddings and found["head.weight"] == found["embed_tokens.weight"]
    return found, {"head.weight": "embed_tokens.weight"} if tied else {}
