"""`gdn_prefill` in Triton: the chunked form of gated_delta.py, whose legend and references hold here too.

Three kernels. *Local*, one program per (chunk, value head): conv, l2 norms, gates, and all that a chunk can know without
the state: with A the strictly lower triangular matrix of `chunked_delta_rule` and X = (I + A)^-1,
    w = X (beta * decay * k),   u = X (beta * v),   pair = lower(q k^T * decay between),   and the decayed q and k.
*Scan*, one program per (value head, block of Dv), walks over the chunks with the state in registers:
    fresh = u - w S,   o = q_decayed S + pair fresh,   S = S * decay of the chunk + k_decayed^T fresh.
*Norm*: gated RMSNorm in place on o, which needs all of Dv.
N: number of chunks. Scratch is per (batch, value head, chunk), whole chunks, padded to powers of two and written in full.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gated_delta import L2_EPS, _gates, _next_conv_state, _store_conv_state, check_gdn

# The table's rows, by activation class and head dims. `chunk`: tokens per chunk, a power of two from 16. `block_v`: columns
# of Dv per scan program, the scan's only parallelism beside heads. `precision` is that of float32 operands of tl.dot, `solve`
# that of the triangular inverse: with bfloat16 activations the inverse is rounded to bfloat16 anyway. Exact float32 products
# have no tensor cores; chunks of 64 would unroll into minutes of compilation and spill.
# The scan gets two warps, so that its products are mma.sync: as warp-group products (four warps, sm_90a, Triton 3.6) it read
# beyond its shared memory at head dims of 64, pipelined or not. Sixteen columns, or two warps would spill.
MIN_DOT = 16  # tl.dot's smallest side
MAX_ROW_STRIDE = 1 << 24  # elements; offsets within a chunk are 32 bits


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32. WIDEN: the interpreter has no bfloat16 product, and gets the same rounded values as float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _conv_chunk(
    proj, conv_state, conv_weight, first, dim, in_dim, start, step, T, stride_t, WIDTH: tl.constexpr
):  # fmt: skip
    """SiLU of the causal conv at tokens start + step [SIZE], channels first + dim [N]; float32, zero past T and N.
    Pointers are to one sequence; within a chunk offsets fit 32 bits."""
    proj += start.to(tl.int64) * stride_t + first
    conv_weight += first * WIDTH
    conv_state += first * (WIDTH - 1)
    mixed = tl.zeros([step.shape[0], dim.shape[0]], dtype=tl.float32)
    for tap in range(WIDTH):  # not unrolled: one tap's loads in registers at a time
        source = step + (tap - (WIDTH - 1))
        weight = tl.load(conv_weight + dim * WIDTH + tap, mask=in_dim, other=0.0).to(tl.float32)
        inside = ((start + step < T) & (start + source >= 0))[:, None] & in_dim[None, :]
        offset = source[:, None] * stride_t + dim[None, :]
        mixed += tl.load(proj + offset, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    if start == 0:  # the only chunk whose window reaches into the state
        for tap in range(WIDTH - 1):
            past = step + tap
            weight = tl.load(conv_weight + dim * WIDTH + tap, mask=in_dim, other=0.0).to(tl.float32)
            before = ((step < T) & (past < WIDTH - 1))[:, None] & in_dim[None, :]
            kept = tl.load(conv_state + dim[None, :] * (WIDTH - 1) + past[:, None], mask=before, other=0.0)
            mixed += kept.to(tl.float32) * weight[None, :]
    return mixed * tl.sigmoid(mixed)


@triton.jit
def _inverse(a, row, col, LEVELS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [2^LEVELS, 2^LEVELS] matrix, from its diagonal blocks of 2, 4, ...: with the
    inverses P, Q of a block's two halves and c the part of `a` below the first, the corner is -Q c P. This is block forward
    substitution, as stable as the row-wise one; a Neumann product would have to cancel large powers of a."""
    x = tl.where(row == col, 1.0, 0.0) - tl.where(row // 2 == col // 2, a, 0.0)
    for level in tl.static_range(1, LEVELS):
        same_block = row // (2 << level) == col // (2 << level)
        across_halves = row // (1 << level) != col // (1 << level)
        corner = tl.where(same_block & across_halves, a, 0.0)
        x -= _dot(x, _dot(corner, x, PRECISION, WIDEN), PRECISION, WIDEN)
    return x


@triton.jit
def _local_kernel(
    proj, conv_weight, a_log, dt_bias, conv_state, lengths, w_out, u_out, q_out, k_out, pair_out, decay_out, T, stride_b,
    stride_t,
    L2_EPS: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
    WIDEN: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """Grid (N, Hv, B). Tokens past T, or past `lengths` [B], get q = k = v = 0, beta = 0 and no decay: they leave the state
    as it is."""
    CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
    dtype = w_out.dtype.element_ty
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_LIVE:
        T = tl.load(lengths + batch).to(tl.int32)
    proj += batch * stride_b
    conv_state += batch * CHANNELS * (WIDTH - 1)
    slot = (batch * HV + head) * tl.num_programs(0) + chunk
    step = tl.arange(0, SIZE)
    row = step[:, None]
    col = step[None, :]
    start = chunk * SIZE
    live = start + step < T
    dim_k = tl.arange(0, BK)
    dim_v = tl.arange(0, BV)
    in_k = dim_k < DK
    in_v = dim_v < DV

    gates = proj + (start + step).to(tl.int64) * stride_t + CHANNELS + HV * DV + head
    b = tl.load(gates, mask=live, other=0.0).to(tl.float32)
    a = tl.load(gates + HV, mask=live, other=0.0).to(tl.float32)
    log_decay, beta = _gates(a, b, tl.load(a_log + head), tl.load(dt_bias + head))
    beta = tl.where(live, beta, 0.0)
    decay = tl.cumsum(tl.where(live, log_decay, 0.0), axis=0)  # log of the decay since the chunk's start
    total = tl.sum(tl.where(step == SIZE - 1, decay, 0.0), axis=0)
    tl.store(decay_out + slot, total)
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    lower = row >= col
    between = tl.where(lower, tl.exp(tl.where(lower, decay[:, None] - decay[None, :], 0.0)), 0.0)
    from_start = tl.exp(decay)

    q_first = head // (HV // HK) * DK
    k = _conv_chunk(proj, conv_state, conv_weight, HK * DK + q_first, dim_k, in_k, start, step, T, stride_t, WIDTH)
    k = (k * tl.rsqrt(tl.sum(k * k, axis=1) + L2_EPS)[:, None]).to(dtype)
    system = tl.where(row > col, _dot(k, tl.trans(k), PRECISION, WIDEN) * between * beta[:, None], 0.0)
    x = _inverse(system, row, col, LEVELS, SOLVE, WIDEN).to(dtype)

    key_block = slot * (SIZE * BK) + row * BK + dim_k[None, :]
    value_block = slot * (SIZE * BV) + row * BV + dim_v[None, :]
    w = _dot(x, (k.to(tl.float32) * (beta * from_start)[:, None]).to(dtype), PRECISION, WIDEN)
    tl.store(w_out + key_block, w.to(dtype))
    tl.store(k_out + key_block, (k.to(tl.float32) * tl.exp(total - decay)[:, None]).to(dtype))

    q = _conv_chunk(proj, conv_state, conv_weight, q_first, dim_k, in_k, start, step, T, stride_t, WIDTH)
    q = q * (tl.rsqrt(tl.sum(q * q, axis=1) + L2_EPS) * DK**-0.5)[:, None]
    pair = _dot(q.to(dtype), tl.trans(k), PRECISION, WIDEN) * between
    tl.store(pair_out + slot * (SIZE * SIZE) + row * SIZE + col, pair.to(dtype))
    tl.store(q_out + key_block, (q * from_start[:, None]).to(dtype))

    v_first = 2 * HK * DK + head * DV
    v = _conv_chunk(proj, conv_state, conv_weight, v_first, dim_v, in_v, start, step, T, stride_t, WIDTH)
    u = _dot(x, (v * beta[:, None]).to(dtype), PRECISION, WIDEN)
    tl.store(u_out + value_block, u.to(dtype))


@triton.jit
def _scan_kernel(
    w_in, u_in, q_in, k_in, pair_in, decay_in, proj, conv_state, lengths, state, out, T, N, stride_b, stride_t,
    HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    BK: tl.constexpr, PAD_V: tl.constexpr, BV: tl.constexpr, SLICE: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, HAS_LIVE: tl.constexpr,
):  # fmt: skip
    """Grid (PAD_V / BV, Hv, B). Writes S^T q to `out` [B, T, Hv*Dv], the final state, and a slice of the conv state, which
    only the kernel before this one reads. Scratch is read unmasked: it is padded, and written in full."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    dtype = w_in.dtype.element_ty
    step = tl.arange(0, SIZE)
    dim_k = tl.arange(0, BK)
    cols = block * BV + tl.arange(0, BV)
    in_v = cols < DV
    in_tile = (dim_k < DK)[:, None] & in_v[None, :]
    at_state = state + (batch * HV + head) * (DK * DV) + dim_k[:, None] * DV + cols[None, :]
    s = tl.load(at_state, mask=in_tile, other=0.0)

    keys = step[:, None] * BK + dim_k[None, :]
    values = step[:, None] * PAD_V + cols[None, :]
    pairs = step[:, None] * SIZE + step[None, :]
    for chunk in range(0, N):
        slot = (batch * HV + head) * N + chunk
        w = tl.load(w_in + slot * (SIZE * BK) + keys)
        u = tl.load(u_in + slot * (SIZE * PAD_V) + values).to(tl.float32)
        q = tl.load(q_in + slot * (SIZE * BK) + keys)
        k = tl.load(k_in + slot * (SIZE * BK) + keys)
        pair = tl.load(pair_in + slot * (SIZE * SIZE) + pairs)
        total = tl.load(decay_in + slot)
        rounded = s.to(dtype)
        fresh = (u - _dot(w, rounded, PRECISION, WIDEN)).to(dtype)
        o = _dot(q, rounded, PRECISION, WIDEN) + _dot(pair, fresh, PRECISION, WIDEN)
        s = s * tl.exp(total) + _dot(tl.trans(k), fresh, PRECISION, WIDEN)
        tokens = chunk * SIZE + step
        at = ((batch * T + tokens) * (HV * DV))[:, None] + head * DV + cols[None, :]
        tl.store(out + at, o.to(out.dtype.element_ty), mask=(tokens < T)[:, None] & in_v[None, :])

    proj += batch * stride_b
    conv_state += batch * CHANNELS * (WIDTH - 1)
    first = (head * tl.num_programs(0) + block) * SLICE
    count = tl.minimum(SLICE, CHANNELS - first)
    if HAS_LIVE:
        T = tl.load(lengths + batch).to(tl.int32)
    kept = _next_conv_state(proj, conv_state, first, count, T, stride_t, WIDTH, FLAT)
    tl.debug_barrier()  # several warps may have loaded the same element
    tl.store(at_state, s, mask=in_tile)
    _store_conv_state(conv_state, first, count, kept, WIDTH, FLAT)


@triton.jit
def _norm_kernel(
    proj, norm_weight, out, T, stride_b, stride_t,
    EPS: tl.constexpr, HV: tl.constexpr, DV: tl.constexpr, CHANNELS: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (T / BT, Hv, B): out = rmsnorm(out) * norm_weight * silu(z), in place."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    cols = tl.arange(0, BV)
    live = (tokens < T)[:, None] & (cols < DV)[None, :]
    at = ((batch * T + tokens) * (HV * DV))[:, None] + head * DV + cols[None, :]
    at_z = batch * stride_b + (tokens * stride_t)[:, None] + CHANNELS + head * DV + cols[None, :]
    o = tl.load(out + at, mask=live, other=0.0).to(tl.float32)
    z = tl.load(proj + at_z, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + cols, mask=cols < DV, other=0.0).to(tl.float32)
    y = o * tl.rsqrt(tl.sum(o * o, axis=1) / DV + EPS)[:, None] * weight[None, :] * (z * tl.sigmoid(z))
    tl.debug_barrier()  # as in the scan
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


@torch.library.triton_op("moeexp::gdn_prefill", mutates_args=("conv_state", "recurrent_state"))
def gdn_prefill(
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
    live: Tensor | None = None,
) -> Tensor:
    """Any T >= 1, `reference_gdn_prefill` in three kernels ("chunked"). At T = 1 it is also a (slow) `gdn_decode`.

    Shapes as in gated_delta.py's docstring; conv_state and recurrent_state are mutated. With bfloat16 activations q, k, v
    and the state are rounded to bfloat16 as operands of products, sums and the state itself stay float32. Scratch is about
    3 Dk + Dv + 64 activations per value head and token. `ValueError` as `gdn_decode`, and for rows too far apart."""
    check_gdn(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )  # fmt: skip
    if proj.stride(1) > MAX_ROW_STRIDE:
        raise ValueError(f"proj has a row stride of {proj.stride(1)} elements; at most {MAX_ROW_STRIDE} are supported")
    batch, tokens, _ = proj.shape
    channels, width = conv_weight.shape
    pad_k, pad_v = (max(MIN_DOT, triton.next_power_of_2(n)) for n in (head_k_dim, head_v_dim))
    key = f"{tuning.activation_class(proj.dtype)}/{pad_k}x{pad_v}"
    tuned = tuning.lookup("gdn_prefill", key, tuning.architecture(proj.device))
    size = tuned["chunk"]
    block_v = min(tuned["block_v"], pad_v)
    chunks = (tokens + size - 1) // size
    widen = proj.device.type == "cpu"  # only the interpreter runs there
    lengths = proj if live is None else live  # not read without `live`

    def scratch(*shape: int, dtype: torch.dtype = proj.dtype) -> Tensor:
        return torch.empty(batch, num_v_heads, chunks, *shape, dtype=dtype, device=proj.device)

    w, q, k = (scratch(size, pad_k) for _ in range(3))
    u, pair, decay = scratch(size, pad_v), scratch(size, size), scratch(dtype=torch.float32)
    out = torch.empty(batch, tokens, num_v_heads * head_v_dim, dtype=proj.dtype, device=proj.device)
    torch.library.wrap_triton(_local_kernel)[(chunks, num_v_heads, batch)](
        proj, conv_weight, a_log, dt_bias, conv_state, lengths, w, u, q, k, pair, decay, tokens, proj.stride(0),
        proj.stride(1),
        L2_EPS=L2_EPS, HK=num_k_heads, HV=num_v_heads, DK=head_k_dim, DV=head_v_dim, WIDTH=width, SIZE=size,
        LEVELS=size.bit_length() - 1, BK=pad_k, BV=pad_v, PRECISION=tuned["precision"],
        SOLVE=tuned["solve"], WIDEN=widen, HAS_LIVE=live is not None, **tuned["local"],
    )  # fmt: skip
    blocks = pad_v // block_v
    per_program = triton.cdiv(channels, num_v_heads * blocks)
    torch.library.wrap_triton(_scan_kernel)[(blocks, num_v_heads, batch)](
        w, u, q, k, pair, decay, proj, conv_state, lengths, recurrent_state, out, tokens, chunks, proj.stride(0),
        proj.stride(1),
        HV=num_v_heads, DK=head_k_dim, DV=head_v_dim, CHANNELS=channels, WIDTH=width, SIZE=size, BK=pad_k, PAD_V=pad_v,
        BV=block_v, SLICE=per_program, FLAT=triton.next_power_of_2(per_program * (width - 1)), PRECISION=tuned["precision"],
        WIDEN=widen, HAS_LIVE=live is not None, **tuned["scan"],
    )  # fmt: skip
    norm_tokens = tuned["norm_tokens"]
    torch.library.wrap_triton(_norm_kernel)[((tokens + norm_tokens - 1) // norm_tokens, num_v_heads, batch)](
        proj, norm_weight, out, tokens, proj.stride(0), proj.stride(1),
        EPS=eps, HV=num_v_heads, DV=head_v_dim, CHANNELS=channels, BT=norm_tokens, BV=pad_v, **tuned["norm"],
    )  # fmt: skip
    return out
