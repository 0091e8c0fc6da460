"""One token's gated delta net with its output projection: the gated norm and the conv state are the projection's business.

Shape letters and arguments as in `gated_delta.py` and `linear.py`; K = Hv * Dv. `gdn_decode` needs a second kernel because
several programs share a head: its norm needs all of them, and the conv state may not change before all have read it. The
projection that follows waits for all of them anyway. Every program of it norms the whole row by itself, which takes less
time than a kernel more in the chain.

A norm's factor belongs to a head, and a chunk of weights (`words.py`) lies within one where the quantisation group divides
Dv: so the factor multiplies the chunk's unit, after the integers are made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gated_delta import (
    _next_conv_state,
    _store_conv_state,
    check_gdn,
    launch_rule,
    reference_gdn_decode,
)
from moeexp_kernels.ops.linear import (
    flat_rows,
    gemv_config,
    load_extra,
    planes,
    reference_linear,
    weight_format,
    word_counts,
)
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.pdl import after_previous, can_overlap
from moeexp_kernels.parts.prefetch import ahead_lengths, bring_into_l2
from moeexp_kernels.parts.words import dot_rows, features_of_words, load_rows, stored_features


def reference_gdn_decode_out(
    *, weight: Tensor, scales: Tensor | None, residual: Tensor, **gdn: Tensor | int | float
) -> Tensor:  # fmt: skip
    """residual + reference_gdn_decode(**gdn) @ weight.T: [B, 1, N], proj's dtype; the states are mutated."""
    out = reference_gdn_decode(**gdn)
    return reference_linear(x=out, weight=weight, scales=scales, residual=residual)


@triton.jit
def gdn_out_kernel(
    proj, norm_weight, conv_state, raw, squares, w_ptr, s_ptr, res_ptr, y_ptr, ahead_ptr, ahead_s_ptr, stride_b,
    EPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HV: tl.constexpr, HV_PADDED: tl.constexpr, DV: tl.constexpr,
    SPLIT: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, FLAT: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
    PLANES: tl.constexpr, FAST: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr, AHEAD_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, n] = residual[m, n] + sum over k of weight[n, k] * gated norm of raw[m, k]; grid and constants as `gemv_kernel`.

    squares [M, HV, SPLIT]: sums of raw's squares. The programs of a row share the HV slices, of SLICE channels, of its conv
    state."""
    K: tl.constexpr = HV * DV
    program = tl.program_id(0).to(tl.int64)
    m, block = program % M, (program // M).to(tl.int32)
    start = program // M * (BLOCK_N * TILES)
    w_ptr += start * (K // 2 if BITS == 4 else K)
    if BITS <= 8:
        s_ptr += start * (2 * (K // GROUP))
    rows_left = tl.minimum(N - start, BLOCK_N * TILES).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    words, pair = load_rows(w_ptr, s_ptr, row, row < rows_left, K, GROUP, BITS, WORDS, CHUNK, CACHE)
    if AHEAD:
        rows_left += bring_into_l2(ahead_ptr, AHEAD)
    if AHEAD_SCALES:
        rows_left += bring_into_l2(ahead_s_ptr, AHEAD_SCALES)
    # All but raw and squares was complete before the previous kernel, which reads it too; past L1, as in `_finish_kernel`.
    proj += m * stride_b
    conv_state += m * (CHANNELS * (WIDTH - 1))
    res_ptr += m * N + start
    extra = load_extra(res_ptr, row, rows_left, True, ".cg")
    k = stored_features(K, GROUP, BITS, WORDS)
    gate_low = gate_of(proj + CHANNELS, norm_weight, k, k < K, DV)
    gate_high = gate_low
    if BITS == 4:
        gate_high = gate_of(proj + CHANNELS, norm_weight, k + GROUP // 2, k < K, DV)
    ready = after_previous(OVERLAP)
    conv_state += ready
    raw += m * K + ready
    squares += m * (HV * SPLIT) + ready
    y_ptr += m * N + start + ready

    # Features in the order of the words, as in `load_row_features`.
    low = tl.load(raw + k, mask=k < K, other=0.0) * gate_low
    high = low
    if BITS == 4:
        high = tl.load(raw + k + GROUP // 2, mask=k < K, other=0.0) * gate_high
    head = tl.arange(0, HV_PADDED)
    part = tl.arange(0, SPLIT)
    squares += head[:, None] * SPLIT + part[None, :]
    total = tl.sum(tl.load(squares, mask=(head < HV)[:, None] & (part < SPLIT)[None, :], other=0.0), axis=1)
    r = 1.0 / tl.sqrt(total / DV + EPS)
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit = features_of_words(low, high, BITS, WORDS, CHUNK, PLANES)
    if BITS <= 8:
        unit *= spread(r, HV_PADDED, WORDS // CHUNK)
    else:
        factor = spread(r, HV_PADDED, WORDS)
        x0 *= factor
        x1 *= factor

    for tile in range(TILES):
        here = row + tile * BLOCK_N
        ahead_words, ahead_pair, ahead_extra = words, pair, extra
        if TILES > 1:
            ahead = here + BLOCK_N
            ahead_words, ahead_pair = load_rows(
                w_ptr, s_ptr, ahead, ahead < rows_left, K, GROUP, BITS, WORDS, CHUNK, CACHE
            )
            ahead_extra = load_extra(res_ptr, ahead, rows_left, True, ".cg")
        y = extra + dot_rows(
            words, pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, BITS, HALF, FAST, BLOCK_N, WORDS, CHUNK, PLANES
        )
        tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=here < rows_left)
        words, pair, extra = ahead_words, ahead_pair, ahead_extra

    blocks = tl.num_programs(0) // M
    for slice in range(block, HV, blocks):
        first = slice * SLICE
        count = tl.minimum(SLICE, CHANNELS - first)
        kept = _next_conv_state(proj, conv_state, first, count, 1, 0, WIDTH, FLAT, "")
        tl.debug_barrier()
        _store_conv_state(conv_state, first, count, kept, WIDTH, FLAT)


@triton.jit
def gate_of(z_ptr, norm_weight, k, mask, DV: tl.constexpr):
    """weight * SiLU(z) of features k, float32."""
    z = tl.load(z_ptr + k, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return tl.load(norm_weight + k % DV, mask=mask, other=0.0).to(tl.float32) * z * tl.sigmoid(z)


@triton.jit
def spread(factor, HEADS: tl.constexpr, LENGTH: tl.constexpr):
    """[HEADS] -> [LENGTH]: each head's factor for its LENGTH / HEADS neighbours."""
    each: tl.constexpr = LENGTH // HEADS
    return tl.reshape(tl.broadcast_to(factor[:, None], [HEADS, each]), [LENGTH])


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
    ahead: Tensor | None = None,
    ahead_scales: Tensor | None = None,
) -> Tensor:
    """T = 1, `reference_gdn_decode_out` in two kernels; the same arguments, by keyword, and `ahead` as in `linear`.
    conv_state and recurrent_state are mutated.

    `ValueError` for what `gdn_decode` or `linear` do not take, for a Dv that is no power of 2 of at least 32, and for a
    quantisation group that does not divide it."""
    check_gdn(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )  # fmt: skip
    batch, (channels, width), features, rows = proj.shape[0], conv_weight.shape, num_v_heads * head_v_dim, weight.shape[0]
    bits, group = weight_format(weight=weight, scales=scales, in_features=features, name="weight")
    check_heads(head_v_dim, group if scales is not None else None)
    extra = flat_rows(residual, name="residual", features=rows)
    raw, squares = launch_rule(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim, squares=True,
    )  # fmt: skip
    y = torch.empty(batch, 1, rows, dtype=proj.dtype, device=proj.device)
    words, chunk = word_counts(bits=bits, in_features=features, group=group)
    config = gemv_config(bits=bits, rows=rows, in_features=features, arch=tuning.architecture(proj.device))
    overlap = can_overlap(proj)
    bring, bring_scales = ahead_lengths(ahead, ahead_scales) if overlap else (0, 0)
    per_slice = triton.cdiv(channels, num_v_heads)
    wrap_triton(gdn_out_kernel)[(batch * triton.cdiv(rows, config["BLOCK_N"] * config["TILES"]),)](
        proj, norm_weight, conv_state, raw, squares, weight, weight if scales is None else scales, extra, y,
        weight if ahead is None else ahead, weight if ahead_scales is None else ahead_scales, proj.stride(0),
        EPS=eps, M=batch, N=rows, HV=num_v_heads, HV_PADDED=triton.next_power_of_2(num_v_heads), DV=head_v_dim,
        SPLIT=squares.shape[-1], CHANNELS=channels, WIDTH=width, SLICE=per_slice,
        FLAT=triton.next_power_of_2(per_slice * (width - 1)), GROUP=group, BITS=bits, HALF=weight.dtype == torch.float16,
        WORDS=words, CHUNK=chunk, PLANES=planes(proj.dtype), FAST=proj.is_cuda, OVERLAP=overlap, AHEAD=bring,
        AHEAD_SCALES=bring_scales, **config,
    )  # fmt: skip
    return y


def check_heads(head_v_dim: int, group: int | None) -> None:
    """`ValueError` unless every chunk of weights lies within one head."""
    if head_v_dim < 32 or head_v_dim & (head_v_dim - 1):
        raise ValueError(f"head_v_dim is {head_v_dim}; supported: powers of 2 from 32; use ops.gdn_decode=recurrent")
    if group is not None and head_v_dim % group:
        raise ValueError(
            f"groups of {group} weights do not divide head_v_dim {head_v_dim}; supported: divisors of it, such as "
            f"quant.group_size={min(64, head_v_dim)}; or use ops.gdn_decode=recurrent"
        )
