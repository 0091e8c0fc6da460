"""Gated delta net between its input and output projections: causal conv, delta rule, gated RMSNorm.

Shape letters: B batch, T tokens of this call, Hk / Hv key / value heads (Hv a multiple of Hk), Dk / Dv their dims,
C = 2*Hk*Dk + Hv*Dv conv channels, W conv width.

    proj             [B, T, C + Hv*Dv + 2*Hv]  rows of the input projection: q | k | v | z | b | a
    conv_weight      [C, W]      depthwise causal filter, newest input last
    a_log, dt_bias   [Hv]        float32
    norm_weight      [Dv]        gated RMSNorm (no unit offset)
    conv_state       [B, C, W-1] proj's dtype, last inputs of the conv, oldest first; updated in place
    recurrent_state  [B, Hv, Dk, Dv] float32; updated in place
    returns          [B, T, Hv*Dv] proj's dtype

Per value head, with q and k l2-normalised, q scaled by Dk^-0.5, decay a_t = exp(-exp(a_log) * softplus(a + dt_bias)) and
beta_t = sigmoid(b):   S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})^T k_t))^T,   o_t = S_t^T q_t.
Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv:2412.06464), and its chunked form in section 3.3.

Here is the kernel of `gdn_decode`; that of `gdn_prefill` is in gated_delta_prefill.py, the references of both are in
gated_delta_reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gated_delta_reference import L2_EPS, check_gdn
from moeexp_kernels.ops.linear_tile import launch_limbs
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import LENGTH, UNPACKED, columns_of_vectors, store_vectors
from moeexp_kernels.parts.limbs import empty_limbs, store_part_limbs
from moeexp_kernels.parts.matrix import BITS, ROWS, VECTOR
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next

FEW_PROGRAMS = 64  # batch * Hk up to which an H100 is far from full: the table's key says `few`, else `many`
MAX_TOKENS = 32  # of one call, each of them code of its own


@triton.jit
def _gates(a, b, a_log, dt_bias):
    """Log-decay -exp(a_log) * softplus(a + dt_bias), and beta = sigmoid(b); all float32."""
    x = a + dt_bias
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    # log1p(e) without losing a small e to the rounding of 1 + e: the error of log(u) and that of u - 1 cancel.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return -tl.exp(a_log) * tl.where(x > 20.0, x, log1p), tl.sigmoid(b)


@triton.jit
def _next_conv_state(
    proj, conv_state, first, count, T, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """The conv state that T tokens leave behind, the last WIDTH - 1 of old state | tokens, for channels first .. first +
    count - 1, flat as it lies in memory: [BLOCK], count * (WIDTH - 1) of it used, in the storage dtype.
    `proj`, `conv_state`: pointers to one sequence's rows and state."""
    flat = tl.arange(0, BLOCK)
    source = (flat % (WIDTH - 1)).to(tl.int64) + T  # position in old state | tokens
    inside = flat < count * (WIDTH - 1)
    old = inside & (source < WIDTH - 1)
    new = inside & (source >= WIDTH - 1)
    kept = tl.load(conv_state + first * (WIDTH - 1) + flat + T, mask=old, other=0.0, cache_modifier=CACHE)
    at = (source - (WIDTH - 1)) * stride_t + first + flat // (WIDTH - 1)
    return tl.where(old, kept, tl.load(proj + at, mask=new, other=0.0, cache_modifier=CACHE))


@triton.jit
def _store_conv_state(conv_state, first, count, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    flat = tl.arange(0, BLOCK)
    tl.store(conv_state + first * (WIDTH - 1) + flat, values, mask=flat < count * (WIDTH - 1))


@triton.jit
def _conv_window(conv_state, conv_weight, channels, inside, WIDTH: tl.constexpr):
    """The conv's taps and the inputs before this call, oldest first, for `channels` [...] of one sequence, float32."""
    taps, kept = (), ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(conv_weight + channels * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
        taps = taps + (weight,)  # type: ignore[assignment]
    for i in tl.static_range(WIDTH - 1):
        kept = kept + (tl.load(conv_state + channels * (WIDTH - 1) + i, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return taps, kept


@triton.jit
def _conv_past(taps, inputs, TOKEN: tl.constexpr):
    """The causal conv's sum over the inputs before a token; inputs: those before this call, then this call's."""
    mixed = inputs[TOKEN] * taps[0]
    for tap in tl.static_range(1, len(taps) - 1):
        mixed = tl.fma(inputs[TOKEN + tap], taps[tap], mixed)
    return mixed


@triton.jit
def _conv_now(taps, inputs, past, TOKEN: tl.constexpr):
    """SiLU of the conv, with the token's own input."""
    mixed = tl.fma(inputs[TOKEN + len(taps) - 1], taps[len(taps) - 1], past)
    return mixed * tl.sigmoid(mixed)


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _decode_kernel(
    proj, conv_weight, a_log, dt_bias, norm_weight, conv_state, state, raw, sums, stride_b, stride_t,
    TOKENS: tl.constexpr, L2_EPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (Hv * SPLIT, B), SPLIT programs of BV columns for each value head: the state, in place, which is read once and
    written once for all TOKENS, and S^T q of each into `raw` [B, T, Hv, Dv] float32. The conv state is left alone, because
    several programs read the same channels of it. HEADS: Hk, Hv, Dk, Dv. With ACT (`act.py`) other than UNPACKED, `raw` is
    packed rows of S^T q times norm_weight * silu(z), of which a program has whole vectors of columns, and `sums`
    [B, T, Hv, SPLIT] float32 are the squares of S^T q, summed over a program's columns.

    A barrier stands between the loads and the stores of state: where a tile has fewer elements than the CTA has threads,
    several warps load the same element."""
    HK: tl.constexpr = HEADS[0]
    HV: tl.constexpr = HEADS[1]
    DK: tl.constexpr = HEADS[2]
    DV: tl.constexpr = HEADS[3]
    CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
    PACKS: tl.constexpr = ACT[ROWS] > 0
    LIMBS: tl.constexpr = 2 if proj.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    head = tl.program_id(0) // SPLIT
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BK)
    cols = tl.program_id(0) % SPLIT * BV + tl.arange(0, BV)
    if PACKS:
        vectors: tl.constexpr = BV * ACT[BITS] // 32 // ACT[VECTOR]
        cols = columns_of_vectors(tl.program_id(0) % SPLIT * vectors, BV, ACT)
    in_k = rows < DK
    in_v = cols < DV
    in_tile = in_k[:, None] & in_v[None, :]
    proj += batch * stride_b
    conv_state += batch * CHANNELS * (WIDTH - 1)
    state += (batch * HV + head) * (DK * DV)
    if PACKS:
        raw += batch * TOKENS * ACT[LENGTH]
    else:
        raw += (batch * TOKENS * HV + head) * DV
    sums += batch * TOKENS * HV * SPLIT + tl.program_id(0)
    tile = rows[:, None] * DV + cols[None, :]

    # What was there before this call, the state first: it is most of the bytes.
    held = tl.load(state + tile, mask=in_tile, other=0.0)
    q_channel = head // (HV // HK) * DK + rows
    k_channel = HK * DK + q_channel
    v_channel = 2 * HK * DK + head * DV + cols
    q_taps, q_in = _conv_window(conv_state, conv_weight, q_channel, in_k, WIDTH)
    k_taps, k_in = _conv_window(conv_state, conv_weight, k_channel, in_k, WIDTH)
    v_taps, v_in = _conv_window(conv_state, conv_weight, v_channel, in_v, WIDTH)
    q_past, k_past, v_past = _conv_past(q_taps, q_in, 0), _conv_past(k_taps, k_in, 0), _conv_past(v_taps, v_in, 0)
    a_log_h = tl.load(a_log + head)
    dt_bias_h = tl.load(dt_bias + head)
    if PACKS:
        norm = tl.load(norm_weight + cols[None, :], mask=in_v[None, :], other=0.0).to(tl.float32)

    ready = after_previous(PDL)
    proj += ready
    state += ready
    raw += ready
    sums += ready
    # As a tile of which the first row is stored: as a vector it would change its layout, for which all warps write the same
    # values to the same shared memory.
    first = in_v[None, :] & (rows == 0)[:, None]
    # `cols`, so that the compiler sees no longer runs than of the state's: two bytes an element would have all in runs of 8.
    at = cols // 4 * 4 + cols % 4
    # All tokens' inputs at once: behind a token's barriers the next one's would wait again.
    a_rows, b_rows, z_rows = (), (), ()
    for token in tl.static_range(TOKENS):
        row = proj + token * stride_t
        q_in = q_in + (tl.load(row + q_channel, mask=in_k, other=0.0).to(tl.float32),)
        k_in = k_in + (tl.load(row + k_channel, mask=in_k, other=0.0).to(tl.float32),)
        v_in = v_in + (tl.load(row + v_channel, mask=in_v, other=0.0).to(tl.float32),)
        b_rows = b_rows + (tl.load(row + CHANNELS + HV * DV + head),)  # type: ignore[assignment]
        a_rows = a_rows + (tl.load(row + CHANNELS + HV * DV + HV + head),)  # type: ignore[assignment]
        if PACKS:
            z = tl.load(row + CHANNELS + head * DV + cols[None, :], mask=in_v[None, :], other=0.0).to(tl.float32)
            z_rows = z_rows + (norm * z * tl.sigmoid(z),)  # type: ignore[assignment]
    for token in tl.static_range(TOKENS):
        if token > 0:
            q_past = _conv_past(q_taps, q_in, token)
            k_past = _conv_past(k_taps, k_in, token)
            v_past = _conv_past(v_taps, v_in, token)
        q = _conv_now(q_taps, q_in, q_past, token)
        k = _conv_now(k_taps, k_in, k_past, token)
        v = _conv_now(v_taps, v_in, v_past, token)
        log_decay, beta = _gates(a_rows[token].to(tl.float32), b_rows[token].to(tl.float32), a_log_h, dt_bias_h)
        decay = tl.exp(log_decay)
        # Rounded before they are summed: where a product fuses with the first sum across lanes, each lane of a pair has another.
        qq, kk, qk = tl.reduce((tl.fma(q, q, 0.0), tl.fma(k, k, 0.0), tl.fma(q, k, 0.0)), 0, _add_three)
        q_norm = tl.rsqrt(qq + L2_EPS) * DK**-0.5
        k_norm = tl.rsqrt(kk + L2_EPS)
        qk = qk * q_norm * k_norm
        # S_new^T q = decay S^T q + (k.q) delta: both reductions run over the held tile, with one wait instead of two; and the
        # l2 norms are applied to their results, so that the tile waits for no other reduction.
        seen, asked = tl.reduce((held * k[:, None], held * q[:, None]), 0, _add_two)
        seen = seen * k_norm
        asked = asked * q_norm
        # Which of two products an addition fuses with is the compiler's choice, which need not be the same for every token of
        # a call: here it is written out.
        delta = beta * tl.fma(-decay, seen, v)
        held = tl.fma(held, decay, k[:, None] * (k_norm * delta)[None, :])
        if token == TOKENS - 1:
            tl.debug_barrier()
            tl.store(state + tile, held, mask=in_tile)
        out = tl.fma(decay, asked, qk * delta)[None, :]
        if PACKS:
            squares = tl.sum(out * out, axis=1)
            tl.store(sums + token * HV * SPLIT + tl.arange(0, 1), squares)
            store_vectors(raw + token * ACT[LENGTH], out * z_rows[token], tl.program_id(0) * vectors, ACT, LIMBS)
        else:
            tl.store(raw + token * HV * DV + (at[None, :] + rows[:, None] * 0), out, mask=first)


@triton.jit
def _finish_kernel(
    proj, norm_weight, conv_state, raw, out, limbs_ptr, units_ptr, stride_b, stride_t,
    TOKENS: tl.constexpr, EPS: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    SLICE: tl.constexpr, BV: tl.constexpr, FLAT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """After `_decode_kernel`, grid (Hv, B, TOKENS): gated norm of one head of one token, with GROUP, a divisor of Dv, also as
    limbs; and, by the programs of the first one, the conv state of SLICE channels.

    Only `raw` is the previous kernel's result. What else is read lies there since before that kernel, which reads it too;
    past L1, which may hold what an older token left there."""
    head, token = tl.program_id(0), tl.program_id(2)
    batch = tl.program_id(1).to(tl.int64)
    proj += batch * stride_b + start_next(PDL)
    conv_state += batch * CHANNELS * (WIDTH - 1)
    cols = tl.arange(0, BV)
    in_v = cols < DV
    first = head * SLICE
    count = tl.where(token == 0, tl.minimum(SLICE, CHANNELS - first), 0)
    z = tl.load(proj + token * stride_t + CHANNELS + head * DV + cols, mask=in_v, other=0.0, cache_modifier=".cg").to(tl.float32)
    gate = tl.load(norm_weight + cols, mask=in_v, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    kept = _next_conv_state(proj, conv_state, first, count, TOKENS, stride_t, WIDTH, FLAT, ".cg")
    ready = after_previous(PDL)
    cell = ((batch * TOKENS + token) * HV + head) * DV + cols
    o = tl.load(raw + ready + cell, mask=in_v, other=0.0)
    y = (o * tl.rsqrt(tl.sum(o * o, axis=0) / DV + EPS) * gate).to(out.dtype.element_ty)
    tl.store(out + ready + cell, y, mask=in_v)
    if GROUP:
        row, values = batch * TOKENS + token, y.to(tl.float32)
        store_part_limbs(limbs_ptr + ready, units_ptr + ready, values, row, head * DV, HV * DV, GROUP, out.dtype.element_ty)
    tl.debug_barrier()
    _store_conv_state(conv_state + ready, first, count, kept, WIDTH, FLAT)


def decode_key(*, batch: int, k_heads: int, v_heads: int, dims: tuple[int, int]) -> str:
    """Key of the tuning table: "128x128/few/32" of so many value heads, while there are few programs. dims: rounded up."""
    few = "few" if batch * k_heads <= FEW_PROGRAMS else "many"
    return f"{dims[0]}x{dims[1]}/{few}/{v_heads}"


def decode_launch(*, proj: Tensor, k_heads: int, v_heads: int, dims: tuple[int, int]) -> tuple[int, int]:
    """(SPLIT, warps) of `_decode_kernel`. dims: of a head."""
    pad_k, pad_v = (triton.next_power_of_2(dim) for dim in dims)
    key = decode_key(batch=proj.shape[0], k_heads=k_heads, v_heads=v_heads, dims=(pad_k, pad_v))
    tuned = tuning.lookup("gdn_decode", key, tuning.architecture(proj.device))
    split = min(tuned["split"], pad_v)
    # At least four elements of the tile a thread: with fewer, threads hold the same ones and write them to the same places.
    return split, max(1, min(tuned["num_warps"], pad_k * pad_v // split // (32 * 4)))


def launch_delta_rule(
    *, proj: Tensor, conv_weight: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, conv_state: Tensor,
    recurrent_state: Tensor, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int,
    act: tuple[int, ...] = UNPACKED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(raw, sums) that `_decode_kernel` leaves, sums being anything where raw is not packed. act: ACT of a packed row (`act.py`),
    of which a program's columns are whole vectors. Checks the arguments of the ops of a step. The conv state is left alone."""
    check_gdn(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )  # fmt: skip
    batch, tokens = proj.shape[0], proj.shape[1]
    if not isinstance(tokens, int) or not 0 < tokens <= MAX_TOKENS:
        raise ValueError(f"gdn_decode takes 1 to {MAX_TOKENS} tokens per call, got {tokens}; use gdn_prefill")
    pad_k, pad_v = triton.next_power_of_2(head_k_dim), triton.next_power_of_2(head_v_dim)
    split, warps = decode_launch(proj=proj, k_heads=num_k_heads, v_heads=num_v_heads, dims=(head_k_dim, head_v_dim))
    if act == UNPACKED:
        raw = torch.empty(batch, tokens, num_v_heads, head_v_dim, dtype=torch.float32, device=proj.device)
        sums = raw
    else:
        raw = torch.empty(batch, tokens, act[7], dtype=torch.int32, device=proj.device)
        sums = torch.empty(batch, tokens, num_v_heads, split, dtype=torch.float32, device=proj.device)
    wrap_triton(_decode_kernel)[(num_v_heads * split, batch, 1)](
        proj, conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state, raw, sums, proj.stride(0), proj.stride(1),
        TOKENS=tokens, L2_EPS=L2_EPS, HEADS=(num_k_heads, num_v_heads, head_k_dim, head_v_dim), WIDTH=conv_weight.shape[1],
        SPLIT=split, BK=pad_k, BV=pad_v // split, ACT=act, PDL=has_pdl(proj), num_warps=warps,
    )  # fmt: skip
    return raw, sums


def launch_gdn_decode(
    *, proj: Tensor, conv_weight: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, conv_state: Tensor,
    recurrent_state: Tensor, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int, eps: float, group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, limbs, units), the last two of out in groups of `group`, or anything without: runs the kernels of both ops."""
    raw, _ = launch_delta_rule(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )  # fmt: skip
    (batch, tokens, _), (channels, width) = proj.shape, conv_weight.shape
    pad_v, per_program = triton.next_power_of_2(head_v_dim), triton.cdiv(channels, num_v_heads)
    row = num_v_heads * head_v_dim
    out = torch.empty(batch, tokens, row, dtype=proj.dtype, device=proj.device)
    limbs, units = out, out
    whole = group if group and head_v_dim == pad_v and head_v_dim % group == 0 else 0  # a head is so many groups
    if whole:
        limbs, units = empty_limbs(rows=batch * tokens, features=row, group=group, dtype=out.dtype, device=out.device)
    wrap_triton(_finish_kernel)[(num_v_heads, batch, tokens)](
        proj, norm_weight, conv_state, raw, out, limbs, units, proj.stride(0), proj.stride(1), TOKENS=tokens, EPS=eps,
        HV=num_v_heads, DV=head_v_dim, CHANNELS=channels, WIDTH=width, SLICE=per_program, BV=pad_v,
        FLAT=triton.next_power_of_2(per_program * (width - 1)), GROUP=whole, PDL=has_pdl(proj), num_warps=4,
    )  # fmt: skip
    if group and not whole:
        limbs, units = launch_limbs(x=out.view(-1, row), norm_weight=None, eps=0.0, group=group)
    return out, limbs, units


@triton_op("moeexp::gdn_decode", mutates_args=("conv_state", "recurrent_state"))
def gdn_decode(
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
) -> Tensor:
    """`reference_gdn_decode` ("recurrent") of a few tokens, one after the other: the state is read once and written once, in
    place; a second, small kernel does what needs a whole head (the gated norm) or every program's reads done (the conv state).
    To the bit what as many calls of one token compute.

    Shapes as in the module's docstring; conv_state and recurrent_state are mutated. `ValueError` for a T that is over 32 or
    symbolic, head dims over 128, a conv width below 2, a dtype other than float32 or bfloat16, or strides that `check_gdn`
    names."""
    out, _, _ = launch_gdn_decode(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim, eps=eps,
    )  # fmt: skip
    return out


@triton_op("moeexp::gdn_decode_limbs", mutates_args=("conv_state", "recurrent_state"))
def gdn_decode_limbs(
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
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gdn_decode`, and its result as limbs and units in groups of `group`, which `linear` takes (`parts/limbs.py`). A head
    that is no whole groups, of a power of 2 of features, costs a kernel more."""
    return launch_gdn_decode(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim, eps=eps, group=group,
    )  # fmt: skip
