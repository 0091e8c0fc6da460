"""A decode step's mixer, the delta net or attention, before its output projection: together they spare a kernel.

Where the projection goes to the tile (`linear_tile.py`), which multiplies limbs of its activations, the mixer's last kernel
writes these beside its result, and no kernel of their own has to.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeexp_kernels.ops.attention_splits import sdpa_decode_limbs, sdpa_decode_splitk
from moeexp_kernels.ops.gated_delta import gdn_decode, gdn_decode_limbs
from moeexp_kernels.ops.linear import kernel_for, weight_format
from moeexp_kernels.parts import tuning


def limbs_group(x: Tensor, *, features: int, project: dict[str, Any]) -> int:
    """The group in which the product of rows [B, T, features] takes limbs of them, or 0 where it takes none. x [B, T, ...]: what
    the rows are made of; project: weight and scales."""
    weight = project["weight"]
    bits, group = weight_format(weight=weight, scales=project["scales"], in_features=features, name="weight")
    kernel = kernel_for(
        rows=x.shape[0] * x.shape[1], bits=bits, group=group, out_features=weight.shape[0], features=features,
        arch=tuning.architecture(x.device), half=x.element_size() == 2,
    )  # fmt: skip
    return group if kernel == "tile" else 0


def gdn_limbs(arguments: dict[str, Any], project: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """`gdn_decode` of `arguments`, and what `linear` takes beside it: `limbs` and `units`, or nothing. project: that call's
    weight and scales."""
    features = arguments["num_v_heads"] * arguments["head_v_dim"]
    group = limbs_group(arguments["proj"], features=features, project=project)
    if not group:
        return gdn_decode(**arguments), {}
    out, limbs, units = gdn_decode_limbs(**arguments, group=group)
    return out, {"limbs": limbs, "units": units}


def sdpa_limbs(arguments: dict[str, Any], project: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """`gdn_limbs` of attention."""
    q = arguments["q"]
    group = limbs_group(q, features=q.shape[2] * q.shape[3], project=project)
    if not group:
        return sdpa_decode_splitk(**arguments), {}
    out, limbs, units = sdpa_decode_limbs(**arguments, group=group)
    return out, {"limbs": limbs, "units": units}
