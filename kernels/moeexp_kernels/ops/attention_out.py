"""Attention of a few tokens with its output projection: the merge of the splits packs what the projection's GEMV multiplies.

Shape letters and layouts: `attention.py`; packed rows: `parts/act.py`. K = H * Dh input features, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from moeexp_kernels.ops.attention_splits import launch_splitk, packs
from moeexp_kernels.ops.linear import flat_rows, gemv_config, launch_gemv, weight_format
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import act_format
from moeexp_kernels.parts.matrix import matrix_format


@triton_op("moeexp::sdpa_decode_out", mutates_args=())
def sdpa_decode_out(
    q: Tensor,
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """`linear` of `sdpa_decode_splitk`'s result, with a residual [B, T, N], for few rows. What is between them is not rounded to
    q's dtype: it is packed, to 2^-16 of a vector's largest. `ValueError` too where `packs` says no."""
    (batch, tokens, heads, head_dim), outputs = q.shape, weight.shape[0]
    rows, features = batch * tokens, heads * head_dim
    bits, group = weight_format(weight=weight, scales=scales, in_features=features, name="weight")
    if not packs(q, k_cache, bits=bits, group=group):
        raise ValueError(
            f"heads of {head_dim} over {k_cache.shape[2]} slots before a weight of {bits} bits in groups of {group}; supported: "
            "int4 and int8 weights, heads that are whole groups, and slots for more than one program"
        )
    extra = flat_rows(residual, name="residual", features=outputs)
    if extra.shape[0] != rows:
        raise ValueError(f"residual {tuple(residual.shape)} is not of {rows} rows")
    config = gemv_config(
        bits=bits, rows=outputs, in_features=features, tokens=rows, arch=tuning.architecture(q.device), packed=True
    )  # fmt: skip
    form = matrix_format(weight, bits=bits, group=group, widest=config["VECTOR"])
    act = act_format(bits=bits, group=group, vector=form[5], features=features, dtype=q.dtype)
    _, packed, _ = launch_splitk(q, qkv, k_cache, v_cache, positions, act=act)
    y = torch.empty((batch, tokens, outputs), dtype=q.dtype, device=q.device)
    launch_gemv(
        x=packed, weight=weight, scales=scales, norm_weight=None, eps=0.0, residual=extra, out=y.view(-1, outputs), bits=bits,
        group=group, config=config, act=act,
    )  # fmt: skip
    return y
