"""A decode step's mixer, the delta net or attention, with its output projection: together they spare a kernel.

Where the projection goes to the tile (`linear_tile.py`), which multiplies limbs of its activations, the mixer's last kernel
writes these beside its result, and no kernel of their own has to. Of very few rows the delta rule writes the integers that the
projection's GEMV multiplies, packed, and leaves its gated norm to that (`gated_out.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeexp_kernels.ops.attention_splits import sdpa_decode_limbs, sdpa_decode_splitk
from moeexp_kernels.ops.gated_delta import decode_launch, gdn_decode, gdn_decode_limbs
from moeexp_kernels.ops.gated_out import gdn_decode_out, packed_vector
from moeexp_kernels.ops.linear import kernel_for, linear, weight_format
from moeexp_kernels.parts import tuning


def kernel_of(x: Tensor, *, features: int, project: dict[str, Any]) -> tuple[str, int, int]:
    """(what serves the product of rows [B, T, features], as `kernel_for` names it; bits and group of the weight). x [B, T, ...]:
    what the rows are made of; project: weight and scales."""
    weight = project["weight"]
    bits, group = weight_format(weight=weight, scales=project["scales"], in_features=features, name="weight")
    kernel = kernel_for(
        rows=x.shape[0] * x.shape[1], bits=bits, group=group, out_features=weight.shape[0], features=features,
        arch=tuning.architecture(x.device), half=x.element_size() == 2,
    )  # fmt: skip
    return kernel, bits, group


def gdn_out(arguments: dict[str, Any], project: dict[str, Any]) -> Tensor:
    """`linear` of what `gdn_decode` makes of `arguments`. project: that call's weight, scales and residual."""
    proj, dim = arguments["proj"], arguments["head_v_dim"]
    features = arguments["num_v_heads"] * dim
    kernel, bits, group = kernel_of(proj, features=features, project=project)
    if kernel == "tile":
        out, limbs, units = gdn_decode_limbs(**arguments, group=group)
        return linear(x=out, **project, limbs=limbs, units=units)
    key = f"{tuning.weight_class(bits)}/{project['weight'].shape[0]}x{features}"
    few = kernel == "gemv" and proj.shape[0] * proj.shape[1] <= tuning.lookup(
        "gdn_out", key, tuning.architecture(proj.device)
    )["UP_TO"]  # fmt: skip
    if few:
        heads = {"k_heads": arguments["num_k_heads"], "v_heads": arguments["num_v_heads"]}
        split, _ = decode_launch(proj=proj, dims=(arguments["head_k_dim"], dim), **heads)
        if packed_vector(bits=bits, group=group, head_v_dim=dim, split=split):
            return gdn_decode_out(**arguments, **project)
    return linear(x=gdn_decode(**arguments), **project)


def sdpa_out(arguments: dict[str, Any], project: dict[str, Any]) -> Tensor:
    """`gdn_out` of attention."""
    q = arguments["q"]
    kernel, _, group = kernel_of(q, features=q.shape[2] * q.shape[3], project=project)
    if kernel != "tile":
        return linear(x=sdpa_decode_splitk(**arguments), **project)
    out, limbs, units = sdpa_decode_limbs(**arguments, group=group)
    return linear(x=out, **project, limbs=limbs, units=units)
