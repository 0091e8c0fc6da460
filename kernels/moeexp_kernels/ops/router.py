"""The router of a sparse mixture of experts: which experts a token takes, and with which shares.

Shape letters: B batch, T tokens of this call, D hidden, E experts, k experts per token, S max_seq_len.

    x            [B, T, D]     residual stream, *before* the norm, which the router applies itself
    norm_weight  [D]           unit-offset RMSNorm
    weight       [E, D] plain
    expert_ids   [B, S, k] int32, a trace of the choices; updated in place

`router` is two kernels, logits and choice: one CTA alone would read the weights at a hundredth of the GPU's bandwidth, and
CTAs that hand over to one another, or a router fused into the expert kernels, won nothing (docs/log.md).

`router_packed` also packs the normed row for the experts, in programs beside the choice, which would wait for the logits anyway.

A rounded logit would change which experts are chosen, so the normed float32 row must keep its bits on tensor cores. With many
rows and bfloat16 weights it is three bfloat16 limbs, h = a + b + c of 8 bits each, times the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.gemm import launch_gemm, launch_rms_norm
from moeexp_kernels.ops.linear import flat_rows, launch_gemv, rms_norm, weight_format
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import FLOATS, check_argument
from moeexp_kernels.parts.choice import choice, load_keys
from moeexp_kernels.parts.matrix import FEATURES, GROUP
from moeexp_kernels.parts.packed import (
    load_group_norm,
    load_share_gate,
    of_one_group,
    pack_factors,
    pack_group,
    packable,
    packed_format,
    packed_length,
)
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next


def reference_router(
    *,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    top_k: int,
    positions: Tensor,
    expert_ids: Tensor,
    valid_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(norm(x) @ weight.T), its k largest, renormalised to sum 1.

    weight [E, D] plain; positions [B] int64; expert_ids [B, S, k] int32 is a trace, written in place at slots
    [pos, pos + T), or [pos, pos + valid_len) where valid_len [B] int64 in 1..T is given. Returns (ids [B, T, k] int32, weights
    [B, T, k] float32), largest first."""
    batch, tokens = x.shape[:2]
    logits = F.linear(rms_norm(x=x, weight=norm_weight, eps=eps), weight.float())
    weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
    ids = ids.to(torch.int32)
    rows = torch.arange(batch, device=x.device)[:, None]
    slots, traced = positions[:, None] + torch.arange(tokens, device=x.device), ids
    if valid_len is not None:  # as in reference_qk_norm_rope
        index = torch.minimum(torch.arange(tokens, device=x.device), valid_len[:, None] - 1)
        slots, traced = positions[:, None] + index, ids[rows, index]
    slots = torch.where(slots >= 0, slots, expert_ids.shape[1])  # a position that is none must fail as an index
    # index_put_, not `expert_ids[...] = ids`: the latter strips leading ones, which forbids exporting T = 1.
    expert_ids.index_put_((rows, slots), traced)
    return ids, weights / weights.sum(-1, keepdim=True)


@triton.jit
def norm_limbs_kernel(
    x_ptr, norm_ptr, limbs_ptr, M, x_stride, K: tl.constexpr, EPS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """limbs [3, M, K] bfloat16, whose sum is norm(x) of one row in float32."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    left = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)) * (1.0 + norm)
    for limb in tl.static_range(3):
        part = left.to(tl.bfloat16)
        tl.store(limbs_ptr + (limb * M + m) * K + k, part, mask=k < K)
        left -= part.to(tl.float32)


@triton.jit
def limb_logits_kernel(
    limbs_ptr, w_ptr, y_ptr, M, E: tl.constexpr, K: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, E] float32 = (a + b + c) @ weight.T, the smallest limb first. INTERPRETED: float32 products, because Triton's
    interpreter multiplies the bit patterns of bfloat16."""
    dtype = tl.float32 if INTERPRETED else tl.bfloat16
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = limbs_ptr + m.to(tl.int64) * K
    step = tl.cast(M, tl.int64) * K  # M is a number, and no tensor, where it is 1
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        w = tl.load(w_ptr + start + (n[:, None] * K + k[None, :]), mask=(n < E)[:, None] & inside[None, :], other=0.0).to(dtype)
        mask = inside[:, None] & (m < M)[None, :]
        for limb in tl.static_range(3):
            h = tl.load((rows + (2 - limb) * step + start)[None, :] + k[:, None], mask=mask, other=0.0).to(dtype)
            acc = tl.dot(w, h, acc, input_precision="ieee")
    tl.store(y_ptr + (m.to(tl.int64) * E)[None, :] + n[:, None], acc, mask=(n < E)[:, None] & (m < M)[None, :])


@triton.jit
def choose_experts_kernel(
    logits_ptr, ids_ptr, weights_ptr, trace_ptr, positions_ptr, lengths_ptr, x_ptr, norm_ptr, gate_ptr, packed_ptr, T, S,
    trace_stride_b, trace_stride_s,
    SIZES: tl.constexpr, HAS_VALID_LEN: tl.constexpr, EPS: tl.constexpr, FORMAT: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The `choice` of one token, stored: ids, weights, and the trace where its position counts. Grid (tokens, 1), and if PACKED
    (tokens, 2 + groups of a row): the other programs pack x [M, K] for the experts, FORMAT and PART as of `pack_group`.
    SIZES: E, TOP_K, both rounded up to powers of 2, and PACKED. Positions are older than a step: past L1, which may hold the last
    token's."""
    E: tl.constexpr = SIZES[0]
    TOP_K: tl.constexpr = SIZES[1]
    PACKED: tl.constexpr = SIZES[4]
    m = tl.program_id(0).to(tl.int64)
    early = start_next(PDL)
    if tl.program_id(1) == 0:
        positions_ptr += early
        position = tl.load(positions_ptr + m // T, cache_modifier=".cg") + m % T
        length = tl.cast(T, tl.int64)
        if HAS_VALID_LEN:
            length = tl.load(lengths_ptr + m // T, cache_modifier=".cg")
        ready = after_previous(PDL)
        keys, e = load_keys(logits_ptr + ready + m * E, E, SIZES[2], 1)
        slot = tl.arange(0, SIZES[3])[None, :]
        ids, shares = choice(keys, e, slot, SIZES[2], TOP_K)
        tl.store(ids_ptr + ready + m * TOP_K + slot, ids, mask=slot < TOP_K)
        tl.store(weights_ptr + ready + m * TOP_K + slot, shares, mask=slot < TOP_K)
        # The session refuses positions outside the trace; here they must not reach other memory.
        counts = (position >= 0) & (position < S) & (m % T < length)
        limit = tl.where(counts, TOP_K, 0)
        trace_ptr += ready + m // T * trace_stride_b + position * trace_stride_s
        tl.store(trace_ptr + slot, ids, mask=slot < limit)
    elif PACKED:
        LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
        x_ptr += m * FORMAT[FEATURES] + early
        packed_ptr += m * PACKED
        group = tl.program_id(1) - 1
        groups: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
        if group < groups:
            pack_group(x_ptr, load_group_norm(norm_ptr, group, FORMAT, PART), packed_ptr, group, FORMAT, PART, LIMBS)
        else:
            pack_factors(x_ptr, load_share_gate(norm_ptr, gate_ptr, FORMAT, 1), packed_ptr, EPS, FORMAT, PACKED, 1)


# --- launch ---


def check_choice(*, batch: int | torch.SymInt, experts: int, top_k: int, positions: Tensor, expert_ids: Tensor) -> None:
    """`ValueError` for a choice, positions or a trace that the kernels do not take."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}; supported: 1..{experts}, the number of experts")
    fits = expert_ids.dim() == 3 and (expert_ids.shape[0], expert_ids.shape[2]) == (batch, top_k)
    if expert_ids.dtype != torch.int32 or not fits or expert_ids.stride(-1) != 1:
        raise ValueError(
            f"expert_ids is {expert_ids.dtype} {tuple(expert_ids.shape)} with strides {expert_ids.stride()}; "
            f"supported: int32 [{batch}, S, {top_k}], last dimension contiguous"
        )
    check_argument(positions, name="positions", shape=(batch,), dtypes=(torch.int64,))


def check_router(
    *, x: Tensor, norm_weight: Tensor, weight: Tensor, top_k: int, positions: Tensor, expert_ids: Tensor
) -> tuple[Tensor, int]:
    """(x as rows [B * T, D], bits of the weight). `ValueError` for what the kernels do not take."""
    features = x.shape[-1]
    check_choice(batch=x.shape[0], experts=weight.shape[0], top_k=top_k, positions=positions, expert_ids=expert_ids)
    check_argument(norm_weight, name="norm_weight", shape=(features,), dtypes=FLOATS)
    bits, _ = weight_format(weight=weight, scales=None, in_features=features, name="router weight")
    return flat_rows(x, name="x", features=features), bits


def check_packing(*, features: int, shared_gate: Tensor, bits: int, group: int) -> None:
    """`ValueError` where rows of so many features cannot be packed so, or shared_gate is none of theirs."""
    check_argument(shared_gate, name="shared_gate", shape=(1, features), dtypes=FLOATS)
    if not packable(bits=bits, group=group) or features % group:
        raise ValueError(
            f"rows of {features} features for {bits}-bit weights in groups of {group}; supported: 4 and 8 bits, "
            "groups of a power of 2 from 32 on that divide the features"
        )


def gemv_serves(*, rows: int | torch.SymInt, key: str, arch: str | None = None) -> bool:
    """Whether the logits of so many rows are a GEMV each: a symbolic number of rows never is, nor is it guarded on."""
    return isinstance(rows, int) and rows < tuning.lookup("router_rows", key, arch)["GEMM_FROM"]


def launch_logits(
    *, x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, logits: Tensor, common: dict[str, Any], arch: str, key: str
) -> None:  # fmt: skip
    """logits [M, E] of many rows x [M, D]. Other weights than bfloat16 are multiplied as float32
    is."""
    (experts, features), rows = weight.shape, x.shape[0]
    if weight.dtype != torch.bfloat16:
        h = launch_rms_norm(x=x, norm_weight=norm_weight, eps=eps, dtype=torch.float32)
        launch_gemm(x=h, config=tuning.lookup("router_gemm", key, arch), **common)
        return
    limbs = torch.empty((3, rows, features), dtype=torch.bfloat16, device=x.device)
    wrap_triton(norm_limbs_kernel)[(rows,)](
        x, norm_weight, limbs, rows, x.stride(0), K=features, EPS=eps, BLOCK_K=triton.next_power_of_2(features)
    )
    config = tuning.lookup("router_limbs", key, arch)
    wrap_triton(limb_logits_kernel)[(triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(experts, config["BLOCK_N"]))](
        limbs, weight, logits, rows, E=experts, K=features, INTERPRETED=not x.is_cuda, **config
    )


def launch_router(
    *, x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, top_k: int, positions: Tensor, expert_ids: Tensor,
    valid_len: Tensor | None, shared_gate: Tensor | None = None, pack_bits: int = 0, pack_group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids, weights, packed rows, or anything without pack_bits): checks the arguments of both ops and runs their kernels."""
    flat, bits = check_router(
        x=x, norm_weight=norm_weight, weight=weight, top_k=top_k, positions=positions, expert_ids=expert_ids
    )
    (experts, features), (batch, tokens) = weight.shape, x.shape[:2]
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    logits = torch.empty((batch * tokens, experts), **wide)
    ids = torch.empty((batch, tokens, top_k), dtype=torch.int32, device=x.device)
    weights = torch.empty((batch, tokens, top_k), **wide)
    common: dict[str, Any] = {"weight": weight, "scales": None, "residual": None, "out": logits, "bits": bits, "group": features}
    arch, key = tuning.architecture(x.device), f"{tuning.weight_class(bits)}/{experts}x{features}"
    if gemv_serves(rows=flat.shape[0], key=key, arch=arch):
        # The router's matrix is small: its row splits it so that every SM reads.
        config = tuning.lookup("router_gemv", key, arch)
        launch_gemv(x=flat, norm_weight=norm_weight, eps=eps, config=config, **common)
    else:
        launch_logits(x=flat, norm_weight=norm_weight, weight=weight, eps=eps, logits=logits, common=common, arch=arch, key=key)
    packed, parts, length = logits, 1, 0
    form = packed_format(bits=pack_bits or 4, group=pack_group or features, features=features)
    if pack_bits:
        length, parts = packed_length(form, x.dtype), features // pack_group + 2
        packed = torch.empty((batch * tokens, length), dtype=torch.int32, device=x.device)
    wrap_triton(choose_experts_kernel)[(flat.shape[0], parts)](
        logits, ids, weights, expert_ids, positions, positions if valid_len is None else valid_len, flat, norm_weight,
        norm_weight if shared_gate is None else shared_gate, packed, tokens, expert_ids.shape[1],
        expert_ids.stride(0), expert_ids.stride(1),
        SIZES=(experts, top_k, triton.next_power_of_2(experts), triton.next_power_of_2(top_k), length), EPS=eps,
        HAS_VALID_LEN=valid_len is not None, FORMAT=form, PART=of_one_group(form), PDL=has_pdl(x), num_warps=1,
    )  # fmt: skip
    return ids, weights, packed


@triton_op("moeexp::router", mutates_args={"expert_ids"})
def router(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    top_k: int,
    positions: Tensor,
    expert_ids: Tensor,
    valid_len: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_router` on the GPU; the same arguments, by keyword. Equal logits: the lowest index first.

    `ValueError` for strides, shapes or dtypes that the kernels do not take, or top_k beyond E."""
    ids, weights, _ = launch_router(
        x=x, norm_weight=norm_weight, weight=weight, eps=eps, top_k=top_k, positions=positions, expert_ids=expert_ids,
        valid_len=valid_len,
    )  # fmt: skip
    return ids, weights


@triton_op("moeexp::router_packed", mutates_args={"expert_ids"})
def router_packed(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    top_k: int,
    positions: Tensor,
    expert_ids: Tensor,
    shared_gate: Tensor,
    pack_bits: int,
    pack_group: int,
    valid_len: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`router`, and third the rows of norm(x) packed for experts of pack_bits in groups of pack_group (`parts/packed.py`), int32
    [B * T, length], which `moe_decode` takes, with the share of a shared expert gated by shared_gate [1, D]. `ValueError` too
    where such rows cannot be packed."""
    check_packing(features=x.shape[-1], shared_gate=shared_gate, bits=pack_bits, group=pack_group)
    return launch_router(
        x=x, norm_weight=norm_weight, weight=weight, eps=eps, top_k=top_k, positions=positions, expert_ids=expert_ids,
        valid_len=valid_len, shared_gate=shared_gate, pack_bits=pack_bits, pack_group=pack_group,
    )  # fmt: skip
