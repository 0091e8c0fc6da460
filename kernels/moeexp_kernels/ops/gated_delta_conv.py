"""The first of `gdn_prefill`'s kernels: causal conv, SiLU and l2 norm of q and k, over all tokens of a prompt.

Shape letters and arguments: gated_delta.py; what follows: gated_delta_prefill.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

CONV_RUN = 8  # successive tokens per thread of the conv, which loads an input 1 + (W - 1) / 8 times; at least W - 1

# NET: the net's sizes as one constexpr, read by these names; a plain tuple, as FORMAT of `matrix.py` is, and why.
KEY_HEADS: tl.constexpr = tl.constexpr(0)  # Hk
VALUE_HEADS: tl.constexpr = tl.constexpr(1)  # Hv
KEY_DIM: tl.constexpr = tl.constexpr(2)  # Dk
VALUE_DIM: tl.constexpr = tl.constexpr(3)  # Dv
CONV_WIDTH: tl.constexpr = tl.constexpr(4)  # W
PADDED_KEY: tl.constexpr = tl.constexpr(5)  # Dk and Dv, rounded up to powers of 2: the tiles' sizes
PADDED_VALUE: tl.constexpr = tl.constexpr(6)


@triton.jit
def _conv_inputs(
    proj, conv_weight, start, T, stride_t, DIM: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
    WIDTH: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Tuples for DIM channels, at which the pointers are: RUN + WIDTH - 1 inputs [ROWS, BD], of which the i-th holds in row r
    token start + r * RUN + i - (WIDTH - 1); and WIDTH filter taps [BD] float32. Zero outside 0 .. T and past DIM.
    So an input is loaded once for all its taps, and all loads go out before one waits."""
    proj += start.to(tl.int64) * stride_t
    run = tl.arange(0, ROWS) * RUN
    dim = tl.arange(0, BD)
    in_dim = (dim < DIM)[None, :]
    inputs = ()
    for i in tl.static_range(RUN + WIDTH - 1):
        step = run + (i - (WIDTH - 1))
        inside = ((start + step >= 0) & (start + step < T))[:, None] & in_dim
        inputs = inputs + (tl.load(proj + (step[:, None] * stride_t + dim[None, :]), mask=inside, other=0.0),)  # type: ignore[assignment]
    # A channel's taps lie together: one wide load, then a column each.
    tap = tl.arange(0, TAPS)[None, :]
    inside = (dim < DIM)[:, None] & (tap < WIDTH)
    weights = tl.load(conv_weight + (dim[:, None] * WIDTH + tap), mask=inside, other=0.0).to(tl.float32)
    taps = ()
    for i in tl.static_range(WIDTH):
        taps = taps + (tl.sum(tl.where(tap == i, weights, 0.0), axis=1),)  # type: ignore[assignment]
    return inputs, taps


@triton.jit
def _conv_token(
    inputs, taps, conv_state, start, T, i: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    RUN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SiLU of the causal conv at the i-th token of every run: [ROWS, BD] float32, zero past T."""
    token = start + tl.arange(0, ROWS) * RUN + i
    mixed = inputs[i].to(tl.float32) * taps[0][None, :]
    for tap in tl.static_range(1, WIDTH):
        mixed += inputs[i + tap].to(tl.float32) * taps[tap][None, :]
    if i < WIDTH - 1:
        if start == 0:  # the window of the first run reaches into the state
            dim = tl.arange(0, BD)
            past = tl.zeros([BD], dtype=tl.float32)
            for tap in tl.static_range(WIDTH - 1 - i):
                kept = tl.load(conv_state + (dim * (WIDTH - 1) + (i + tap)), mask=dim < DIM, other=0.0)
                past += kept.to(tl.float32) * taps[tap]
            mixed += tl.where((token == i)[:, None], past[None, :], 0.0)
    return tl.where((token < T)[:, None], mixed * tl.sigmoid(mixed), 0.0)


@triton.jit
def conv_kernel(
    proj, conv_weight, conv_state, lengths, qk_out, v_out, T, N, stride_b, stride_t,
    L2_EPS: tl.constexpr, NET: tl.constexpr, TAPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
    HAS_VALID_LEN: tl.constexpr,
):  # fmt: skip
    """Grid (N * SIZE / (ROWS * RUN), 2 Hk + Hv, B). Writes q (scaled) and k to `qk_out` [B, 2 Hk, N, SIZE, BK], v to `v_out`
    [B, Hv, N, SIZE, BV]; zeros past T, or past `lengths` [B]: such tokens leave the state as it is."""
    HK: tl.constexpr = NET[KEY_HEADS]
    HV: tl.constexpr = NET[VALUE_HEADS]
    DK: tl.constexpr = NET[KEY_DIM]
    DV: tl.constexpr = NET[VALUE_DIM]
    WIDTH: tl.constexpr = NET[CONV_WIDTH]
    BK: tl.constexpr = NET[PADDED_KEY]
    BV: tl.constexpr = NET[PADDED_VALUE]
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_VALID_LEN:
        T = tl.load(lengths + batch).to(tl.int32)
    start = tl.program_id(0) * (ROWS * RUN)
    proj += batch * stride_b
    conv_state += batch * (2 * HK * DK + HV * DV) * (WIDTH - 1)
    run = tl.arange(0, ROWS) * RUN
    if head < 2 * HK:
        first = head * DK
        inputs, taps = _conv_inputs(proj + first, conv_weight + first * WIDTH, start, T, stride_t, DK, BK, ROWS, RUN, WIDTH, TAPS)
        conv_state += first * (WIDTH - 1)
        scale = tl.where(head < HK, DK**-0.5, 1.0)
        out = qk_out + ((batch * (2 * HK) + head) * N * SIZE + start) * BK
        for i in tl.static_range(RUN):
            x = _conv_token(inputs, taps, conv_state, start, T, i, DK, BK, ROWS, RUN, WIDTH)
            x *= (tl.rsqrt(tl.sum(x * x, axis=1) + L2_EPS) * scale)[:, None]
            tl.store(out + ((run + i)[:, None] * BK + tl.arange(0, BK)[None, :]), x.to(qk_out.dtype.element_ty))
    else:
        # Names of their own: where Dk and Dv differ, a name that both branches assign would have two types.
        value = head - 2 * HK
        first_v = 2 * HK * DK + value * DV
        inputs_v, taps_v = _conv_inputs(
            proj + first_v, conv_weight + first_v * WIDTH, start, T, stride_t, DV, BV, ROWS, RUN, WIDTH, TAPS
        )
        state_v = conv_state + first_v * (WIDTH - 1)
        out_v = v_out + ((batch * HV + value) * N * SIZE + start) * BV
        for i in tl.static_range(RUN):
            y = _conv_token(inputs_v, taps_v, state_v, start, T, i, DV, BV, ROWS, RUN, WIDTH)
            tl.store(out_v + ((run + i)[:, None] * BV + tl.arange(0, BV)[None, :]), y.to(v_out.dtype.element_ty))
