"""A model's weights in float32 under transformers' names, one decoder layer at a time: what the reference computes with."""

from __future__ import annotations

import torch
from moeexp_kernels.linear import dequantise
from torch import Tensor

from .architecture import Architecture
from .model import Linear, Qwen35MoE
from .weights import pieces


class DequantisedWeights:
    """Views of `model`'s own buffers (plain ones) and dequantised copies (quantised ones), float32 on their device."""

    def __init__(self, model: Qwen35MoE):
        self.model, self._pieces = model, pieces(model.arch)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Keys relative to transformers' decoder layer, e.g. `mlp.experts.gate_up_proj`."""
        prefix, result = f"layers.{index}.", {}
        for name, parts in self._pieces.items():
            if name.startswith(prefix):
                wide = self._wide(name)
                for piece in parts:
                    result[piece.key.removeprefix(prefix)] = wide[piece.start : piece.stop].view(piece.shape)
        return result

    def embedding(self) -> Tensor:
        return self._wide("embed_tokens.weight")

    def final_norm(self) -> Tensor:
        return self.model.norm.float()

    def head(self) -> Tensor:
        return self._wide("head.weight")

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
        owner, leaf = twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        owner.register_buffer(leaf, convert(model.get_buffer(name), like))
        if isinstance(owner, Linear):
            owner.scales = model.get_submodule(name.rpartition(".")[0]).scales
    return twin
