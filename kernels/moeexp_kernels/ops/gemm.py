"""Matrix product of many rows of activations with a stored weight, on tensor cores; `linear`'s second half.

Shape letters and weight formats: `linear.py`. The product is computed as weights x activations: weights are
dequantised in registers, and only a Hopper product's first operand can come from there. The norm is a kernel apart:
with many rows its cost vanishes, and the activations then go from memory to the tensor cores untouched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int_dot import unpack_scales


@triton.jit
def rms_norm_kernel(
    x_ptr, norm_ptr, y_ptr, x_stride, K: tl.constexpr, EPS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)) * (1.0 + norm)
    tl.store(y_ptr + m * K + k, y.to(y_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def centred_int4(q, FAST: tl.constexpr):
    """Packed bytes -> (low nibble - 8, high nibble - 8), both float32 and exact.

    FAST: four bytes at a time, a nibble is put in place into the mantissa of a float whose exponent makes its unit 1
    (2^23 + q, or 2^19 + q for the nibble four bits up, ...) and the offset subtracted: 1.1 integer operations and one
    addition a weight, no conversion instruction."""
    if FAST:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 w;
            shr.u32 w, $8, 12;
            lop3.b32 $0, $8, 0x0000000F, 0x4B000000, 0xEA;
            lop3.b32 $4, $8, 0x000000F0, 0x49000000, 0xEA;
            lop3.b32 $1, $8, 0x00000F00, 0x47000000, 0xEA;
            lop3.b32 $5, $8, 0x0000F000, 0x45000000, 0xEA;
            lop3.b32 $2, $8, 0x000F0000, 0x43000000, 0xEA;
            lop3.b32 $6, w, 0x00000F00, 0x47000000, 0xEA;
            lop3.b32 $3, w, 0x0000F000, 0x45000000, 0xEA;
            lop3.b32 $7, w, 0x000F0000, 0x43000000, 0xEA;
            add.rn.f32 $0, $0, 0fCB000008;
            add.rn.f32 $4, $4, 0fC9000080;
            add.rn.f32 $1, $1, 0fC7000800;
            add.rn.f32 $5, $5, 0fC5008000;
            add.rn.f32 $2, $2, 0fC3080000;
            add.rn.f32 $6, $6, 0fC7000800;
            add.rn.f32 $3, $3, 0fC5008000;
            add.rn.f32 $7, $7, 0fC3080000;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            args=[q],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return (q & 0xF).to(tl.float32) - 8.0, (q >> 4).to(tl.float32) - 8.0


@triton.jit
def centred_int8(q, FAST: tl.constexpr):
    """Bytes -> code - 128, float32 and exact; FAST as in `centred_int4`."""
    if FAST:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $4, 0x4B000000, 0x7650;
            prmt.b32 $1, $4, 0x4B000000, 0x7651;
            prmt.b32 $2, $4, 0x4B000000, 0x7652;
            prmt.b32 $3, $4, 0x4B000000, 0x7653;
            add.rn.f32 $0, $0, 0fCB000080;
            add.rn.f32 $1, $1, 0fCB000080;
            add.rn.f32 $2, $2, 0fCB000080;
            add.rn.f32 $3, $3, 0fCB000080;
            """,
            "=&r,=&r,=&r,=&r,r",
            args=[q],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return q.to(tl.float32) - 128.0


@triton.jit
def weight_tile(
    w_ptr, s_ptr, row, row_mask, start, dtype: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Dequantised weights [rows, BLOCK_K] in dtype, as a pair (int4: low and high nibbles; else twice the same).

    row int64 [rows]; start: first column of the *stored* row, a multiple of BLOCK_K."""
    width: tl.constexpr = K // 2 if BITS == 4 else K
    column = start + tl.arange(0, BLOCK_K)
    mask = row_mask[:, None] & (column < width)[None, :]
    q = tl.load(w_ptr + row[:, None] * width + column[None, :], mask=mask, other=0)
    if BITS >= 16:
        w = q.to(dtype)
        return w, w
    else:
        stored: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
        pairs = s_ptr.to(tl.pointer_type(tl.int32)) + row[:, None] * (K // GROUP)
        if stored % BLOCK_K == 0:  # one group for the whole tile, so one scale a row
            pair = tl.load(pairs + start // stored, mask=row_mask[:, None], other=0)
        else:
            pair = tl.load(pairs + (column // stored)[None, :], mask=mask, other=0)
        scale, shift = unpack_scales(pair)
        if BITS == 4:
            a, b = centred_int4(q, FAST)
            return (a * scale + shift).to(dtype), (b * scale + shift).to(dtype)
        else:
            w = (centred_int8(q, FAST) * scale + shift).to(dtype)
            return w, w


@triton.jit
def features_of(column, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Input feature that the stored column holds (int4: in its low nibble; the high one is GROUP / 2 on)."""
    if BITS == 4:
        half: tl.constexpr = GROUP // 2
        return (column // half) * GROUP + column % half
    else:
        return column


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, s_ptr, res_ptr, y_ptr, M, x_stride, res_stride,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] in tiles, computed as weights x activations: the weights are dequantised in registers, from where only
    the first operand of a Hopper tensor-core product can come. BLOCK_K counts stored columns."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    width: tl.constexpr = K // 2 if BITS == 4 else K
    # Triton's interpreter cannot multiply bfloat16; with FAST off everything is widened.
    dtype = x_ptr.dtype.element_ty if FAST else tl.float32
    x_row = x_ptr + m * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        low, high = weight_tile(w_ptr, s_ptr, n, n < N, start, dtype, K, GROUP, BITS, BLOCK_K, FAST)
        column = start + tl.arange(0, BLOCK_K)
        k = features_of(column, GROUP, BITS)
        mask = (column < width)[:, None] & (m < M)[None, :]
        x = tl.load(x_row[None, :] + k[:, None], mask=mask, other=0.0).to(dtype)
        acc = tl.dot(low, x, acc, input_precision=PRECISION)
        if BITS == 4:
            x = tl.load(x_row[None, :] + k[:, None] + GROUP // 2, mask=mask, other=0.0).to(dtype)
            acc = tl.dot(high, x, acc, input_precision=PRECISION)
    mask = (n < N)[:, None] & (m < M)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(res_ptr + (m * res_stride)[None, :] + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + (m * N)[None, :] + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products must not lose bits to tf32; half-width types are multiplied exactly whatever is said here."""
    return "ieee" if dtype == torch.float32 else "tf32"


def launch_rms_norm(*, x: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """norm(x [M, K]) in dtype, contiguous."""
    features = x.shape[1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(features)
    wrap_triton(rms_norm_kernel)[(x.shape[0],)](x, norm_weight, y, x.stride(0), K=features, EPS=eps, BLOCK_K=block)
    return y


def launch_gemm(
    *, x: Tensor, weight: Tensor, scales: Tensor | None, residual: Tensor | None, out: Tensor, bits: int, group: int,
    precision: str | None = None, config: dict | None = None,
) -> None:  # fmt: skip
    """out [M, N] = residual + x [M, K] @ weight.T; all flat, checked, and out contiguous."""
    rows, out_features = x.shape[0], weight.shape[0]
    # In the table BLOCK_K counts stored columns.
    key = f"{tuning.weight_class(bits)}/{tuning.activation_class(x.dtype)}/{out_features}x{x.shape[1]}"
    config = config or tuning.lookup("gemm", key, tuning.architecture(x.device))
    grid = (triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(out_features, config["BLOCK_N"]))
    wrap_triton(gemm_kernel)[grid](
        x, weight, weight if scales is None else scales, x if residual is None else residual, out, rows,
        x.stride(0), 0 if residual is None else residual.stride(0),
        N=out_features, K=x.shape[1], GROUP=group, BITS=bits, HAS_RESIDUAL=residual is not None, FAST=x.is_cuda,
        PRECISION=precision or dot_precision(x.dtype), **config,
    )  # fmt: skip
