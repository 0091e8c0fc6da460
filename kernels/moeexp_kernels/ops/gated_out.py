"""A delta net's decode step with its output projection: the gated norm is shared by their two kernels and has none of its own.

    y[m, n] = residual[m, n] + sum_k W[n, k] * o[m, k] * r[m, head of k] * norm_weight[k % Dv] * silu(z[m, k]),
    r = 1 / rms of the head's o

`_decode_kernel` leaves o times the gate norm_weight * silu(z) as the integers that the GEMV multiplies, packed (`act.py`), and
each of its programs the sum of the squares of its columns of o. The GEMV multiplies the units by r, which is of those sums: a
head is whole quantisation groups and so whole vectors. It stores the conv state too, which `_decode_kernel`'s programs read.

Shape letters and arguments of the delta net: gated_delta.py. K = Hv * Dv input features, N outputs, M = B * T rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gated_delta import _next_conv_state, _store_conv_state, decode_launch, launch_delta_rule
from moeexp_kernels.ops.linear import flat_rows, gemv_config, load_extra, weight_format
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import LENGTH, act_format, load_packed_row
from moeexp_kernels.parts.int_dot import dot_rows_by_four, load_rows
from moeexp_kernels.parts.matrix import BITS, FEATURES, ROWS, VECTOR, WORDS, at_row, matrix_format
from moeexp_kernels.parts.pdl import after_previous, has_pdl


@triton.jit
def head_factors(sums_ptr, SPLIT: tl.constexpr, EPS: tl.constexpr, DV: tl.constexpr, FORMAT: tl.constexpr):
    """1 / rms of the head of each vector of a row, from its squares summed in SPLIT parts: [WORDS / VECTOR]."""
    each: tl.constexpr = DV * FORMAT[BITS] // 32 // FORMAT[VECTOR]  # vectors of a head
    part: tl.constexpr = 4 if SPLIT >= 4 else SPLIT  # what a thread loads at once
    head = tl.arange(0, FORMAT[WORDS] // FORMAT[VECTOR]) // each
    at = sums_ptr + (head * SPLIT)[:, None] + tl.arange(0, part)[None, :]
    inside = (head < FORMAT[FEATURES] // DV)[:, None]
    found = tl.load(at, mask=inside, other=0.0)
    for i in tl.static_range(1, SPLIT // part):
        found += tl.load(at + i * part, mask=inside, other=0.0)
    return tl.rsqrt(tl.sum(found, axis=1) * (1.0 / DV) + EPS)


@triton.jit
def with_unit(features, unit, LIMBS: tl.constexpr):
    """Features whose unit is another one."""
    if LIMBS == 1:
        return unit, features[1]
    else:
        return unit, features[1], features[2]


@triton.jit
def gated_gemv_kernel(
    raw_ptr, sums_ptr, proj_ptr, conv_ptr, w_ptr, s_ptr, res_ptr, y_ptr, stride_b, stride_t,
    EPS: tl.constexpr, M: tl.constexpr, STATE: tl.constexpr, ACT: tl.constexpr, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """After `_decode_kernel` with the same ACT; grid as `gemv_kernel`'s with TOGETHER = 1. STATE: tokens of a sequence, Dv, parts
    of a head's sum, C, W, and the channels whose conv state a program stores if its row is a sequence's first token, which with
    W - 1 of each are FLAT, rounded up.

    Only `raw` and `sums` are the previous kernel's results. What else is read lies there since before that kernel, which reads
    the conv state too; past L1, which may hold what an older token left there. So that kernel must not start this one early."""
    LIMBS: tl.constexpr = 2 if y_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    TOKENS: tl.constexpr = STATE[0]
    DV: tl.constexpr = STATE[1]
    SPLIT: tl.constexpr = STATE[2]
    CHANNELS: tl.constexpr = STATE[3]
    WIDTH: tl.constexpr = STATE[4]
    SLICE: tl.constexpr = STATE[5]
    FLAT: tl.constexpr = STATE[6]
    program = tl.program_id(0).to(tl.int64)
    whole: tl.constexpr = FORMAT[ROWS] % (BLOCK_N * TILES) == 0
    m, block = program % M, program // M
    batch, start = m // TOKENS, block * (BLOCK_N * TILES)
    w_ptr, s_ptr = at_row(w_ptr, s_ptr, start, FORMAT)
    rows_left = tl.minimum(FORMAT[ROWS] - start, BLOCK_N * TILES).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    words, pair = load_rows(w_ptr, s_ptr, row, row < rows_left, FORMAT, CACHE, whole)
    proj_ptr += batch * stride_b
    res_ptr += m * FORMAT[ROWS] + start
    extra = load_extra(res_ptr, row, rows_left, 1, True, FORMAT, ".cg")
    conv_ptr += batch * CHANNELS * (WIDTH - 1)
    first = block.to(tl.int32) * SLICE
    count = tl.where(m % TOKENS == 0, tl.minimum(SLICE, CHANNELS - first), 0)
    kept = _next_conv_state(proj_ptr, conv_ptr, first, count, TOKENS, stride_t, WIDTH, FLAT, ".cg")
    ready = after_previous(PDL)
    y_ptr += m * FORMAT[ROWS] + start + ready
    features = load_packed_row(raw_ptr + m * ACT[LENGTH] + ready, FORMAT, ACT, LIMBS)
    r = head_factors(sums_ptr + m * (FORMAT[FEATURES] // DV * SPLIT) + ready, SPLIT, EPS, DV, FORMAT)
    features = with_unit(features, features[0] * r, LIMBS)
    for tile in tl.static_range(TILES):
        here = row + tile * BLOCK_N
        ahead_words, ahead_pair, ahead_extra = words, pair, extra
        if tile + 1 < TILES:  # the next rows are on their way while these are summed
            ahead = here + BLOCK_N
            ahead_words, ahead_pair = load_rows(w_ptr, s_ptr, ahead, ahead < rows_left, FORMAT, CACHE, whole)
            ahead_extra = load_extra(res_ptr, ahead, rows_left, 1, True, FORMAT, ".cg")
        y = dot_rows_by_four(words, pair, features, FORMAT, LIMBS, INTERPRETED) + extra[0]
        tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=here < rows_left)
        words, pair, extra = ahead_words, ahead_pair, ahead_extra
    tl.debug_barrier()  # several threads may have read an element that one of them stores
    _store_conv_state(conv_ptr + ready, first, count, kept, WIDTH, FLAT)


def packed_vector(*, bits: int, group: int, head_v_dim: int, split: int) -> int:
    """VECTOR, words at most, of rows that `_decode_kernel` packs with SPLIT `split`, so that a program has whole vectors and a
    vector one head's factor; 0 where that cannot be."""
    whole = head_v_dim % group == 0 and head_v_dim & (head_v_dim - 1) == 0
    return head_v_dim // split * bits // 32 if bits in (4, 8) and whole else 0


@triton_op("moeexp::gdn_decode_out", mutates_args=("conv_state", "recurrent_state"))
def gdn_decode_out(
    proj: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    eps: float,
    weight: Tensor,
    scales: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """`linear` of `gdn_decode`'s result, with a residual [B, T, N], for few rows. What is between them is not rounded to proj's
    dtype: it is packed, to 2^-16 of a vector's largest, and before the norm's factor. `ValueError` too where a head is not whole
    groups of a quantised weight."""
    features, outputs = num_v_heads * head_v_dim, weight.shape[0]
    bits, group = weight_format(weight=weight, scales=scales, in_features=features, name="weight")
    delta: dict[str, Any] = {
        "proj": proj, "conv_weight": conv_weight, "a_log": a_log, "dt_bias": dt_bias, "norm_weight": norm_weight,
        "conv_state": conv_state, "recurrent_state": recurrent_state, "num_k_heads": num_k_heads, "num_v_heads": num_v_heads,
        "head_k_dim": head_k_dim, "head_v_dim": head_v_dim,
    }  # fmt: skip
    split, _ = decode_launch(proj=proj, k_heads=num_k_heads, v_heads=num_v_heads, dims=(head_k_dim, head_v_dim))
    vector = packed_vector(bits=bits, group=group, head_v_dim=head_v_dim, split=split)
    if not vector:
        raise ValueError(
            f"heads of {head_v_dim}, by {split} programs each, before a weight of {bits} bits in groups of {group}; supported: "
            "int4 and int8 weights, and heads of a power of 2 that are whole groups, of which a program has a word's columns"
        )
    (batch, tokens, _), (channels, width) = proj.shape, conv_weight.shape
    rows = batch * tokens
    extra = flat_rows(residual, name="residual", features=outputs)
    if extra.shape[0] != rows:
        raise ValueError(f"residual {tuple(residual.shape)} is not of {rows} rows")
    config = gemv_config(
        bits=bits, rows=outputs, in_features=features, tokens=rows, arch=tuning.architecture(proj.device), packed=True
    )  # fmt: skip
    launch = {name: value for name, value in config.items() if name not in ("VECTOR", "TOGETHER")}
    blocks = triton.cdiv(outputs, config["BLOCK_N"] * config["TILES"])
    each = triton.cdiv(channels, blocks)
    form = matrix_format(weight, bits=bits, group=group, widest=min(config["VECTOR"], vector))
    act = act_format(bits=bits, group=group, vector=form[5], features=features, dtype=proj.dtype)
    raw, sums = launch_delta_rule(**delta, act=act)
    state = tokens, head_v_dim, sums.shape[-1], channels, width, each, triton.next_power_of_2(each * (width - 1))
    y = torch.empty(batch, tokens, outputs, dtype=proj.dtype, device=proj.device)
    wrap_triton(gated_gemv_kernel)[(rows * blocks,)](
        raw, sums, proj, conv_state, weight, scales, extra, y, proj.stride(0), proj.stride(1),
        EPS=eps, M=rows, STATE=state, ACT=act, FORMAT=form, INTERPRETED=not proj.is_cuda, PDL=has_pdl(proj), **launch,
    )  # fmt: skip
    return y
