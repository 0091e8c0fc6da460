"""Rows of the embedding for a decode step, by a kernel beside which the first projection loads its weights.

Shape letters: B batch, T tokens of each sequence, V vocabulary, D features.

    tokens   [B, T] int64, any strides
    weight   [V, D] float32, bfloat16 or float16, contiguous
    returns  [B, T, D] of the weight's dtype: the rows `tokens`, to the bit

A token outside 0 .. V - 1 reads nothing and gives NaN, and so do its logits. torch's own kernel ends the process's use of the
GPU there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.parts.checks import FLOATS, check_argument
from moeexp_kernels.parts.pdl import after_previous, has_pdl

FEATURES_A_PROGRAM = 1024  # 16 bytes of 2-byte features a thread


@triton.jit
def embedding_kernel(
    tokens_ptr, weight_ptr, out_ptr, stride_b, stride_t,
    T: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * T, blocks of features)."""
    row, feature = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens_ptr += row // T * stride_b + row % T * stride_t
    ready = after_previous(PDL)
    token = tl.load(tokens_ptr + ready)
    limit = tl.where((token >= 0) & (token < V), D, 0)
    x = tl.load(weight_ptr + token * D + feature, mask=feature < limit, other=float("nan"))
    tl.store(out_ptr + ready + row * D + feature, x, mask=feature < D)


@triton_op("moeexp::embedding", mutates_args=())
def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """weight[tokens] (legend above). `ValueError` for other dtypes, numbers of dimensions or strides."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; supported: int64 [B, T]")
    (batch, count), rows, features = tokens.shape, weight.shape[0], weight.shape[-1]
    check_argument(weight, name="weight", shape=(rows, features), dtypes=FLOATS)
    out = torch.empty((batch, count, features), dtype=weight.dtype, device=weight.device)
    wrap_triton(embedding_kernel)[(batch * count, triton.cdiv(features, FEATURES_A_PROGRAM))](
        tokens, weight, out, tokens.stride(0), tokens.stride(1), T=count, V=rows, D=features, BLOCK_D=FEATURES_A_PROGRAM,
        PDL=has_pdl(weight), num_warps=4,
    )  # fmt: skip
    return out
