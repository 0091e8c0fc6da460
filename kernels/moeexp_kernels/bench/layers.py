"""Four layers of a decode step, three delta nets and one attention, as one chain of kernels with PDL.

What an op takes by itself is not what it adds to a step: there its weights are on their way while the kernel before it runs,
and how many of its programs find room beside that one decides. So rows of the tuning table that serve a decode step of one
token may be chosen by the time of this chain (`tune --layers`). It reads more than twice what L2 holds before a weight comes
up again.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeexp_kernels.bench.case import SeededTensors
from moeexp_kernels.bench.cases import EPS
from moeexp_kernels.bench.shapes import Shapes
from moeexp_kernels.bench.timing import graph_samples
from moeexp_kernels.ops import linear, moe, qk_norm_rope
from moeexp_kernels.ops.mixed import gdn_out, sdpa_out
from moeexp_kernels.parts import tuning

LAYERS = ("gdn", "gdn", "gdn", "attention")
SLOTS, POSITION = 1024, 512  # of the KV cache; where the token stands
CALLS = 4  # chains in a graph


@dataclass
class Layer:
    kind: str
    norm: Tensor
    project_in: dict[str, Tensor]  # weight, scales
    project_out: dict[str, Tensor]
    mixer: dict
    state: dict[str, Tensor]
    moe_norm: Tensor
    router: Tensor
    trace: Tensor
    experts: dict[str, Tensor]


class Layers:
    """The chain at `shapes`, int4, `tokens` of each sequence. Layers share one set of experts, and choose other ones of it."""

    def __init__(self, shapes: Shapes, device: str, sequences: int = 1, tokens: int = 1, source: Any = None):
        """source: of the tensors, as `SeededTensors`."""
        self.shapes, self.sequences, self._source = shapes, sequences, source or SeededTensors(device)
        self.x = self._source.randn(sequences, tokens, shapes.hidden)
        self._positions = torch.full((sequences,), min(POSITION, SLOTS - tokens), dtype=torch.int64, device=device)
        shared = self._weights("gate_up", shapes.experts, 2 * shapes.expert_width, shapes.hidden)
        shared |= self._weights("down", shapes.experts, shapes.hidden, shapes.expert_width)
        self.layers = [self._layer(kind, shared) for kind in LAYERS]

    def call(self, x: Tensor) -> Tensor:
        """x [sequences, tokens, D] after the four layers; states advance."""
        for layer in self.layers:
            x = self._mix(layer, x)
            common = {"x": x, "norm_weight": layer.moe_norm, "eps": EPS}
            choice = {"top_k": self.shapes.top_k, "positions": self._positions, "expert_ids": layer.trace}
            x = moe.routed_experts({**common, "weight": layer.router, **choice}, layer.experts)
        return x

    def microseconds(self, *, replays: int = 40, pdl: bool = True) -> float:
        """Median time of a layer, of graphs of several chains."""
        samples = graph_samples(lambda _: self.call(self.x), [{}], calls=CALLS, replays=replays, pdl="all" if pdl else "none")
        return statistics.median(samples) / len(LAYERS)

    def rows(self) -> set[tuple[str, str]]:
        """(op, key) of the tuning table's rows that the chain asks for."""
        with tuning.asked() as found:
            self.call(self.x)
        return found

    def _mix(self, layer: Layer, x: Tensor) -> Tensor:
        proj = linear.linear(x=x, norm_weight=layer.norm, eps=EPS, **layer.project_in)
        project = {**layer.project_out, "residual": x}
        if layer.kind == "gdn":
            return gdn_out({"proj": proj, "eps": EPS, **layer.mixer, **layer.state}, project)
        q = qk_norm_rope.qk_norm_rope(qkv=proj, positions=self._positions, eps=EPS, **layer.mixer, **layer.state)
        return sdpa_out({"q": q, "qkv": proj, "positions": self._positions, **layer.state}, project)

    def _weights(self, name: str, *shape: int) -> dict[str, Tensor]:
        weight, scales = self._source.weight(*shape, bits=4, group=self.shapes.group)
        return {name: weight, ("scales" if name == "weight" else f"{name}_scales"): scales}

    def _layer(self, kind: str, experts: dict[str, Tensor]) -> Layer:
        shapes, source = self.shapes, self._source
        linears = shapes.linears()

        def norm() -> Tensor:
            return source.randn(shapes.hidden, dtype=torch.float32, scale=0.2)

        own = self._weights("shared_gate_up", 2 * shapes.shared_width, shapes.hidden)
        own |= self._weights("shared_down", shapes.hidden, shapes.shared_width)
        own["shared_gate"] = source.randn(1, shapes.hidden, scale=shapes.hidden**-0.5)
        mixer, state = self._delta_net() if kind == "gdn" else self._attention()
        return Layer(
            kind=kind, norm=norm(), mixer=mixer, state=state, moe_norm=norm(), experts=experts | own,
            project_in=self._weights("weight", *linears[f"{kind} in"][:2]),
            project_out=self._weights("weight", *linears["out"][:2]),
            router=source.randn(shapes.experts, shapes.hidden, scale=shapes.hidden**-0.5),
            trace=torch.zeros(self.sequences, SLOTS, shapes.top_k, dtype=torch.int32, device=source.device),
        )  # fmt: skip

    def _delta_net(self) -> tuple[dict, dict[str, Tensor]]:
        shapes, source = self.shapes, self._source
        mixer = {
            "conv_weight": source.randn(shapes.channels, shapes.conv_width, scale=0.5),
            "a_log": source.randn(shapes.gdn_v_heads, dtype=torch.float32) - 1.0,
            "dt_bias": source.randn(shapes.gdn_v_heads, dtype=torch.float32) - 1.0,
            "norm_weight": 1 + source.randn(shapes.gdn_v_dim, scale=0.1),
            "num_k_heads": shapes.gdn_k_heads, "num_v_heads": shapes.gdn_v_heads,
            "head_k_dim": shapes.gdn_k_dim, "head_v_dim": shapes.gdn_v_dim,
        }  # fmt: skip
        heads = (self.sequences, shapes.gdn_v_heads, shapes.gdn_k_dim, shapes.gdn_v_dim)
        return mixer, {
            "conv_state": source.randn(self.sequences, shapes.channels, shapes.conv_width - 1),
            "recurrent_state": source.randn(*heads, dtype=torch.float32, scale=0.3),
        }

    def _attention(self) -> tuple[dict, dict[str, Tensor]]:
        shapes, source = self.shapes, self._source
        steps = torch.arange(0, shapes.rotary, 2, device=source.device, dtype=torch.float32)
        mixer = {
            "q_norm": source.randn(shapes.head_dim, dtype=torch.float32, scale=0.2),
            "k_norm": source.randn(shapes.head_dim, dtype=torch.float32, scale=0.2),
            "inv_freq": 1.0 / 10_000_000 ** (steps / shapes.rotary), "num_heads": shapes.heads,
        }  # fmt: skip
        cache = (self.sequences, shapes.kv_heads, SLOTS, shapes.head_dim)
        return mixer, {"k_cache": source.randn(*cache), "v_cache": source.randn(*cache)}
