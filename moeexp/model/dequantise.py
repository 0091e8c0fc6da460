"""A model's weights in float32 under transformers' names, one decoder layer at a time: what the reference computes with."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from moeexp_kernels.ops.linear import dequantise
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.model.checkpoint import Piece, pieces
from moeexp.model.qwen3_5_moe import Linear, Qwen35MoE


@dataclass(frozen=True)
class Stored:
    """One tensor under transformers' name as the model holds it: its value, and what was free to be lost on the way to it."""

    value: Tensor  # float32
    dtype: torch.dtype  # of the buffer, or of what was quantised
    scales: Tensor | None = None  # [..., N, K/G, 2] beside value [..., N, K], None where nothing was quantised
    bits: int = 16


class DequantisedWeights:
    """Views of `model`'s own buffers (plain ones) and dequantised copies (quantised ones), float32 on their device."""

    def __init__(self, model: Qwen35MoE):
        self.model = model
        self._places: dict[str, dict[str, tuple[str, Piece]]] = {}  # "layers.0." or "" -> key there -> buffer, piece
        for name, parts in pieces(model.arch).items():
            for piece in parts:
                layer = re.match(r"layers\.\d+\.", piece.key)
                prefix = layer[0] if layer else ""
                self._places.setdefault(prefix, {})[piece.key.removeprefix(prefix)] = name, piece

    def layer(self, index: int) -> dict[str, Tensor]:
        """Keys relative to transformers' decoder layer, e.g. `mlp.experts.gate_up_proj`."""
        return {key: stored.value for key, stored in self.stored(f"layers.{index}.").items()}

    def embedding(self) -> Tensor:
        return self._wide("embed_tokens.weight")

    def final_norm(self) -> Tensor:
        return self.model.norm.float()

    def head(self) -> Tensor:
        return self._wide("head.weight")

    def stored(self, prefix: str) -> dict[str, Stored]:
        """Every tensor of a layer (`layers.3.`), or those of none (the empty prefix): the head among them, also a tied one."""
        places = dict(self._places.get(prefix, {}))
        wide = {name: self._wide(name) for name, _ in places.values()}
        result = {key: self._stored(name, piece, wide[name]) for key, (name, piece) in places.items()}
        if not prefix and "lm_head.weight" not in result:
            head = self.head()
            result["lm_head.weight"] = self._stored("head.weight", Piece("lm_head.weight", head.shape, 0, len(head)), head)
        return result

    def _stored(self, name: str, piece: Piece, wide: Tensor) -> Stored:
        value = wide[piece.start : piece.stop].view(piece.shape)
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, Linear) or owner.scales is None:
            return Stored(value, self.model.get_buffer(name).dtype)
        dtype = self.model.embed_tokens.weight.dtype  # what the matrix was before it was quantised
        return Stored(value, dtype, owner.scales[piece.start : piece.stop], owner.bits)

    def _wide(self, name: str) -> Tensor:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Linear):
            return dequantise(weight=owner.weight, scales=owner.scales, in_features=owner.shape[-1])
        return self.model.get_buffer(name).float()


def as_dtype(model: Qwen35MoE, dtype: torch.dtype) -> Qwen35MoE:
    """A model with the same values: plain matrices cast to `dtype`, quantised ones and float32 vectors shared."""
    arch: Architecture = model.arch
    twin = Qwen35MoE(arch, dtype=dtype, device="meta")
    cast: dict[int, Tensor] = {}  # a tied head stays one tensor

    def convert(tensor: Tensor, like: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == like.dtype:
            return tensor
        return cast.setdefault(tensor.data_ptr(), tensor.to(like.dtype))

    for name, like in list(twin.named_buffers()):
        twin.assign(name, convert(model.get_buffer(name), like))
        if isinstance(owner := twin.get_submodule(name.rpartition(".")[0]), Linear):
            owner.scales = model.get_submodule(name.rpartition(".")[0]).scales  # type: ignore[assignment]
    return twin
