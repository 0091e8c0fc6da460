"""The types of a snapshot's tensors: floats are weights, everything else only stands for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# As safetensors names them. A bool, an integer, an 8-bit float or a complex number would convert without a word.
FLOATS = ("BF16", "F16", "F32", "F64")
# What quantised weights come with (FP8, GPTQ, AWQ, compressed-tensors, bitsandbytes, hqq), of a float type perhaps.
COMPANION = re.compile(
    r"[._](weight_scale|weight_scale_2|weight_scale_inv|scale_inv|scales?|input_scale|activation_scale|scaling_factor"
    r"|zeros?|zero_points?|weight_zero_point|qweight|qzeros|qscales?|g_idx|weight_packed|weight_shape|weight_g_idx"
    r"|weight_global_scale|input_global_scale|SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state\.\w+|W_q|weight_blocks|weight_scales|blocks)$"
)
HINT = "give the snapshot with bfloat16, float16 or float32 weights, and quantise with quant=int4 or int8"


def check_types(where: str, types: Mapping[str, str], wanted: set[str], method: str | None) -> None:
    """`ValueError` with the first tensor that is no plain weight. `types`: name -> type as safetensors names it;
    `wanted`: the names that the model has; `method`: what config.json says of the quantisation, see `prequantised`."""
    said = f", and config.json has a {method}" if method else ""
    odd = sorted(key for key, kind in types.items() if kind not in FLOATS)
    if odd:
        # A tensor of the model's own is named before one that nobody knows.
        name = next((key for key in odd if key in wanted), odd[0])
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise ValueError(
            f"tensor {_cut(name)}{more} is of type {types[name]}{said}: no plain weights (those are {', '.join(FLOATS)}); "
            f"{HINT} (in {where})"
        )
    companions = sorted(key for key in types if key not in wanted and COMPANION.search(key))
    if companions:
        more = f" (and {len(companions) - 1} more)" if len(companions) > 1 else ""
        name = companions[0]
        raise ValueError(
            f"tensor {_cut(name)}{more} of type {types[name]} belongs to quantised weights{said}: these are not "
            f"supported; {HINT} (in {where})"
        )


def check_finite(name: str, stored: Tensor, dtype: torch.dtype, where: str) -> None:
    """`ValueError` with the tensor's name for a NaN or an Inf in it, or that it has once it is `dtype`."""
    if not is_finite(stored):
        count = int((~stored.isfinite()).sum())
        raise ValueError(
            f"tensor {_cut(name)} has {count} of {stored.numel()} values that are NaN or Inf: the snapshot is damaged, fetch "
            f"it again (in {where})"
        )
    if not is_finite(stored.to(dtype)):
        kind, largest = str(dtype).removeprefix("torch."), float(stored.abs().max())
        raise ValueError(
            f"tensor {_cut(name)} has values up to {largest:.3g}, and {kind} holds none beyond {torch.finfo(dtype).max:.3g}: no "
            f"weights of a model are as large, fetch it again (in {where})"
        )


def is_finite(tensor: Tensor) -> bool:
    """One pass without a copy, and one answer from the device: a NaN is both the least and the largest."""
    low, high = tensor.aminmax()
    return bool((low.isfinite() & high.isfinite()).item())


def _cut(name: str, limit: int = 120) -> str:
    return name if len(name) <= limit else f"{name[:40]}…{name[40 - limit :]}"
