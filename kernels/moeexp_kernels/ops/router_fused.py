"""The router of `router.py` in one kernel for few tokens: the program that ends last makes the choice.

Shape letters and arguments as there. A program computes the logits of a block of experts for one token, stores them, and
counts itself in the last slot of the trace, which is zero before and after each call: element [b, S, 0] for sequence b. Who
finds that all others of its sequence have counted reads their logits back and chooses. Nobody waits for anybody, so that no
number of programs can deadlock, and one launch is saved, and the logits' way through a kernel boundary.

Why the reader sees every logit: a program's threads meet at a barrier after their stores, and one of them then adds to the
counter with release and acquire at the scope of the GPU, which covers what the barrier made it observe; the last one's add
has read every other's, and a second barrier hands its result to the threads that load. They load past L1, which no SM
keeps coherent with another's stores.
Source: PTX ISA, "Memory Consistency Model" (cumulativity of release and acquire patterns); the threadFenceReduction sample
of the CUDA toolkit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.linear import few_rows, planes, word_counts
from moeexp_kernels.ops.router import check_router, choose_experts, empty_results, launch_router, trace_positions
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.pdl import after_previous, can_overlap
from moeexp_kernels.parts.words import dot_rows, load_norm, load_row_features, load_rows


@triton.jit
def router_kernel(
    x_ptr, w_ptr, norm_ptr, logits_ptr, ids_ptr, weights_ptr, trace_ptr, positions_ptr, lengths_ptr, x_stride, S,
    trace_stride_b, trace_stride_s,
    EPS: tl.constexpr, M: tl.constexpr, T: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, D: tl.constexpr,
    TOP_K: tl.constexpr, K_PADDED: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr,
    PLANES: tl.constexpr, HAS_LIVE: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_N: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Logits of one token m for BLOCK_N experts; the last program of a sequence chooses for its T tokens.
    Grid (blocks * M), m fastest: programs that share weights start together.

    BITS is 32 for float32 weights, else 16; WORDS = 32-bit words of a row of weights, rounded up to a power of 2."""
    program = tl.program_id(0).to(tl.int64)
    m, start = program % M, program // M * BLOCK_N
    rows_left = tl.minimum(E - start, BLOCK_N).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    w_ptr += start * D
    words, pair = load_rows(w_ptr, w_ptr, row, row < rows_left, D, D, BITS, WORDS, 1, CACHE)
    norm_low, norm_high = load_norm(norm_ptr, True, D, D, BITS, WORDS)
    ready = after_previous(OVERLAP)
    x_ptr += ready
    logits_ptr += ready
    ids_ptr += ready
    weights_ptr += ready
    trace_ptr += ready
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, r = load_row_features(
        x_ptr + m * x_stride, norm_low, norm_high, EPS, True, D, D, BITS, WORDS, 1, PLANES
    )
    logits = r * dot_rows(
        words, pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, BITS, HALF, False, BLOCK_N, WORDS, 1, PLANES
    )
    tl.store(logits_ptr + m * E + start + row, logits, mask=row < rows_left)
    # Every thread has stored before one of them announces it.
    tl.debug_barrier()
    b = m // T
    counter_ptr = trace_ptr + b * trace_stride_b + tl.cast(S, tl.int64) * trace_stride_s
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == T * tl.cdiv(E, BLOCK_N) - 1:
        position = tl.load(positions_ptr + b)
        length = tl.cast(T, tl.int64)
        if HAS_LIVE:
            length = tl.load(lengths_ptr + b)
        for t in range(T):
            choose_experts(
                logits_ptr, ids_ptr, weights_ptr, trace_ptr, position, length, b * T + t, T, S, trace_stride_b,
                trace_stride_s, E, E_PADDED, TOP_K, K_PADDED, ".cg",
            )  # fmt: skip
        tl.store(counter_ptr, 0)


@triton_op("moeexp::router_fused", mutates_args={"expert_ids"})
def router_fused(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    top_k: int,
    positions: Tensor,
    expert_ids: Tensor,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`router`, in one kernel up to GEMV_ROWS tokens and by its kernels beyond; the same arguments, results and errors.

    The last slot of `expert_ids` must be zero, and is again afterwards: with another value nothing is chosen. Two calls on
    one trace must not run at the same time."""
    flat, bits = check_router(
        x=x, norm_weight=norm_weight, weight=weight, top_k=top_k, positions=positions, expert_ids=expert_ids
    )
    rows, tokens = flat.shape[0], x.shape[1]
    if not few_rows(rows):
        return launch_router(
            x=x, flat=flat, norm_weight=norm_weight, weight=weight, bits=bits, eps=eps, top_k=top_k, positions=positions,
            expert_ids=expert_ids, live=live,
        )  # fmt: skip
    experts, features = weight.shape
    logits, ids, weights = empty_results(x=x, experts=experts, top_k=top_k)
    words, _ = word_counts(bits=bits, in_features=features, group=features)
    key = f"{tuning.weight_class(bits)}/{experts}x{features}"
    config = tuning.lookup("router_fused", key, tuning.architecture(x.device))
    wrap_triton(router_kernel)[(rows * triton.cdiv(experts, config["BLOCK_N"]),)](
        flat, weight, norm_weight, logits, ids, weights, expert_ids, positions, positions if live is None else live,
        flat.stride(0), trace_positions(expert_ids), expert_ids.stride(0), expert_ids.stride(1),
        EPS=eps, M=rows, T=tokens, E=experts, E_PADDED=triton.next_power_of_2(experts), D=features, TOP_K=top_k,
        K_PADDED=triton.next_power_of_2(top_k), BITS=bits, HALF=weight.dtype == torch.float16, WORDS=words,
        PLANES=planes(x.dtype), HAS_LIVE=live is not None, OVERLAP=can_overlap(x), **config,
    )  # fmt: skip
    return ids, weights
