"""torch's own int4 matrix product (tinygemm), which int4 models in torch run on."""

from __future__ import annotations

import torch
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.peer import Peer, Unavailable
from moeexp_kernels.ops.linear import MIDDLE_CODE, dequantise

NAME = "torch int4"
COMPILES = False
INNER_TILES = 8
MAX_ROWS = 2048


def available() -> None:
    for op in ("_convert_weight_to_int4pack", "_weight_int4pack_mm"):
        if not hasattr(torch.ops.aten, op):
            raise Unavailable(f"this torch ({torch.__version__}) has no aten::{op}")


def natural_codes(packed: Tensor, group: int) -> Tensor:
    """Our bytes uint8 [..., N, K/2] -> codes uint8 [..., N, K] in order: what they dequantise to with scale 1, shift 8."""
    features = 2 * packed.shape[-1]
    pair = torch.tensor([1.0, MIDDLE_CODE[4]], dtype=torch.float16, device=packed.device)
    pairs = pair.expand(*packed.shape[:-1], features // group, 2)
    return dequantise(weight=packed, scales=pairs, in_features=features).to(torch.uint8)


def int4_matmul(case: Case) -> Peer | None:
    if case.info["bits"] != 4 or case.tokens > MAX_ROWS:
        return None
    group = case.info["group"]
    arguments = case.copies[0]
    codes = natural_codes(arguments["weight"], group)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    # [K/G, N, 2]: w = (code - 8) * scale + shift, which is our format too.
    scales = arguments["scales"].bfloat16().transpose(0, 1).contiguous()
    x = arguments["x"].flatten(0, -2)
    copies = [{"w": packed, "s": scales}] + [{"w": packed.clone(), "s": scales.clone()} for _ in case.copies[1:]]

    def expected() -> tuple[Tensor]:
        return (x.float() @ dequantise(weight=arguments["weight"], scales=arguments["scales"], in_features=x.shape[1]).T,)

    return Peer(
        name="_weight_int4pack_mm", covers="the product; no norm, no residual",
        call=lambda copy: torch.ops.aten._weight_int4pack_mm(x, copy["w"], group, copy["s"]), copies=copies,
        expected=expected,
    )  # fmt: skip


OPS = {"linear": [int4_matmul]}
