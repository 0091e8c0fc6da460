"""`gdn_prefill` in Triton: the chunked form of gated_delta.py, whose legend holds here too.

Four kernels, of which only the scan is sequential, so that only what needs the state is in it:
*conv* (gated_delta_conv.py), per (block of tokens, head): causal conv, SiLU and l2 norm, once per key head and not once per
value head.
*local*, per (chunk, value head), what a chunk knows without the state: with A the strictly lower triangular matrix of
`chunked_delta_rule` and X = (I + A)^-1,   w = -X (beta * decay * k)   and   u = X (beta * v).
*scan*, per (value head, rows of S^T), walks over the chunks with the state in registers; `to_end` is the decay from a token
to the chunk's end:   fresh = u + w S,   S = S * decay of the chunk + k^T (to_end * fresh).
*output*, per (chunk, value head): o = decay * (q S) + lower(q k^T * decay between) fresh, then the gated RMSNorm.
N: number of chunks. Scratch comes in tiles of one chunk and head, padded to powers of two and written in full, so that it is
read without masks. What the scan reads and writes by columns of Dv is stored transposed: its tiles are contiguous then, and
in the chain S^T -> fresh^T -> S^T only these small tiles pass through shared memory between products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeexp_kernels.ops.gated_delta import _gates, _next_conv_state, _store_conv_state
from moeexp_kernels.ops.gated_delta_conv import (
    CONV_RUN,
    CONV_WIDTH,
    KEY_DIM,
    KEY_HEADS,
    PADDED_KEY,
    PADDED_VALUE,
    VALUE_DIM,
    VALUE_HEADS,
    conv_kernel,
)
from moeexp_kernels.ops.gated_delta_reference import L2_EPS, check_gdn
from moeexp_kernels.parts import tuning

# The table's rows, by activation class and head dims. `chunk`: tokens per chunk, a power of two from 16. `conv_tokens`: tokens
# per conv program. `block_v`: rows of S^T per scan program, the scan's only parallelism beside heads. `precision` is that of
# float32 operands of tl.dot, `solve` that of the triangular inverse: with bfloat16 activations the inverse is rounded to
# bfloat16 anyway. "fp16" has tf32's mantissa at half the bytes and twice the speed; its range suffices, see `_inverse`.
# Exact float32 products have no tensor cores; chunks of 64 would unroll into minutes of compilation and spill.
# The scan keeps block_v below 64, so that its products are mma.sync with the tokens (or Dk) split over the warps. As
# warp-group products (sm_90a, Triton 3.6) an earlier scan read beyond its shared memory at head dims of 64. Its stages are
# cp.async buffers of w and k, (stages - 1) * 34 KB at 128 x 128; one warp spills, two hold 232 registers, four 136.
# Worth sweeping: conv_tokens 32 / 64 (conv warps 2 / 4), local warps 4 / 8, block_v 16 / 32, scan warps 2 / 4 / 8 and stages
# 2 / 3 / 4, output warps 4 / 8, chunk 32 / 64.
MIN_DOT = 16  # tl.dot's smallest side
MAX_ROW_STRIDE = 1 << 24  # elements; offsets within a chunk are 32 bits


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, acc=None):
    """a @ b, or acc + a @ b, in float32. PRECISION "fp16": operands rounded to float16. INTERPRETED: the interpreter has no
    product of bfloat16 or float16, and gets the same rounded values as float32."""
    if PRECISION == "fp16":
        a = a.to(tl.float16)
        b = b.to(tl.float16)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    INPUT: tl.constexpr = "ieee" if PRECISION == "fp16" else PRECISION
    return tl.dot(a, b, acc=acc, input_precision=INPUT)


@triton.jit
def _inverse(a, row, col, LEVELS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [2^LEVELS, 2^LEVELS] matrix, from its diagonal blocks of 2, 4, ...: with the
    inverses P, Q of a block's two halves and c the part of `a` below the first, the corner is -Q c P. This is block forward
    substitution, as stable as the row-wise one; a Neumann product would have to cancel large powers of a.

    In float16 nothing overflows: `a` holds products of unit keys with decays and betas in 0..1, and an entry of the inverse,
    or of c P, is such a key times a key that products of (I - beta k k^T), which never lengthen it, were applied to."""
    if PRECISION == "fp16":
        a = a.to(tl.float16)  # once and for all levels
    x = tl.where(row == col, 1.0, 0.0) - tl.where(row // 2 == col // 2, a, 0.0).to(tl.float32)
    for level in tl.static_range(1, LEVELS):
        same_block = row // (2 << level) == col // (2 << level)
        across_halves = row // (1 << level) != col // (1 << level)
        corner = tl.where(same_block & across_halves, a, 0.0)
        x = _dot(-x, _dot(corner, x, PRECISION, INTERPRETED), PRECISION, INTERPRETED, acc=x)
    return x


@triton.jit
def _local_kernel(
    proj, a_log, dt_bias, lengths, qk_in, v_in, w_out, u_out, decay_out, to_end_out, T, stride_b, stride_t,
    NET: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
    INTERPRETED: tl.constexpr, HAS_VALID_LEN: tl.constexpr,
):  # fmt: skip
    """Grid (N, Hv, B). Writes w [SIZE, BK], u^T [BV, SIZE], and per token the log-decay since the chunk's start and the decay
    until its end, float32. Tokens past T, or past `lengths`, have k = v = 0, get beta = 0 and do not decay."""
    HK: tl.constexpr = NET[KEY_HEADS]
    HV: tl.constexpr = NET[VALUE_HEADS]
    BK: tl.constexpr = NET[PADDED_KEY]
    BV: tl.constexpr = NET[PADDED_VALUE]
    GATES: tl.constexpr = 2 * HK * NET[KEY_DIM] + 2 * HV * NET[VALUE_DIM]
    dtype = w_out.dtype.element_ty
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_VALID_LEN:
        T = tl.load(lengths + batch).to(tl.int32)
    slot = (batch * HV + head) * tl.num_programs(0) + chunk
    key_slot = (batch * (2 * HK) + HK + head // (HV // HK)) * tl.num_programs(0) + chunk
    step = tl.arange(0, SIZE)
    row = step[:, None]
    col = step[None, :]
    dim_k = tl.arange(0, BK)
    dim_v = tl.arange(0, BV)
    valid = chunk * SIZE + step < T

    gates = proj + batch * stride_b + (chunk * SIZE + step).to(tl.int64) * stride_t + GATES + head
    b = tl.load(gates, mask=valid, other=0.0).to(tl.float32)
    a = tl.load(gates + HV, mask=valid, other=0.0).to(tl.float32)
    k = tl.load(qk_in + key_slot * (SIZE * BK) + (row * BK + dim_k[None, :]))
    v = tl.load(v_in + slot * (SIZE * BV) + (row * BV + dim_v[None, :]))  # early: used last

    log_decay, beta = _gates(a, b, tl.load(a_log + head), tl.load(dt_bias + head))
    beta = tl.where(valid, beta, 0.0)
    log_decay = tl.where(valid, log_decay, 0.0)
    decay = tl.cumsum(log_decay, axis=0)
    tl.store(decay_out + slot * SIZE + step, decay)
    tl.store(to_end_out + slot * SIZE + step, tl.exp(tl.sum(log_decay, axis=0) - decay))
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    below = row > col
    between = tl.exp(tl.where(below, decay[:, None] - decay[None, :], 0.0))
    system = tl.where(below, _dot(k, tl.trans(k), PRECISION, INTERPRETED) * between * beta[:, None], 0.0)
    x = _inverse(system, row, col, LEVELS, SOLVE, INTERPRETED)

    w = _dot((x * (-beta * tl.exp(decay))[None, :]).to(dtype), k, PRECISION, INTERPRETED)
    tl.store(w_out + slot * (SIZE * BK) + (row * BK + dim_k[None, :]), w.to(dtype))
    u = _dot((x * beta[None, :]).to(dtype), v, PRECISION, INTERPRETED)
    tl.store(u_out + slot * (SIZE * BV) + (dim_v[None, :] * SIZE + row), u.to(dtype))


@triton.jit
def _scan_kernel(
    qk_in, w_in, u_in, decay_in, to_end_in, proj, conv_state, lengths, state, fresh_out, start_out, T, N, stride_b,
    stride_t,
    NET: tl.constexpr, SIZE: tl.constexpr, BV: tl.constexpr, SLICE: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, HAS_VALID_LEN: tl.constexpr,
):  # fmt: skip
    """Grid (PAD_V / BV, Hv, B). Writes fresh^T [PAD_V, SIZE] and S^T at the chunk's start [PAD_V, BK] per chunk, the final
    state, and a slice of the conv state, which only the first kernel reads."""
    HK: tl.constexpr = NET[KEY_HEADS]
    HV: tl.constexpr = NET[VALUE_HEADS]
    DK: tl.constexpr = NET[KEY_DIM]
    DV: tl.constexpr = NET[VALUE_DIM]
    WIDTH: tl.constexpr = NET[CONV_WIDTH]
    BK: tl.constexpr = NET[PADDED_KEY]
    PAD_V: tl.constexpr = NET[PADDED_VALUE]
    CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    dtype = w_in.dtype.element_ty
    step = tl.arange(0, SIZE)
    dim_k = tl.arange(0, BK)
    cols = block * BV + tl.arange(0, BV)
    in_tile = (cols < DV)[:, None] & (dim_k < DK)[None, :]
    at_state = state + (batch * HV + head) * (DK * DV) + (dim_k[None, :] * DV + cols[:, None])
    s = tl.load(at_state, mask=in_tile, other=0.0)

    key = (batch * (2 * HK) + HK + head // (HV // HK)) * N
    value = (batch * HV + head) * N
    keys = step[:, None] * BK + dim_k[None, :]
    values = cols[:, None] * SIZE + step[None, :]
    states = cols[:, None] * BK + dim_k[None, :]
    # What no operand of a product is loaded from, the compiler does not fetch ahead: it is done by hand for u and `total`.
    u = tl.load(u_in + value * (SIZE * PAD_V) + values)
    total = tl.load(decay_in + value * SIZE + (SIZE - 1))
    for chunk in range(0, N):
        slot = value + chunk
        k = tl.load(qk_in + (key + chunk) * (SIZE * BK) + keys)
        w = tl.load(w_in + slot * (SIZE * BK) + keys)
        to_end = tl.load(to_end_in + slot * SIZE + step)
        following = value + tl.minimum(chunk + 1, N - 1)
        next_u = tl.load(u_in + following * (SIZE * PAD_V) + values)
        next_total = tl.load(decay_in + following * SIZE + (SIZE - 1))
        rounded = s.to(dtype)
        fresh = _dot(rounded, tl.trans(w), PRECISION, INTERPRETED, acc=u.to(tl.float32))
        s = _dot((fresh * to_end[None, :]).to(dtype), k, PRECISION, INTERPRETED, acc=s * tl.exp(total))
        tl.store(start_out + slot * (PAD_V * BK) + states, rounded)
        tl.store(fresh_out + slot * (SIZE * PAD_V) + values, fresh.to(dtype))
        u = next_u
        total = next_total

    if HAS_VALID_LEN:
        T = tl.load(lengths + batch).to(tl.int32)
    proj += batch * stride_b
    conv_state += batch * CHANNELS * (WIDTH - 1)
    first = (head * tl.num_programs(0) + block) * SLICE
    count = tl.minimum(SLICE, CHANNELS - first)
    kept = _next_conv_state(proj, conv_state, first, count, T, stride_t, WIDTH, FLAT, "")
    tl.debug_barrier()  # several threads may have loaded the same element
    tl.store(at_state, s, mask=in_tile)
    _store_conv_state(conv_state, first, count, kept, WIDTH, FLAT)


@triton.jit
def _output_kernel(
    qk_in, fresh_in, start_in, decay_in, proj, norm_weight, out, T, stride_b, stride_t,
    EPS: tl.constexpr, NET: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (N, Hv, B): o of the chunk from its fresh^T and start state, rmsnorm(o) * norm_weight * silu(z) to `out`."""
    HK: tl.constexpr = NET[KEY_HEADS]
    HV: tl.constexpr = NET[VALUE_HEADS]
    DV: tl.constexpr = NET[VALUE_DIM]
    BK: tl.constexpr = NET[PADDED_KEY]
    BV: tl.constexpr = NET[PADDED_VALUE]
    CHANNELS: tl.constexpr = 2 * HK * NET[KEY_DIM] + HV * DV
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    slot = (batch * HV + head) * tl.num_programs(0) + chunk
    query_slot = (batch * (2 * HK) + head // (HV // HK)) * tl.num_programs(0) + chunk
    key_slot = query_slot + HK * tl.num_programs(0)
    step = tl.arange(0, SIZE)
    dim_k = tl.arange(0, BK)
    dim_v = tl.arange(0, BV)
    keys = step[:, None] * BK + dim_k[None, :]
    q = tl.load(qk_in + query_slot * (SIZE * BK) + keys)
    k = tl.load(qk_in + key_slot * (SIZE * BK) + keys)
    decay = tl.load(decay_in + slot * SIZE + step)
    s = tl.load(start_in + slot * (BV * BK) + (dim_v[:, None] * BK + dim_k[None, :]))
    fresh = tl.load(fresh_in + slot * (SIZE * BV) + (dim_v[:, None] * SIZE + step[None, :]))

    lower = step[:, None] >= step[None, :]
    between = tl.exp(tl.where(lower, decay[:, None] - decay[None, :], 0.0))  # masked before exp, as in the local kernel
    pair = tl.where(lower, _dot(q, tl.trans(k), PRECISION, INTERPRETED) * between, 0.0)
    o = _dot(q, tl.trans(s), PRECISION, INTERPRETED) * tl.exp(decay)[:, None]
    o = _dot(pair.to(q.dtype), tl.trans(fresh), PRECISION, INTERPRETED, acc=o)

    tokens = (chunk * SIZE + step).to(tl.int64)
    inside = (tokens < T)[:, None] & (dim_v < DV)[None, :]
    at_z = (tokens * stride_t)[:, None] + (CHANNELS + head * DV + dim_v)[None, :]
    z = tl.load(proj + batch * stride_b + at_z, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + dim_v, mask=dim_v < DV, other=0.0).to(tl.float32)
    y = o * tl.rsqrt(tl.sum(o * o, axis=1) / DV + EPS)[:, None] * weight[None, :] * (z * tl.sigmoid(z))
    at = ((batch * T + tokens) * (HV * DV))[:, None] + (head * DV + dim_v)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


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
    valid_len: Tensor | None = None,
) -> Tensor:
    """Any T >= 1, `reference_gdn_prefill` in four kernels ("chunked"). At T = 1 it is also a (slow) `gdn_decode`.

    Shapes as in gated_delta.py's docstring; conv_state and recurrent_state are mutated, as if there were only `valid_len` tokens
    of each row where that is given. With bfloat16 activations q, k, v
    and the state are rounded to bfloat16 as operands of products, sums and the state itself stay float32. Scratch is about
    (1 + 2 Hk / Hv) Dk + 2 Dv + Dk Dv / chunk activations per value head and token. `ValueError` as `gdn_decode`, and for
    rows too far apart."""
    check_gdn(
        proj=proj, conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight, conv_state=conv_state,
        recurrent_state=recurrent_state, num_k_heads=num_k_heads, num_v_heads=num_v_heads, head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
    )  # fmt: skip
    if proj.stride(1) > MAX_ROW_STRIDE:
        raise ValueError(f"proj has a row stride of {proj.stride(1)} elements; at most {MAX_ROW_STRIDE} are supported")
    batch, tokens, _ = proj.shape
    channels, width = conv_weight.shape
    if width > CONV_RUN + 1:
        raise ValueError(f"conv width {width} is not supported by gdn_prefill; it does 2..{CONV_RUN + 1}, or use ops=reference")
    pad_k, pad_v = (max(MIN_DOT, triton.next_power_of_2(n)) for n in (head_k_dim, head_v_dim))
    key = f"{tuning.activation_class(proj.dtype)}/{pad_k}x{pad_v}"
    tuned = tuning.lookup("gdn_prefill", key, tuning.architecture(proj.device))
    size = tuned["chunk"]
    chunks = (tokens + size - 1) // size
    net = {"NET": (num_k_heads, num_v_heads, head_k_dim, head_v_dim, width, pad_k, pad_v)}
    strides = (proj.stride(0), proj.stride(1))
    lengths = proj if valid_len is None else valid_len  # not read without `valid_len`
    counts = {"HAS_VALID_LEN": valid_len is not None}
    products = {"PRECISION": tuned["precision"], "INTERPRETED": not proj.is_cuda}

    def scratch(heads: int, *tile: int, dtype: torch.dtype = proj.dtype) -> Tensor:
        return torch.empty(batch, heads, chunks, *tile, dtype=dtype, device=proj.device)

    qk, v = scratch(2 * num_k_heads, size, pad_k), scratch(num_v_heads, size, pad_v)
    conv_tokens = min(tuned["conv_tokens"], size)
    torch.library.wrap_triton(conv_kernel)[(chunks * (size // conv_tokens), 2 * num_k_heads + num_v_heads, batch)](
        proj, conv_weight, conv_state, lengths, qk, v, tokens, chunks, *strides, L2_EPS=L2_EPS, **net,
        TAPS=triton.next_power_of_2(width), SIZE=size, ROWS=conv_tokens // CONV_RUN, RUN=CONV_RUN, **counts, **tuned["conv"],
    )  # fmt: skip
    w, u = scratch(num_v_heads, size, pad_k), scratch(num_v_heads, pad_v, size)
    decay, to_end = (scratch(num_v_heads, size, dtype=torch.float32) for _ in range(2))
    torch.library.wrap_triton(_local_kernel)[(chunks, num_v_heads, batch)](
        proj, a_log, dt_bias, lengths, qk, v, w, u, decay, to_end, tokens, *strides, **net, SIZE=size,
        LEVELS=size.bit_length() - 1, SOLVE=tuned["solve"], **counts, **products, **tuned["local"],
    )  # fmt: skip
    fresh, start = v, scratch(num_v_heads, pad_v, pad_k)  # v has been read: its memory takes fresh^T
    block_v = min(tuned["block_v"], pad_v)
    blocks = pad_v // block_v
    per_program = triton.cdiv(channels, num_v_heads * blocks)
    torch.library.wrap_triton(_scan_kernel)[(blocks, num_v_heads, batch)](
        qk, w, u, decay, to_end, proj, conv_state, lengths, recurrent_state, fresh, start, tokens, chunks, *strides, **net,
        SIZE=size, BV=block_v, SLICE=per_program, FLAT=triton.next_power_of_2(per_program * (width - 1)),
        **counts, **products, **tuned["scan"],
    )  # fmt: skip
    out = torch.empty(batch, tokens, num_v_heads * head_v_dim, dtype=proj.dtype, device=proj.device)
    torch.library.wrap_triton(_output_kernel)[(chunks, num_v_heads, batch)](
        qk, fresh, start, decay, proj, norm_weight, out, tokens, *strides, EPS=eps, **net, SIZE=size,
        **products, **tuned["output"],
    )  # fmt: skip
    return out
