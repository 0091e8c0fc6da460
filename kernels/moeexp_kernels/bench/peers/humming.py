"""Humming: the CUDA C++ products for low-bit weights that vLLM has beside Marlin's, compiled when first called. Of its
configurations the one that its own heuristics choose, untuned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.executorch import without_shift
from moeexp_kernels.bench.peers.peer import Peer, Unavailable
from moeexp_kernels.bench.peers.torch_int4 import natural_codes
from moeexp_kernels.ops.linear import dequantise

NAME = "Humming"
COMPILES = True
CODES = 8  # in a word of 32 bits
TILE = 256  # outputs, of which its heuristics want whole ones: other matrices are padded


def available() -> None:
    try:
        import humming.layer  # noqa: F401
    except Exception as error:  # it asks the GPU while it is imported
        raise Unavailable(f"{NAME} does not import ({type(error).__name__}: {error}); pip install humming-kernels") from error


def words(codes: Tensor) -> Tensor:
    """codes uint8 [N, K] -> int32 [N, K/8], the first code in the lowest bits."""
    parts = codes.unflatten(-1, (-1, CODES)).to(torch.int64)
    whole = (parts << torch.arange(0, 32, 4, device=codes.device)).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def product(case: Case) -> Peer | None:
    if case.info["bits"] != 4:
        return None
    from humming.layer import HummingLayer

    group, arguments = case.info["group"], case.copies[0]
    x = arguments["x"].flatten(0, -2)
    out, features = arguments["weight"].shape[0], x.shape[1]
    config: dict[str, Any] = {"dtype": "int4", "group_size": group}
    layer = HummingLayer(
        shape_n=out, shape_k=features, weight_config=config, torch_dtype=torch.bfloat16, pad_n_to_multiple=TILE
    ).to(x.device)
    scales = arguments["scales"][..., 0].bfloat16()
    layer.load_from_tensors({"weight": words(natural_codes(arguments["weight"], group)), "weight_scale": scales})
    layer.transform()
    copies = [{"layer": layer}] + [{"layer": copy.deepcopy(layer)} for _ in case.copies[1:]]

    def expected() -> tuple[Tensor]:
        wide = dequantise(weight=arguments["weight"], scales=without_shift(arguments["scales"]), in_features=features)
        return (x.float() @ wide.T,)

    return Peer(
        name="HummingLayer", covers="the product, symmetric weights; no norm, no residual",
        call=lambda copy: copy["layer"](x), copies=copies, expected=expected,
    )  # fmt: skip


OPS = {"linear": [product]}
