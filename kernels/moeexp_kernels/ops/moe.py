"""Sparse mixture of experts with a gated shared expert.

Shape letters: B batch, T tokens of this call, D hidden, E experts, k experts per token, I expert width, Is shared expert
width.

    x            [B, T, D]   residual stream, *before* the norm; every op here applies the norm itself
    norm_weight  [D]         unit-offset RMSNorm
    gate_up      [E, 2*I, D], down [E, D, I] in any weight format of `linear` (scales [E, rows, groups, 2] or None);
                 rows of gate_up: I gate rows, then I up rows
    shared_gate_up [2*Is, D], shared_down [D, Is] likewise; shared_gate [1, D] plain

Which experts a token takes: `router.py`; references: `moe_reference.py`. Experts of few tokens, a GEMV for each pair:
`moe_pairs.py`, where the router packed their rows `moe_packed.py`, and of very few tokens, with the router's choice fused into
them, `moe_routed.py`. Up to 32 tokens, some of whose experts are the same, where the tuning table has it so or it is asked for:
`moe_tile.py`. Many tokens: `moe_prefill.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from moeexp_kernels.ops.linear import flat_rows, weight_format
from moeexp_kernels.ops.moe_packed import launch_packed, packing
from moeexp_kernels.ops.moe_pairs import launch_pairs
from moeexp_kernels.ops.moe_routed import launch_routed, routed_key
from moeexp_kernels.ops.moe_tile import experts_served, launch_moe_tile, moe_tile_config
from moeexp_kernels.ops.router import router, router_packed
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import FLOATS, check_argument


def expert_formats(
    *, gate_up: Tensor, gate_up_scales: Tensor | None, down: Tensor, down_scales: Tensor | None, features: int,
    name: str,
) -> tuple[int, tuple[int, int], tuple[int, int]]:  # fmt: skip
    """(I, (bits, group) of gate_up, (bits, group) of down) of the experts, or of the shared one; checked."""
    width = gate_up.shape[-2] // 2
    up = weight_format(weight=gate_up, scales=gate_up_scales, in_features=features, name=f"{name}gate_up")
    back = weight_format(weight=down, scales=down_scales, in_features=width, name=f"{name}down")
    if gate_up.shape[-2] % 2 or down.shape[-2] != features:
        raise ValueError(
            f"{name}gate_up has {gate_up.shape[-2]} rows and {name}down {down.shape[-2]}; "
            f"supported: twice the expert's width, and the {features} features of x"
        )
    return width, up, back


def check_vectors(
    *, x: Tensor, norm_weight: Tensor, shared_gate: Tensor, ids: Tensor, weights: Tensor
) -> None:  # fmt: skip
    """`ValueError` where what the experts' ops take beside x and the matrices is not as in the legend."""
    features = x.shape[-1]
    check_argument(norm_weight, name="norm_weight", shape=(features,), dtypes=FLOATS)
    check_argument(shared_gate, name="shared_gate", shape=(1, features), dtypes=FLOATS)
    chosen = (*x.shape[:-1], ids.shape[-1])
    check_argument(ids, name="ids", shape=chosen, dtypes=(torch.int32,))
    check_argument(weights, name="weights", shape=chosen, dtypes=(torch.float32,))


def decode_formats(arguments: dict[str, Any], *, features: int) -> dict[str, tuple[int, int, int]]:
    """{matrix: (width, bits, group)} of the matrices that `moe_decode` takes; checked."""
    formats: dict[str, tuple[int, int, int]] = {}
    for prefix in ("", "shared_"):
        stored = {
            f"{kind}{scales}": arguments[f"{prefix}{kind}{scales}"] for kind in ("gate_up", "down") for scales in ("", "_scales")
        }
        width, up, back = expert_formats(**stored, features=features, name=prefix)
        formats |= {f"{prefix}gate_up": (width, *up), f"{prefix}down": (width, *back)}
    return formats


def tile_row(x: Tensor, formats: dict[str, tuple[int, int, int]], *, tile_from: int | None = None) -> dict | None:
    """The table's row of `moe_tile.py` where that serves x [..., D], of `tile_from` tokens or more; None: GEMVs of pairs do."""
    rows, features = x.shape[:-1].numel(), x.shape[-1]
    if not experts_served(rows=rows, formats=formats):
        return None
    width, bits, _ = formats["gate_up"]
    row = moe_tile_config(bits=bits, features=features, width=width, rows=rows, arch=tuning.architecture(x.device))
    return row if rows >= (row["FROM"] if tile_from is None else tile_from) else None


def launch_decode(*, x: Tensor, ids: Tensor, tile_from: int | None, packed: Tensor | None = None, **arguments: Any) -> Tensor:
    """Checks the arguments of `moe_decode` and runs the kernels for its tokens. tile_from: the least number of tokens that go to
    `moe_tile.py`; None: the tuning table's."""
    features = x.shape[-1]
    formats = decode_formats(arguments, features=features)
    flat = flat_rows(x, name="x", features=features)
    check_vectors(x=x, ids=ids, **{name: arguments[name] for name in ("norm_weight", "weights", "shared_gate")})
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    common = {"x": flat, "ids": ids, "out": y.view(-1, features), **arguments}
    config = tile_row(x, formats, tile_from=tile_from)
    if config is not None:
        width, bits, group = formats["gate_up"]
        launch_moe_tile(**common, width=width, up=(bits, group), back=formats["down"][1:], config=config)
    elif packed is not None:
        launch_packed(**common, formats=formats, packed=packed)
    else:
        launch_pairs(**common, formats=formats)
    return y


@triton_op("moeexp::moe_decode", mutates_args=())
def moe_decode(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None,
    shared_down: Tensor,
    shared_down_scales: Tensor | None,
    shared_gate: Tensor,
    packed: Tensor | None = None,
) -> Tensor:
    """`reference_moe_decode` on the GPU; the same arguments, by keyword. Any number of tokens, made for up to 32; a token's ids
    differ. packed: what `router_packed` made of x and shared_gate, which spares the experts' programs to make it; the tile has
    no use for it. `ValueError` for strides or dtypes not taken."""
    return launch_decode(
        x=x, norm_weight=norm_weight, eps=eps, ids=ids, weights=weights, gate_up=gate_up, gate_up_scales=gate_up_scales,
        down=down, down_scales=down_scales, shared_gate_up=shared_gate_up, shared_gate_up_scales=shared_gate_up_scales,
        shared_down=shared_down, shared_down_scales=shared_down_scales, shared_gate=shared_gate, packed=packed,
        tile_from=None,
    )  # fmt: skip


@triton_op("moeexp::moe_decode_routed", mutates_args={"expert_ids"})
def moe_decode_routed(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    positions: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor,
    shared_down: Tensor,
    shared_down_scales: Tensor,
    shared_gate: Tensor,
) -> Tensor:
    """`moe_decode` of the k experts that `router` would choose by `weight` [E, D], and trace; k by expert_ids [B, S, k], in
    place. Made for up to three tokens, each of which counts. `ValueError` for strides, shapes or dtypes not taken."""
    matrices = {
        "gate_up": gate_up, "gate_up_scales": gate_up_scales, "down": down, "down_scales": down_scales,
        "shared_gate_up": shared_gate_up, "shared_gate_up_scales": shared_gate_up_scales, "shared_down": shared_down,
        "shared_down_scales": shared_down_scales,
    }  # fmt: skip
    features = x.shape[-1]
    formats = decode_formats(matrices, features=features)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_routed(
        x=flat_rows(x, name="x", features=features), tokens=x.shape[1],
        router={"norm_weight": norm_weight, "weight": weight, "eps": eps, "shared_gate": shared_gate}, positions=positions,
        expert_ids=expert_ids, out=y.view(-1, features), formats=formats, **matrices,
    )  # fmt: skip
    return y


def packed_form(x: Tensor, experts: dict[str, Any]) -> dict[str, int]:
    """`packing` of the rows of x [..., D] for these experts: nothing where the tile serves, which has no use for them."""
    formats = decode_formats(experts, features=x.shape[-1])
    return packing(formats, rows=x.shape[:-1].numel()) if tile_row(x, formats) is None else {}


def routed_serves(choice: dict[str, Any], experts: dict[str, Any], *, bits: int) -> bool:
    """Whether `moe_decode_routed` does, of tokens that all count and whose rows the router can pack. bits: of gate_up."""
    rows, features, width = choice["x"].shape[:-1].numel(), choice["x"].shape[-1], experts["gate_up"].shape[-2] // 2
    key = routed_key(bits=bits, features=features, width=width)
    row = tuning.lookup("moe_routed", key, tuning.architecture(choice["x"].device))
    return rows <= row["UP_TO"] and choice.get("valid_len") is None


def route_decode(choice: dict[str, Any], experts: dict[str, Any]) -> dict[str, Tensor]:
    """`ids`, `weights` and, where its kernels take it, `packed` of `moe_decode`. choice: the arguments of `router`; experts: the
    matrices that `moe_decode` takes, and its `shared_gate`."""
    form = packed_form(choice["x"], experts)
    found = router_packed(**choice, **form, shared_gate=experts["shared_gate"]) if form else router(**choice)
    return dict(zip(("ids", "weights", "packed"), found, strict=False))


def routed_experts(choice: dict[str, Any], experts: dict[str, Any]) -> Tensor:
    """`moe_decode` of what `router` finds, each doing what spares the other something; arguments as of `route_decode`."""
    common = {name: choice[name] for name in ("x", "norm_weight", "eps")}
    form = packed_form(choice["x"], experts)
    if not form or not routed_serves(choice, experts, bits=form["pack_bits"]):
        return moe_decode(**common, **route_decode(choice, experts), **experts)
    router = {name: choice[name] for name in ("weight", "positions", "expert_ids")}
    return moe_decode_routed(**common, **router, **experts)


@triton_op("moeexp::moe_decode_tile", mutates_args=())
def moe_decode_tile(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
    shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None,
    shared_down: Tensor,
    shared_down_scales: Tensor | None,
    shared_gate: Tensor,
) -> Tensor:
    """`moe_decode`, on the kernels of `moe_tile.py` from one token on where they take the weights (int4 and int8 in groups of 64
    or 128, the shared expert as wide as the others): a row is the same to the bit for 1 to 32 tokens."""
    return launch_decode(
        x=x, norm_weight=norm_weight, eps=eps, ids=ids, weights=weights, gate_up=gate_up, gate_up_scales=gate_up_scales,
        down=down, down_scales=down_scales, shared_gate_up=shared_gate_up, shared_gate_up_scales=shared_gate_up_scales,
        shared_down=shared_down, shared_down_scales=shared_down_scales, shared_gate=shared_gate, tile_from=1,
    )  # fmt: skip
