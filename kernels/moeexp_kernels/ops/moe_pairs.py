"""Experts of few tokens: a GEMV for each pair of token and expert, with the shared expert as one more; two kernels, for any
weights. Of quantised ones `moe_packed.py` has a faster pair.

Shape letters and weight formats: `moe.py`; words and their products: `parts/int_dot.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import load_act, store_act
from moeexp_kernels.parts.int_dot import (
    dot_rows,
    features_of_words,
    group_of_vector,
    int16_limbs,
    load_norm,
    load_row_features,
    load_rows,
    stored_features,
    words_in_vectors,
)
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, ROWS, WORDS, at_row, matrix_format
from moeexp_kernels.parts.pdl import after_previous, has_pdl
from moeexp_kernels.parts.spread import turned


@triton.jit
def swiglu_rows(
    x_ptr, norm_ptr, w_ptr, s_ptr, act_ptr, factor, first,
    EPS: tl.constexpr, FORMAT: tl.constexpr, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_I: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act[first : first + BLOCK_I] = factor * silu(gate) * up of one expert, whose matrix [2*I, K] starts at w_ptr."""
    width: tl.constexpr = FORMAT[ROWS] // 2
    row = first + tl.arange(0, BLOCK_I)
    mask = row < width
    gate_words, gate_pair = load_rows(w_ptr, s_ptr, row, mask, FORMAT, CACHE)
    up_words, up_pair = load_rows(w_ptr, s_ptr, row + width, mask, FORMAT, CACHE)
    norm = load_norm(norm_ptr, True, FORMAT)
    features, r = load_row_features(x_ptr, norm, EPS, True, FORMAT, LIMBS)
    gate = r * dot_rows(gate_words, gate_pair, features, FORMAT, LIMBS, INTERPRETED)
    up = r * dot_rows(up_words, up_pair, features, FORMAT, LIMBS, INTERPRETED)
    store_act(act_ptr, row, factor * gate * tl.sigmoid(gate) * up, mask, ACT_ROW, LIMBS)


@triton.jit
def gate_up_kernel(
    x_ptr, norm_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, shared_gate_ptr, act_ptr,
    x_stride,
    EPS: tl.constexpr, TOP_K: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr, BLOCK_I: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act, rows of TOP_K * I + SI as `store_act` keeps them: each chosen expert's activations times its share, then the
    shared expert's times its gate. ids and weights [M, TOP_K]; grid (blocks of rows, TOP_K + 1, M). FORMAT: one expert's.

    All waits, although x and the shared expert's weights need not: before the wait they won nothing (docs/log.md)."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    K: tl.constexpr = FORMAT[FEATURES]
    width: tl.constexpr = FORMAT[ROWS] // 2
    act_row: tl.constexpr = TOP_K * width + SHARED_FORMAT[ROWS] // 2
    ready = after_previous(PDL)  # which experts to read is the previous kernel's result
    x_ptr += ready
    ids_ptr += ready
    weights_ptr += ready
    act_ptr += ready
    first = tl.program_id(0) * BLOCK_I
    slot = tl.program_id(1)
    m = tl.program_id(2).to(tl.int64)
    x_ptr += m * x_stride
    act_ptr += m * (act_row * (2 if LIMBS == 1 else 1)) + slot * width
    if slot < TOP_K:
        if first < width:
            expert = tl.load(ids_ptr + m * TOP_K + slot).to(tl.int64)
            share = tl.load(weights_ptr + m * TOP_K + slot)
            w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert * FORMAT[ROWS], FORMAT)
            swiglu_rows(
                x_ptr, norm_ptr, w_ptr, s_ptr, act_ptr, share, first,
                EPS, FORMAT, act_row, LIMBS, INTERPRETED, BLOCK_I, CACHE,
            )  # fmt: skip
    elif first < SHARED_FORMAT[ROWS] // 2:
        k = tl.arange(0, FORMAT[WORDS] * 32 // FORMAT[BITS])  # K, rounded up to a power of 2, as WORDS is
        mask = k < K
        x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)
        x *= 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
        gate = r * tl.sum(x * tl.load(shared_gate_ptr + k, mask=mask, other=0.0).to(tl.float32), axis=0)
        swiglu_rows(
            x_ptr, norm_ptr, shared_w_ptr, shared_s_ptr, act_ptr, tl.sigmoid(gate), first,
            EPS, SHARED_FORMAT, act_row, LIMBS, INTERPRETED, BLOCK_I, CACHE,
        )  # fmt: skip


@triton.jit
def slots_of_warps(SLOTS: tl.constexpr, WARPS: tl.constexpr):
    """The slots of a token's choice by the warp of `down` that loads their weights: [W, SLOTS / W], W <= WARPS."""
    warps: tl.constexpr = min(WARPS, SLOTS)
    return tl.arange(0, warps)[:, None] + tl.arange(0, SLOTS // warps)[None, :] * warps


@triton.jit
def load_ids(ids_ptr, m, slot, TOP_K: tl.constexpr):
    """Token m's experts in `slot`, int32, before a program of `down` waits: not the previous kernel's result but that of one
    before. Past L1, which may hold an older token's."""
    return tl.load(ids_ptr + m * TOP_K + slot, mask=slot < TOP_K, other=0, cache_modifier=".cg")


@triton.jit
def load_down(
    x_ptr, ids, slot, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr,
    SHARED_FORMAT: tl.constexpr, FOLD: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Before a program of `down` waits: words and scale pairs of its BLOCK_D rows of a token's experts side by side, [BLOCK_D,
    SLOTS * WORDS], those of the shared expert, FOLD of whose rows are one of SHARED_FORMAT: [BLOCK_D / FOLD, WORDS], and what
    the sums are added to, float32 [BLOCK_D], of the token's x at x_ptr. Past L1, which may hold an older token's. ids: the
    experts in `slot`, of `slots_of_warps`; so each warp needs no others, and none goes through shared memory."""
    D: tl.constexpr = FORMAT[ROWS]
    width: tl.constexpr = FORMAT[FEATURES]
    bits: tl.constexpr = FORMAT[BITS]
    row_words: tl.constexpr = width * bits // 32
    whole: tl.constexpr = D % BLOCK_D == 0 and TOP_K == SLOTS and row_words == FORMAT[WORDS]
    # From here rows are relative to the program's first: where a row's distance from it is added last, and to nothing else, it
    # stands in the load itself, and all rows of a slot have one address.
    first = tl.program_id(0) * BLOCK_D
    d = tl.arange(0, BLOCK_D)
    slot_mask, d_mask = slot < TOP_K, first + d < D
    expert = ids.to(tl.int64)
    column = words_in_vectors(FORMAT)
    w_ptr, s_ptr = at_row(w_ptr, s_ptr, first.to(tl.int64), FORMAT)
    # Loaded warps first: of the dimensions without contiguous addresses, the first is spread over lanes and warps.
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32)) + (expert * (D * row_words))[:, :, None, None] + column[None, None, None, :]
    w_ptr += (d * row_words)[None, None, :, None]
    w_ptr = turned(w_ptr, True)
    if whole:
        words = tl.load(w_ptr, cache_modifier=CACHE)
    else:
        mask = slot_mask[:, :, None, None] & d_mask[None, None, :, None] & (column < row_words)[None, None, None, :]
        words = tl.load(w_ptr, mask=turned(mask, True), other=0, cache_modifier=CACHE)
    words = tl.reshape(tl.permute(turned(words, True), [2, 1, 0, 3]), [BLOCK_D, SLOTS * FORMAT[WORDS]])
    pair = d
    if bits <= 8:
        groups: tl.constexpr = width // FORMAT[GROUP]
        group = group_of_vector(FORMAT)
        s_ptr = s_ptr.to(tl.pointer_type(tl.int32)) + (expert * (D * groups))[None, :, :, None] + group[:, None, None, None]
        s_ptr += (d * groups)[None, None, None, :]
        s_ptr = turned(s_ptr, False)
        if whole:
            pair = tl.load(s_ptr)
        else:
            mask = (group < groups)[:, None, None, None] & slot_mask[None, :, :, None] & d_mask[None, None, None, :]
            pair = tl.load(s_ptr, mask=turned(mask, False), other=0)
        pair = tl.reshape(tl.permute(turned(pair, False), [3, 2, 1, 0]), [BLOCK_D, SLOTS * group.shape[0]])
    folded = tl.program_id(0) * (BLOCK_D // FOLD) + tl.arange(0, BLOCK_D // FOLD)
    shared = load_rows(shared_w_ptr, shared_s_ptr, folded, folded * FOLD < D, SHARED_FORMAT, CACHE, D % BLOCK_D == 0)
    # Older still. Had it been loaded after the sums, all programs would end by waiting for it.
    x_ptr += first + d
    if D % BLOCK_D == 0:
        extra = tl.load(x_ptr, cache_modifier=".cg")
    else:
        extra = tl.load(x_ptr, mask=d_mask, other=0.0, cache_modifier=".cg")
    return (words, pair), shared, extra.to(tl.float32)


@triton.jit
def down_kernel(
    x_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, y_ptr, x_stride,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, FOLD: tl.constexpr,
    WARPS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, d] = x[m, d] + sum over experts and i of down[expert, d, i] * act[m, expert's slot, i], shared one last.

    The chosen experts' rows for one d, side by side, are one row of SLOTS * WORDS words, SLOTS = TOP_K rounded up to a
    power of 2. FOLD rows of the shared expert are one row of SHARED_FORMAT likewise, and its activations repeat. Grid (blocks
    of rows, M) of WARPS warps."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    D: tl.constexpr = FORMAT[ROWS]
    width: tl.constexpr = FORMAT[FEATURES]
    shared_width: tl.constexpr = SHARED_FORMAT[FEATURES] // FOLD
    bits: tl.constexpr = FORMAT[BITS]
    m = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = slots_of_warps(SLOTS, WARPS)
    own, shared, extra = load_down(
        x_ptr + m * x_stride, load_ids(ids_ptr, m, slot, TOP_K), slot, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, TOP_K, SLOTS,
        FORMAT, SHARED_FORMAT, FOLD, BLOCK_D, CACHE,
    )  # fmt: skip
    ready = after_previous(PDL)
    y_ptr += ready
    act_row: tl.constexpr = TOP_K * width + shared_width
    act_ptr += m * (act_row * (2 if LIMBS == 1 else 1)) + ready

    # The activations in the order of the words, as in `load_row_features`.
    stored: tl.constexpr = FORMAT[WORDS] * (4 if bits <= 8 else 32 // bits)
    i = tl.arange(0, SLOTS * stored)
    half: tl.constexpr = FORMAT[GROUP] // 2
    k = i % stored
    if bits == 4:
        k = (k // half) * FORMAT[GROUP] + k % half
    offsets = (i // stored) * width + k
    mask = i < TOP_K * stored
    if FORMAT[WORDS] == width * bits // 32:  # the same, in a form that shows the compiler that neighbours are contiguous
        offsets = (i // half) * FORMAT[GROUP] + i % half if bits == 4 else i
    else:
        mask = mask & (k < width)
    low = load_act(act_ptr, offsets, mask, act_row, LIMBS)
    high = low
    if bits == 4:
        high = load_act(act_ptr, offsets + half, mask, act_row, LIMBS)
    k = stored_features(SHARED_FORMAT, FOLD)
    mask = k < shared_width
    shared_low = load_act(act_ptr + TOP_K * width, k, mask, act_row, LIMBS)
    shared_high = shared_low
    if SHARED_FORMAT[BITS] == 4:
        shared_high = load_act(act_ptr + TOP_K * width, k + SHARED_FORMAT[GROUP] // 2, mask, act_row, LIMBS)
    features = features_of_words(low, high, FORMAT, LIMBS)
    y = extra + dot_rows(own[0], own[1], features, FORMAT, LIMBS, INTERPRETED)
    features = features_of_words(shared_low, shared_high, SHARED_FORMAT, LIMBS)
    y += dot_rows(shared[0], shared[1], features, SHARED_FORMAT, LIMBS, INTERPRETED, FOLD)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


# Words that a thread of `down_kernel` loads at once. As many it has of the activations, loaded by the 16 bytes: the two meet
# in its registers, where vectors of 4 words would send the activations through shared memory, with two barriers a tensor.
DOWN_VECTOR = 2


def warps_of(row: dict[str, Any], *, cuda: bool) -> int:
    """WARPS of `down`'s kernels with the launch parameters `row`; in the interpreter there is one."""
    return row["num_warps"] if cuda else 1


def folded_rows(*, block: int, slots: int, features: int, bits: int) -> int:
    """FOLD of `down_kernel`: as many of the shared expert's rows, of `bits` each, side by side as there are slots; 1 where
    rows have words of padding between them or the last block is not whole."""
    fold = min(slots, block)
    return fold if features % block == 0 and bits & (bits - 1) == 0 else 1


def launch_pairs(
    *, x: Tensor, norm_weight: Tensor, eps: float, ids: Tensor, weights: Tensor, gate_up: Tensor,
    gate_up_scales: Tensor | None, down: Tensor, down_scales: Tensor | None, shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None, shared_down: Tensor, shared_down_scales: Tensor | None, shared_gate: Tensor,
    out: Tensor, formats: dict[str, tuple[int, int, int]],
) -> None:  # fmt: skip
    """out [M, D] of x [M, D], a GEMV per pair; all checked. formats: (width, bits, group) of each matrix."""
    (rows, features), top_k = x.shape, ids.shape[-1]
    width, shared_width = formats["gate_up"][0], formats["shared_gate_up"][0]
    arch, shape = tuning.architecture(x.device), f"{features}x{width}"
    key = f"{tuning.weight_class(formats['gate_up'][1])}/{shape}"
    second = tuning.lookup("moe_down", f"{tuning.weight_class(formats['down'][1])}/{shape}", arch)
    act_row = top_k * width + shared_width
    wide = int16_limbs(x.dtype) == 2
    act_shape = (rows, act_row) if wide else (rows, 2, act_row)
    act = torch.empty(act_shape, dtype=torch.float32 if wide else torch.bfloat16, device=x.device)
    slots = triton.next_power_of_2(top_k)

    def stored(scales: Tensor | None, weight: Tensor) -> Tensor:
        return weight if scales is None else scales

    def matrix(name: str, weight: Tensor, **options: int) -> tuple[int, ...]:
        _, bits, group = formats[name]
        return matrix_format(weight, bits=bits, group=group, **options)

    common = {"TOP_K": top_k, "INTERPRETED": not x.is_cuda, "PDL": has_pdl(x)}
    first = tuning.lookup("moe_gate_up", key, arch)
    wrap_triton(gate_up_kernel)[(triton.cdiv(max(width, shared_width), first["BLOCK_I"]), top_k + 1, rows)](
        x, norm_weight, ids, weights, gate_up, stored(gate_up_scales, gate_up),
        shared_gate_up, stored(shared_gate_up_scales, shared_gate_up), shared_gate, act, x.stride(0),
        EPS=eps, FORMAT=matrix("gate_up", gate_up), SHARED_FORMAT=matrix("shared_gate_up", shared_gate_up), **common, **first,
    )  # fmt: skip
    fold = folded_rows(block=second["BLOCK_D"], slots=slots, features=features, bits=shared_width * formats["shared_down"][1])
    wrap_triton(down_kernel)[(triton.cdiv(features, second["BLOCK_D"]), rows)](
        x, ids, down, stored(down_scales, down), shared_down, stored(shared_down_scales, shared_down), act, out,
        x.stride(0), SLOTS=slots, FORMAT=matrix("down", down, widest=DOWN_VECTOR), FOLD=fold,
        SHARED_FORMAT=matrix("shared_down", shared_down, widest=DOWN_VECTOR, fold=fold),
        WARPS=warps_of(second, cuda=x.is_cuda), **common, **second,
    )  # fmt: skip
