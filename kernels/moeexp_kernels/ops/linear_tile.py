"""Few rows of activations times a stored int4 or int8 weight, which is read once for all of them; `linear`'s middle part.

Shape letters and weight formats: `linear.py`; limbs: `parts/limbs.py`; the product: `parts/int8_tile.py`. Two kernels: the first
writes every row's limbs, normed; the second multiplies. The second may start while the first, and the kernel before that,
still run, and its weights are on their way by then.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int8_tile import GROUPS_SERVED, load_tile, multiply_held
from moeexp_kernels.parts.limbs import empty_limbs, limbs_of, store_limbs
from moeexp_kernels.parts.matrix import FEATURES, GROUP, ROWS, at_row, matrix_format
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next

MOST_ROWS = 32


@triton.jit
def limbs_kernel(
    x_ptr, norm_ptr, limbs_ptr, units_ptr, gate_ptr, gates_ptr,
    EPS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LIMBS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr, PDL: tl.constexpr, START_NEXT: tl.constexpr,
):  # fmt: skip
    """Limbs and units of norm(x), a program a row; GROUPS = K / GROUP, rounded up to a power of 2. HAS_GATE: also
    gates[m] = sigmoid(norm(x) @ gate). START_NEXT: the product's kernel starts, and asks for its weights, while this one still
    waits."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = k < K
    if HAS_NORM:
        norm = 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + k, mask=mask, other=0.0).to(tl.float32)
    x_ptr += start_next(PDL and START_NEXT)
    ready = after_previous(PDL)
    x_ptr += ready
    limbs_ptr += m * (LIMBS * K) + ready
    units_ptr += m * (K // GROUP * 2) + ready
    x = tl.load(x_ptr + m * K + k, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0
    if HAS_NORM:
        factor = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + EPS)
        x *= norm
    store_limbs(limbs_ptr, units_ptr, x, factor, K, GROUP, GROUPS, LIMBS)
    if HAS_GATE:
        tl.store(gates_ptr + ready + m, tl.sigmoid(factor * tl.sum(tl.sum(x * gate, axis=1), axis=0)))


@triton.jit
def linear_tile_kernel(
    limbs_ptr, units_ptr, w_ptr, s_ptr, res_ptr, y_ptr, M,
    FORMAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    PASSES: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, n] of all M rows, COLUMNS at a time, BLOCKS times, and TILES x BLOCK_N outputs n a program, for which a block of rows
    is loaded once; several blocks have one tile. Before the wait it reads weights and nothing else: `limbs_kernel`
    relies on that."""
    LIMBS: tl.constexpr = 3 if y_ptr.dtype.element_ty == tl.float32 else 2  # as `limbs_of`
    N: tl.constexpr = FORMAT[ROWS]
    K: tl.constexpr = FORMAT[FEATURES]
    whole: tl.constexpr = N % (BLOCK_N * TILES) == 0
    start = tl.program_id(0).to(tl.int64) * (BLOCK_N * TILES)
    # From here offsets are relative to the program's first row: int32 is enough within it.
    w_ptr, s_ptr = at_row(w_ptr, s_ptr, start, FORMAT)
    rows_left = tl.minimum(N - start, BLOCK_N * TILES).to(tl.int32)
    weights = load_tile(w_ptr, s_ptr, rows_left, FORMAT, BLOCK_N, PASSES, CACHE, whole)
    ready = after_previous(PDL)
    limbs_ptr += ready
    units_ptr += ready
    res_ptr += start + ready
    y_ptr += start + ready
    n, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, COLUMNS)[None, :]
    for block in range(BLOCKS):
        m = tl.cast(block, tl.int64) * COLUMNS
        left = M - block * COLUMNS
        limbs, units = limbs_ptr + m * (LIMBS * K), units_ptr + m * (K // FORMAT[GROUP] * 2)
        held = ((), ())
        for tile in tl.static_range(TILES):
            here = n + tile * BLOCK_N
            ahead = weights
            if tile + 1 < TILES:  # the next rows are on their way while these are multiplied
                below, scales = at_row(w_ptr, s_ptr, (tile + 1) * BLOCK_N, FORMAT)
                ahead = load_tile(below, scales, rows_left - (tile + 1) * BLOCK_N, FORMAT, BLOCK_N, PASSES, CACHE, whole)
            mask = column < left if whole else (here < rows_left) & (column < left)
            extra = 0.0
            if HAS_RESIDUAL:  # at once: after the sums all would wait for it
                extra = tl.load(res_ptr + m * N + column * N + here, mask=mask, other=0.0).to(tl.float32)
            y, held = multiply_held(weights, held, limbs, units, left, FORMAT, LIMBS, COLUMNS, SPLIT, INTERPRETED)
            if HAS_RESIDUAL:
                y += extra
            tl.store(y_ptr + m * N + column * N + here, y.to(y_ptr.dtype.element_ty), mask=mask)
            weights = ahead


def tile_serves(*, rows: int, bits: int, group: int) -> bool:
    """Whether the tile takes so many rows and such a weight (bits and group as `weight_format` finds them)."""
    return 1 <= rows <= MOST_ROWS and bits in (4, 8) and group in GROUPS_SERVED


def columns_of(rows: int) -> int:
    """Rows of activations of one product: what the rows are padded to."""
    return max(8, triton.next_power_of_2(rows))


def tile_key(*, bits: int, out_features: int, features: int, rows: int) -> str:
    """Key of the tuning table: "int4/12352x2048/8/3" for 3 rows, after which "int4/12352x2048/8" serves 1 to 8."""
    return f"{tuning.weight_class(bits)}/{out_features}x{features}/{columns_of(rows)}/{rows}"


def launch_limbs(
    *, x: Tensor, norm_weight: Tensor | None, eps: float, group: int, dtype: torch.dtype | None = None,
    gate: Tensor | None = None, gates: Tensor | None = None, **launch: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(limbs, units) of norm(x [M, K]); flat and checked. dtype: whose limbs, x's if None. gates [M] float32 gets
    sigmoid(norm(x) @ gate [K]). launch: what replaces entries of the table's row."""
    rows, features = x.shape
    dtype = dtype or x.dtype
    limbs, units = empty_limbs(rows=rows, features=features, group=group, dtype=dtype, device=x.device)
    config = tuning.lookup("limbs", f"{tuning.activation_class(dtype)}/{features}", tuning.architecture(x.device))
    wrap_triton(limbs_kernel)[(rows,)](
        x, x if norm_weight is None else norm_weight, limbs, units, x if gate is None else gate,
        units if gates is None else gates, EPS=eps, K=features, GROUP=group,
        GROUPS=triton.next_power_of_2(features // group), LIMBS=limbs_of(dtype), HAS_NORM=norm_weight is not None,
        HAS_GATE=gate is not None, PDL=has_pdl(x), **(config | launch),
    )  # fmt: skip
    return limbs, units


def tile_constants(*, groups: int, config: dict, cuda: bool) -> dict:
    """The row of a product's table as constants of its kernel: with PASSES that so many groups have, and SPLIT."""
    passes = min(config["PASSES"], groups)
    split = min(groups // passes, config["num_warps"]) if cuda else 1
    return config | {"PASSES": passes, "SPLIT": split}


def launch_product(
    *, limbs: Tensor, units: Tensor, weight: Tensor, scales: Tensor, residual: Tensor | None, out: Tensor, bits: int,
    group: int, config: dict | None = None,
) -> None:  # fmt: skip
    """out [M, N] = residual + activations in limbs [M, LIMBS, K] @ weight.T; all flat, checked, and out contiguous."""
    rows, _, features = limbs.shape
    out_features = weight.shape[0]
    key = tile_key(bits=bits, out_features=out_features, features=features, rows=rows)
    config = config or tuning.lookup("linear_tile", key, tuning.architecture(limbs.device))
    blocks = triton.cdiv(rows, config["COLUMNS"])
    config = config | {"TILES": config["TILES"] if blocks == 1 else 1}
    wrap_triton(linear_tile_kernel)[(triton.cdiv(out_features, config["BLOCK_N"] * config["TILES"]),)](
        limbs, units, weight, scales, out if residual is None else residual, out, rows,
        FORMAT=matrix_format(weight, bits=bits, group=group), HAS_RESIDUAL=residual is not None,
        INTERPRETED=not limbs.is_cuda, PDL=has_pdl(limbs), BLOCKS=blocks, num_stages=1,
        **tile_constants(groups=triton.next_power_of_2(features // group), config=config, cuda=limbs.is_cuda),
    )  # fmt: skip


def launch_tile(
    *, x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, group: int,
    made: tuple[Tensor, Tensor] | None = None, **product: Any,
) -> None:  # fmt: skip
    """out [M, N] = residual + norm(x [M, K]) @ weight.T, M <= MOST_ROWS. made: (limbs, units) of x, where they are there;
    product: what else `launch_product` takes."""
    limbs, units = made or launch_limbs(x=x, norm_weight=norm_weight, eps=eps, group=group)
    launch_product(limbs=limbs, units=units, weight=weight, group=group, **product)
