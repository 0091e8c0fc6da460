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
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, ROWS, matrix_format
from moeexp_kernels.parts.precision import FLOAT32


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
def centred_int4(q, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """Packed bytes -> low (or high) nibble - 8, float32 and exact.

    On a GPU four bytes at a time: a nibble is put in place into the mantissa of a float whose exponent makes its unit 1
    (2^23 + q, or 2^19 + q for the nibble four bits up, ...) and the offset subtracted: 1.3 integer operations and one
    addition a weight, no conversion instruction."""
    if INTERPRETED:
        return ((q >> 4) if HIGH else (q & 0xF)).to(tl.float32) - 8.0
    elif HIGH:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 w;
            shr.u32 w, $4, 12;
            lop3.b32 $0, $4, 0x000000F0, 0x49000000, 0xEA;
            lop3.b32 $1, $4, 0x0000F000, 0x45000000, 0xEA;
            lop3.b32 $2, w, 0x00000F00, 0x47000000, 0xEA;
            lop3.b32 $3, w, 0x000F0000, 0x43000000, 0xEA;
            add.rn.f32 $0, $0, 0fC9000080;
            add.rn.f32 $1, $1, 0fC5008000;
            add.rn.f32 $2, $2, 0fC7000800;
            add.rn.f32 $3, $3, 0fC3080000;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            args=[q],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 w;
            shr.u32 w, $4, 12;
            lop3.b32 $0, $4, 0x0000000F, 0x4B000000, 0xEA;
            lop3.b32 $1, $4, 0x00000F00, 0x47000000, 0xEA;
            lop3.b32 $2, $4, 0x000F0000, 0x43000000, 0xEA;
            lop3.b32 $3, w, 0x0000F000, 0x45000000, 0xEA;
            add.rn.f32 $0, $0, 0fCB000008;
            add.rn.f32 $1, $1, 0fC7000800;
            add.rn.f32 $2, $2, 0fC3080000;
            add.rn.f32 $3, $3, 0fC5008000;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            args=[q],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )


@triton.jit
def centred_int8(q, INTERPRETED: tl.constexpr):
    """Bytes -> code - 128, float32 and exact; as in `centred_int4`."""
    if not INTERPRETED:
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
def stored_tile(
    w_ptr, row, row_mask, start, FORMAT: tl.constexpr, FITS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Weights [rows, BLOCK_K] as they are stored. row [rows]; start: first column of the *stored* row, a multiple of BLOCK_K;
    FITS: all rows are there. Addresses are what does not change from tile to tile, plus a scalar: registers decide how many
    programs an SM holds."""
    width: tl.constexpr = FORMAT[FEATURES] // 2 if FORMAT[BITS] == 4 else FORMAT[FEATURES]
    column = tl.arange(0, BLOCK_K)
    place = w_ptr + start + (row[:, None] * width + column[None, :])
    if FITS and width % BLOCK_K == 0:
        return tl.load(place)
    else:
        return tl.load(place, mask=row_mask[:, None] & (start + column < width)[None, :], other=0)


@triton.jit
def operand_place(k):
    """Where feature k stands in a row of activations that meets `in_operand_order`."""
    return k // 16 * 16 + k // 2 % 2 * 8 + k // 4 % 4 * 2 + k % 2


@triton.jit
def in_operand_order(q):
    """A stored tile [rows, columns] with each 16 columns in another order, which activations must share (`operand_place`).

    A product's first operand lies in registers so that a thread has of 16 columns the four 2j, 2j + 1, 2j + 8, 2j + 9:

        column    | 0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13 | 14 15 |
        thread j  |  0  |  1  |  2  |  3  |  0  |   1   |   2   |   3   |

    Taken as they are stored, these are two loads of two bytes, put together by seven instructions. In the order below they are
    stored bytes 4j to 4j + 3: one word, as `nibbles` takes it."""
    rows: tl.constexpr = q.shape[0]
    columns: tl.constexpr = q.shape[1]
    q = tl.permute(tl.reshape(q, [rows, columns // 16, 4, 2, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(q, [rows, columns])


@triton.jit
def scale_tile(
    s_ptr, row, row_mask, start, FORMAT: tl.constexpr, FITS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(scale, shift) of `stored_tile`, [rows, 1] where a group fills the tile or more, else [rows, BLOCK_K]; plain weights: 0."""
    if FORMAT[BITS] >= 16:
        return 0.0, 0.0
    else:
        stored: tl.constexpr = FORMAT[GROUP] // 2 if FORMAT[BITS] == 4 else FORMAT[GROUP]
        width: tl.constexpr = FORMAT[FEATURES] // 2 if FORMAT[BITS] == 4 else FORMAT[FEATURES]
        groups: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
        column = start + tl.arange(0, BLOCK_K)
        pairs = s_ptr.to(tl.pointer_type(tl.int32))
        if stored % BLOCK_K == 0:
            pairs += start // stored + row[:, None] * groups
            pair = tl.load(pairs) if FITS else tl.load(pairs, mask=row_mask[:, None], other=0)
        else:
            mask = row_mask[:, None] & (column < width)[None, :]
            pair = tl.load(pairs + row[:, None] * groups + (column // stored)[None, :], mask=mask, other=0)
        return unpack_scales(pair)


@triton.jit
def activation_tile(
    rows, row_mask, start, dtype: tl.constexpr, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Of each row (pointers [M]) the features that stored columns [start, start + BLOCK_K) hold: (low, high) [BLOCK_K, M] in
    dtype. int4: a column's low nibble is a feature, its high one that half a group on; else both are the same."""
    width: tl.constexpr = FORMAT[FEATURES] // 2 if FORMAT[BITS] == 4 else FORMAT[FEATURES]
    half: tl.constexpr = FORMAT[GROUP] // 2
    column = tl.arange(0, BLOCK_K)
    mask = row_mask[None, :]
    if width % BLOCK_K:
        mask = mask & (start + column < width)[:, None]
    if FORMAT[BITS] != 4:
        low = tl.load((rows + start)[None, :] + column[:, None], mask=mask, other=0.0).to(dtype)
        return low, low
    else:
        if half % BLOCK_K == 0:
            # Triton 3.6 does not see by itself that loads of 16 bytes may be made.
            first = tl.multiple_of(start // half * FORMAT[GROUP] + start % half, BLOCK_K)
            place = (rows + first)[None, :] + column[:, None]
        else:
            place = rows[None, :] + ((start + column) // half * FORMAT[GROUP] + (start + column) % half)[:, None]
        low = tl.load(place, mask=mask, other=0.0).to(dtype)
        high = tl.load(place + half, mask=mask, other=0.0).to(dtype)
        return low, high


@triton.jit
def widened(q, scale, shift, HIGH: tl.constexpr, dtype: tl.constexpr, bits: tl.constexpr, INTERPRETED: tl.constexpr):
    """What `stored_tile` returned as weights in dtype; HIGH: of int4 the high nibbles, which are half a group on."""
    if bits >= 16:
        return q.to(dtype)
    elif bits == 4:
        return (centred_int4(q, HIGH, INTERPRETED) * scale + shift).to(dtype)
    else:
        return (centred_int8(q, INTERPRETED) * scale + shift).to(dtype)


NIBBLE_ZERO: tl.constexpr = tl.constexpr(136.0)  # what `nibbles` has for a weight whose code is the middle one


@triton.jit
def nibbles(q, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """Packed bytes -> 128 + the low (or high) nibble, exact, as a product's operand: bfloat16, or float32 when INTERPRETED.

    On a GPU a nibble is put into the mantissa of a bfloat16 whose unit is 1, two at a time. NIBBLE_ZERO is left in it: it is
    cheaper taken from the shift, which a group's sum of activations is multiplied with anyway."""
    if INTERPRETED:
        return centred_int4(q, HIGH, INTERPRETED) + NIBBLE_ZERO
    elif HIGH:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 w;
            shr.u32 w, $2, 4;
            prmt.b32 $0, w, 0, 0x4140;
            prmt.b32 $1, w, 0, 0x4342;
            lop3.b32 $0, $0, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, $1, 0x000F000F, 0x43004300, 0xEA;
            }
            """,
            "=&r,=&r,r",
            args=[q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $2, 0, 0x4140;
            prmt.b32 $1, $2, 0, 0x4342;
            lop3.b32 $0, $0, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, $1, 0x000F000F, 0x43004300, 0xEA;
            """,
            "=&r,=&r,r",
            args=[q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def add_product(acc, q, scale, shift, x, x_high, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a stored tile times activations. x: the features of the stored columns, of int4 those in the low nibbles; x_high
    those in the high ones."""
    acc = tl.dot(widened(q, scale, shift, False, x.dtype, FORMAT[BITS], INTERPRETED), x, acc, input_precision=FLOAT32)
    if FORMAT[BITS] == 4:
        acc = tl.dot(widened(q, scale, shift, True, x.dtype, FORMAT[BITS], INTERPRETED), x_high, acc, input_precision=FLOAT32)
    return acc


@triton.jit
def add_scaled(acc, q, scale, shift, x, x_high, sums, INTERPRETED: tl.constexpr):
    """`add_product` of an int4 tile that is one group, scaled after the product of the integers: half the instructions a weight,
    two more for each result, and no weight is rounded. sums: of the group's activations, [1, columns]."""
    part = tl.dot(nibbles(q, False, INTERPRETED), x, tl.zeros_like(acc))
    part = tl.dot(nibbles(q, True, INTERPRETED), x_high, part)
    return part * scale + (sums * (shift - NIBBLE_ZERO * scale) + acc)


@triton.jit
def gemm_kernel(
    x_ptr, w_ptr, s_ptr, res_ptr, y_ptr, M, x_stride, res_stride,
    FORMAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] in tiles, computed as weights x activations: the weights are dequantised in registers, from where only
    the first operand of a Hopper tensor-core product can come. BLOCK_K counts stored columns."""
    N: tl.constexpr = FORMAT[ROWS]
    width: tl.constexpr = FORMAT[FEATURES] // 2 if FORMAT[BITS] == 4 else FORMAT[FEATURES]
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Triton's interpreter cannot multiply bfloat16; for it everything is widened.
    dtype = tl.float32 if INTERPRETED else x_ptr.dtype.element_ty
    x_row = x_ptr + m * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_K):
        q = stored_tile(w_ptr, n, n < N, start, FORMAT, N % BLOCK_N == 0, BLOCK_K)
        scale, shift = scale_tile(s_ptr, n, n < N, start, FORMAT, N % BLOCK_N == 0, BLOCK_K)
        x, high = activation_tile(x_row, m < M, start, dtype, FORMAT, BLOCK_K)
        acc = add_product(acc, q, scale, shift, x, high, FORMAT, INTERPRETED)
    mask = (n < N)[:, None] & (m < M)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(res_ptr + (m * res_stride)[None, :] + n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + (m * N)[None, :] + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=mask)


def launch_rms_norm(*, x: Tensor, norm_weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """norm(x [M, K]) in dtype, contiguous."""
    features = x.shape[1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(features)
    wrap_triton(rms_norm_kernel)[(x.shape[0],)](x, norm_weight, y, x.stride(0), K=features, EPS=eps, BLOCK_K=block)
    return y


FEW_ROWS = 64  # up to which a number of rows may have launch parameters of its own


def gemm_key(*, bits: int, dtype: torch.dtype, out_features: int, features: int, rows: int | torch.SymInt) -> str:
    """Key of the tuning table: "int4/half/248320x2048/32/25" for 25 rows, after which ".../32" serves 17 to 32, and all rows
    what comes before. A symbolic number of rows is many."""
    key = f"{tuning.weight_class(bits)}/{tuning.activation_class(dtype)}/{out_features}x{features}"
    few = isinstance(rows, int) and rows <= FEW_ROWS
    return f"{key}/{max(16, triton.next_power_of_2(rows))}/{rows}" if few else key


def launch_gemm(
    *, x: Tensor, weight: Tensor, scales: Tensor | None, residual: Tensor | None, out: Tensor, bits: int, group: int,
    config: dict | None = None,
) -> None:  # fmt: skip
    """out [M, N] = residual + x [M, K] @ weight.T; all flat, checked, and out contiguous."""
    rows, out_features = x.shape[0], weight.shape[0]
    # In the table BLOCK_K counts stored columns.
    key = gemm_key(bits=bits, dtype=x.dtype, out_features=out_features, features=x.shape[1], rows=rows)
    config = config or tuning.lookup("gemm", key, tuning.architecture(x.device))
    grid = (triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(out_features, config["BLOCK_N"]))
    wrap_triton(gemm_kernel)[grid](
        x, weight, weight if scales is None else scales, x if residual is None else residual, out, rows,
        x.stride(0), 0 if residual is None else residual.stride(0),
        FORMAT=matrix_format(weight, bits=bits, group=group), HAS_RESIDUAL=residual is not None, INTERPRETED=not x.is_cuda,
        **config,
    )  # fmt: skip
