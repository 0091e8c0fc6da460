"""Dense linear layer on plain, int8 or int4 weights, with an optional RMSNorm before and residual after it.

Shape letters: M rows of activations (any leading shape), K input features, N output features, G quantisation group.

Weight formats (told apart by dtype and shape, never by a flag that could disagree with the data):
    plain  weight [N, K] float dtype, scales None
    int8   weight [N, K] uint8, scales [N, K/G, 2] float16
    int4   weight [N, K/2] uint8, scales [N, K/G, 2] float16

Within a group of an int4 row, byte j holds element j in its low and element j + G/2 in its high nibble: a 16-byte load
brings two runs of 16 *consecutive* inputs, so that activations are read with vector loads and no shuffle.
`scales[..., 0]` is the scale s, `scales[..., 1]` the shift c; with the code q in 0..2^bits-1 and the middle code
m = 2^(bits-1), the weight is (q - m) * s + c. Centring keeps c small, so float16 holds it without loss that matters.

`kernel_for` chooses what computes it. One row: a GEMV on packed words of weights, see `int_dot.py`. Up to 32 rows of quantised
weights in groups of 64 or 128: `linear_tile.py`, which reads the weights once for all rows. More rows: `gemm.py`, and of 2-byte
activations from still more on `matmul.py`. From how many rows on the tuning table says of each shape; a number of rows that only
the call knows counts as very many. Other weights stay with the GEMV up to GEMV_ROWS rows.
The op `linear_tile` leaves 1 to 32 rows to the tile whatever the table says: then a row's result is the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gemm import launch_gemm, launch_rms_norm
from moeexp_kernels.ops.linear_tile import launch_tile, tile_serves
from moeexp_kernels.ops.matmul import matmul
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import FLOATS, check_argument
from moeexp_kernels.parts.int_dot import dot_rows_by_four, load_norm, load_row_features, load_rows
from moeexp_kernels.parts.limbs import check_limbs
from moeexp_kernels.parts.matrix import ROWS, at_row, matrix_format
from moeexp_kernels.parts.pdl import after_previous, has_pdl

MIDDLE_CODE = {4: 8, 8: 128}


def weight_bits(*, weight: Tensor, scales: Tensor | None, in_features: int) -> int:
    """16 (plain), 8 or 4. `ValueError` where weight and scales do not fit an input of `in_features`."""
    if scales is None:
        if weight.shape[-1] != in_features:
            raise ValueError(f"weight {tuple(weight.shape)} does not take inputs of {in_features} features")
        return 16
    if weight.dtype != torch.uint8 or scales.dtype != torch.float16:
        raise ValueError(f"a quantised weight is uint8 with float16 scales; got {weight.dtype} and {scales.dtype}")
    if in_features % scales.shape[-2] or weight.shape[-1] not in (in_features, in_features // 2):
        raise ValueError(
            f"weight {tuple(weight.shape)} with scales {tuple(scales.shape)} does not take {in_features} input features"
        )
    return 8 if weight.shape[-1] == in_features else 4


def dequantise(*, weight: Tensor, scales: Tensor | None, in_features: int) -> Tensor:
    """Float32 weight [..., N, K] of any of the three formats (leading dims: experts)."""
    bits = weight_bits(weight=weight, scales=scales, in_features=in_features)
    if scales is None:
        return weight.float()
    groups = scales.shape[-2]
    if bits == 4:
        packed = weight.unflatten(-1, (groups, -1))
        codes = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    else:
        codes = weight.unflatten(-1, (groups, -1))
    scale, shift = scales.float().unsqueeze(-1).unbind(-2)  # each [..., N, groups, 1]
    return ((codes.float() - MIDDLE_CODE[bits]) * scale + shift).flatten(-2)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Unit-offset RMSNorm in float32: x / rms(x) * (1 + weight) over the last dim; float32 out."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1.0 + weight.float())


def reference_linear(
    *,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + norm(x) @ weight.T, float32 inside, one rounding to x's dtype at the end.

    x [..., K]; weight and scales as above; norm_weight [K] or None; residual [..., N] or None. Returns [..., N]."""
    wide = dequantise(weight=weight, scales=scales, in_features=x.shape[-1])
    y = rms_norm(x=x, weight=norm_weight, eps=eps) if norm_weight is not None else x.float()
    y = torch.nn.functional.linear(y, wide)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


# --- up to GEMV_ROWS rows ---


@triton.jit
def gemv_kernel(
    x_ptr, w_ptr, s_ptr, norm_ptr, res_ptr, y_ptr, x_stride,
    EPS: tl.constexpr, M: tl.constexpr, TOGETHER: tl.constexpr, FORMAT: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, n] for TOGETHER successive m, a divisor of M, and TILES x BLOCK_N outputs n, whose weights are read once. Grid (blocks
    * M / TOGETHER), m fastest: programs that share weights start together. One dimension, because only the first may exceed
    65,535."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    program = tl.program_id(0).to(tl.int64)
    shares: tl.constexpr = M // TOGETHER
    whole: tl.constexpr = FORMAT[ROWS] % (BLOCK_N * TILES) == 0
    m, start = program % shares * TOGETHER, program // shares * (BLOCK_N * TILES)
    # From here offsets are relative to the program's first row: int32 is enough within it.
    w_ptr, s_ptr = at_row(w_ptr, s_ptr, start, FORMAT)
    rows_left = tl.minimum(FORMAT[ROWS] - start, BLOCK_N * TILES).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    words, pair = load_rows(w_ptr, s_ptr, row, row < rows_left, FORMAT, CACHE, whole)
    norm = load_norm(norm_ptr, HAS_NORM, FORMAT)
    ready = after_previous(PDL)
    x_ptr += ready
    res_ptr += m * FORMAT[ROWS] + start + ready
    y_ptr += m * FORMAT[ROWS] + start + ready
    # At once: after the sums all would wait for it.
    extra = load_extra(res_ptr, row, rows_left, TOGETHER, HAS_RESIDUAL, FORMAT, "")
    features, scale = (), ()
    for i in tl.static_range(TOGETHER):
        own, r = load_row_features(x_ptr + (m + i) * x_stride, norm, EPS, HAS_NORM, FORMAT, LIMBS)
        features, scale = features + (own,), scale + (r,)  # type: ignore[assignment]
    for tile in tl.static_range(TILES):
        here = row + tile * BLOCK_N
        ahead_words, ahead_pair, ahead_extra = words, pair, extra
        if tile + 1 < TILES:  # the next rows are on their way while these are summed
            ahead = here + BLOCK_N
            ahead_words, ahead_pair = load_rows(w_ptr, s_ptr, ahead, ahead < rows_left, FORMAT, CACHE, whole)
            ahead_extra = load_extra(res_ptr, ahead, rows_left, TOGETHER, HAS_RESIDUAL, FORMAT, "")
        for i in tl.static_range(TOGETHER):
            y = scale[i] * dot_rows_by_four(words, pair, features[i], FORMAT, LIMBS, INTERPRETED)
            if HAS_RESIDUAL:
                y += extra[i]
            tl.store(y_ptr + i * FORMAT[ROWS] + here, y.to(y_ptr.dtype.element_ty), mask=here < rows_left)
        words, pair, extra = ahead_words, ahead_pair, ahead_extra


@triton.jit
def load_extra(
    res_ptr, row, rows_left, TOGETHER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FORMAT: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """What is added to the products of `row` [rows] with each of TOGETHER activations, float32; without a residual nothing."""
    extra = ()
    if HAS_RESIDUAL:
        for i in tl.static_range(TOGETHER):
            found = tl.load(res_ptr + i * FORMAT[ROWS] + row, mask=row < rows_left, other=0.0, cache_modifier=CACHE)
            found = found.to(tl.float32)
            extra = extra + (found,)  # type: ignore[assignment]
    return extra


# --- launch ---

GEMV_ROWS = 8  # beyond, a weight is used often enough for tensor cores
# Elements that are dequantised in memory at most: not a vocabulary's, whose rows are few though only the call knows how many.
MATMUL_MOST = 2**27


def gemv_key(*, bits: int, rows: int, in_features: int, tokens: int, packed: bool = False) -> str:
    """Of the table's row; of packed activations, and with more `tokens` than one, rows of activations, a row of their own may
    come first."""
    parts = [tuning.weight_class(bits), f"{rows}x{in_features}", *(["packed"] if packed else [])]
    return "/".join([*parts, *([str(tokens)] if tokens > 1 else [])])


def gemv_config(
    *, bits: int, rows: int, in_features: int, tokens: int = 1, arch: str | None = None, packed: bool = False
) -> dict:  # fmt: skip
    """Launch parameters of the GEMV; unlisted shapes get tiles of <= 16 KiB, less where the GPU would idle."""
    block = max(1, min(16, 16384 * 8 // (in_features * bits), max(4, rows // 512)))
    rule = {"BLOCK_N": 1 << (block.bit_length() - 1), "TILES": 1, "CACHE": ".cg", "num_warps": 4, "TOGETHER": 1, "VECTOR": 4}
    key = gemv_key(bits=bits, rows=rows, in_features=in_features, tokens=tokens, packed=packed)
    return tuning.lookup("gemv", key, arch, rule=rule)


def weight_format(*, weight: Tensor, scales: Tensor | None, in_features: int, name: str) -> tuple[int, int]:
    """(bits, group) of a stored weight that a kernel may read; 32 bits: float32; group = in_features without scales.

    `ValueError` where layout, dtype or device is not what the kernels take."""
    bits = weight_bits(weight=weight, scales=scales, in_features=in_features)
    for tensor, what in ((weight, name), (scales, f"scales of {name}")):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{what} has strides {tensor.stride()}; the kernels take contiguous weights, call .contiguous()")
    if scales is None:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} without scales is {weight.dtype}; supported: float32, bfloat16, float16")
        bits = weight.element_size() * 8
        if in_features * bits % 32:
            raise ValueError(f"{name} has rows of {in_features} {weight.dtype} features; supported: even numbers")
        return bits, in_features
    group = in_features // scales.shape[-2]
    if tuple(scales.shape) != (*weight.shape[:-1], in_features // group, 2):
        raise ValueError(
            f"scales of {name} are {tuple(scales.shape)}; supported: {(*weight.shape[:-1], in_features // group, 2)}"
        )
    if group * bits % 32:
        raise ValueError(f"{name} has groups of {group} {bits}-bit weights; supported: multiples of {32 // bits}")
    return bits, group


def flat_rows(tensor: Tensor, *, name: str, features: int) -> Tensor:
    """[..., features] -> [rows, features] without a copy. `ValueError` where only a copy could do that."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {tensor.dtype}; supported: float32, bfloat16, float16")
    if tensor.shape[-1] != features:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its last dimension must be {features}")
    # With a symbolic number of rows the question itself would specialise the exported graph; view() then decides.
    if tensor.stride(-1) != 1 or (isinstance(tensor.numel(), int) and not tensor.is_contiguous()):
        raise ValueError(f"{name} has strides {tensor.stride()}; the kernels take contiguous activations")
    return tensor.view(-1, features)


def few_rows(rows: int | torch.SymInt) -> bool:
    """Whether the GEMV serves: a fixed row count up to GEMV_ROWS. A symbolic one never does, nor is it guarded on."""
    return isinstance(rows, int) and rows <= GEMV_ROWS


def kernel_for(
    *, rows: int | torch.SymInt, bits: int, group: int, out_features: int, features: int, arch: str | None = None,
    half: bool = True, always: bool = False,
) -> str:  # fmt: skip
    """What serves so many rows of such a weight: "gemv", "tile", "gemm" or "matmul". half: the activations have 2 bytes; always:
    the tile wherever it can."""
    key = f"{tuning.weight_class(bits)}/{out_features}x{features}"
    limits = tuning.lookup("linear_rows", key, arch)
    if isinstance(rows, int) and tile_serves(rows=rows, bits=bits, group=group):
        if always or limits["TILE_FROM"] <= rows < limits["GEMM_FROM"]:
            return "tile"
    if few_rows(rows):
        return "gemv"
    many = limits["MATMUL_FROM"] is not None and (not isinstance(rows, int) or rows >= limits["MATMUL_FROM"])
    return "matmul" if half and many and out_features * features <= MATMUL_MOST else "gemm"


def launch_gemv(
    *, x: Tensor, weight: Tensor, scales: Tensor | None, norm_weight: Tensor | None, eps: float,
    residual: Tensor | None, out: Tensor, bits: int, group: int, config: dict | None = None,
) -> None:  # fmt: skip
    """out [M, N] = residual + norm(x [M, K]) @ weight.T; all flat, checked, residual and out contiguous."""
    (tokens, features), rows = x.shape, weight.shape[0]
    config = config or gemv_config(
        bits=bits, rows=rows, in_features=features, tokens=tokens, arch=tuning.architecture(x.device)
    )  # fmt: skip
    launch = {name: value for name, value in config.items() if name != "VECTOR"}
    form = matrix_format(weight, bits=bits, group=group, widest=config["VECTOR"])
    grid = (tokens // config["TOGETHER"] * triton.cdiv(rows, config["BLOCK_N"] * config["TILES"]),)
    wrap_triton(gemv_kernel)[grid](
        x, weight, weight if scales is None else scales, x if norm_weight is None else norm_weight,
        x if residual is None else residual, out, x.stride(0),
        EPS=eps, M=tokens, FORMAT=form, HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        INTERPRETED=not x.is_cuda, PDL=has_pdl(x), **launch,
    )  # fmt: skip


def launch_linear(
    *, x: Tensor, weight: Tensor, scales: Tensor | None, norm_weight: Tensor | None, eps: float, residual: Tensor | None,
    limbs: Tensor | None, units: Tensor | None, always: bool,
) -> Tensor:  # fmt: skip
    """Checks the arguments of `linear` and runs the kernel for its rows; `always` as in `kernel_for`."""
    features, out_features = x.shape[-1], weight.shape[0]
    bits, group = weight_format(weight=weight, scales=scales, in_features=features, name="weight")
    flat = flat_rows(x, name="x", features=features)
    extra = None if residual is None else flat_rows(residual, name="residual", features=out_features)
    if norm_weight is not None:
        check_argument(norm_weight, name="norm_weight", shape=(features,), dtypes=FLOATS)
    rows = flat.shape[0]
    kernel = kernel_for(
        rows=rows, bits=bits, group=group, out_features=out_features, features=features,
        arch=tuning.architecture(x.device), half=x.element_size() == 2, always=always,
    )  # fmt: skip
    common: dict[str, Any] = {"weight": weight, "scales": scales, "residual": extra, "bits": bits, "group": group}
    if kernel in ("gemm", "matmul") and norm_weight is not None:
        flat = launch_rms_norm(x=flat, norm_weight=norm_weight, eps=eps, dtype=x.dtype)
    if kernel == "matmul":
        return matmul(x=flat, **common).view(*x.shape[:-1], out_features)
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    common |= {"x": flat, "out": y.view(-1, out_features)}
    if kernel == "gemm":
        launch_gemm(**common)
    elif kernel == "tile":
        made = check_limbs(limbs, units, x=flat, group=group, norm_weight=norm_weight)
        launch_tile(norm_weight=norm_weight, eps=eps, made=made, **common)
    elif rows:
        launch_gemv(norm_weight=norm_weight, eps=eps, **common)
    return y


@triton_op("moeexp::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    limbs: Tensor | None = None,
    units: Tensor | None = None,
) -> Tensor:
    """`reference_linear` on the GPU; the same arguments, by keyword. x, weight, norm_weight and residual contiguous. limbs and
    units: those of x (`parts/limbs.py`), where who made x made them, which spares the tile to make them; others have no use
    for them.

    `ValueError` for strides or dtypes that the kernels do not take."""
    return launch_linear(
        x=x, weight=weight, scales=scales, norm_weight=norm_weight, eps=eps, residual=residual, limbs=limbs, units=units,
        always=False,
    )  # fmt: skip


@triton_op("moeexp::linear_tile", mutates_args=())
def linear_tile(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear`, with 1 to 32 rows always on the tile: for weights that the tile takes, int4 and int8 in groups of 64 or 128, a
    row's result does not depend, to the bit, on how many rows there are, up to 32 of them."""
    return launch_linear(
        x=x, weight=weight, scales=scales, norm_weight=norm_weight, eps=eps, residual=residual, limbs=None, units=None,
        always=True,
    )  # fmt: skip
