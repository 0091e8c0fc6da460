"""gemlite: Triton GEMVs for low-bit weights, tuned when first called. One shape and one row: its tuning takes long."""

from __future__ import annotations

import torch
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.peer import Peer, Unavailable
from moeexp_kernels.bench.peers.torch_int4 import natural_codes
from moeexp_kernels.ops.linear import dequantise

NAME = "gemlite"
COMPILES = True


def available() -> None:
    try:
        import gemlite.core  # noqa: F401
    except Exception as error:  # it asks the GPU while it is imported, which fails in many ways
        raise Unavailable(f"{NAME} does not import ({type(error).__name__}: {error}); pip install {NAME}") from error


def gemv(case: Case) -> Peer | None:
    if case.info["bits"] != 4 or case.tokens != 1 or case.shape.split()[0] != "gdn":
        return None
    from gemlite.core import DType, GemLiteLinearTriton

    group, arguments = case.info["group"], case.copies[0]
    x = arguments["x"].flatten(0, -2)
    out, features = arguments["weight"].shape[0], x.shape[1]

    def layer(copy: dict) -> GemLiteLinearTriton:
        made = GemLiteLinearTriton(
            4, group_size=group, in_features=features, out_features=out, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        scale, shift = copy["scales"].float().unbind(-1)
        zero = 8.0 - shift / scale  # w = (code - zero) * scale
        made.pack(natural_codes(copy["weight"], group), scale.bfloat16(), zero.bfloat16(), None)
        return made

    def expected() -> tuple[Tensor]:
        wide = dequantise(weight=arguments["weight"], scales=arguments["scales"], in_features=features)
        return (x.float() @ wide.T,)

    with torch.device(x.device):
        copies = [{"layer": layer(copy)} for copy in case.copies]
    return Peer(
        name="GemLiteLinear", covers="the product; no norm, no residual", call=lambda copy: copy["layer"](x), copies=copies,
        expected=expected,
    )  # fmt: skip


OPS = {"linear": [gemv]}
