"""Experts of very few tokens: a GEMV for each pair of token and expert, with the shared expert as one more; two kernels.

Shape letters and weight formats: `moe.py`; words and their products: `parts/int_dot.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.linear import int16_limbs, word_counts
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int_dot import (
    dot_rows,
    features_of_words,
    load_norm,
    load_row_features,
    load_rows,
    stored_features,
    words_in_vectors,
)
from moeexp_kernels.parts.pdl import after_previous, has_pdl


@triton.jit
def swiglu_rows(
    x_ptr, norm_ptr, w_ptr, s_ptr, act_ptr, factor, first,
    EPS: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    HALF: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr, LIMBS: tl.constexpr, FAST: tl.constexpr,
    BLOCK_I: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act[first : first + BLOCK_I] = factor * silu(gate) * up of one expert, whose matrix [2*I, K] starts at w_ptr."""
    row = first + tl.arange(0, BLOCK_I)
    mask = row < WIDTH
    gate_words, gate_pair = load_rows(w_ptr, s_ptr, row, mask, K, GROUP, BITS, WORDS, VECTOR, CACHE)
    up_words, up_pair = load_rows(w_ptr, s_ptr, row + WIDTH, mask, K, GROUP, BITS, WORDS, VECTOR, CACHE)
    norm_low, norm_high = load_norm(norm_ptr, True, K, GROUP, BITS, WORDS)
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, r = load_row_features(
        x_ptr, norm_low, norm_high, EPS, True, K, GROUP, BITS, WORDS, VECTOR, LIMBS
    )
    gate = r * dot_rows(
        gate_words, gate_pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit,
        BITS, HALF, FAST, BLOCK_I, WORDS, VECTOR, LIMBS,
    )  # fmt: skip
    up = r * dot_rows(
        up_words, up_pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit,
        BITS, HALF, FAST, BLOCK_I, WORDS, VECTOR, LIMBS,
    )  # fmt: skip
    store_act(act_ptr, row, factor * gate * tl.sigmoid(gate) * up, mask, ROW, LIMBS)


@triton.jit
def gate_up_kernel(
    x_ptr, norm_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, shared_gate_ptr, act_ptr,
    x_stride,
    EPS: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, LIMBS: tl.constexpr,
    FAST: tl.constexpr, PDL: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    SWIDTH: tl.constexpr, SGROUP: tl.constexpr, SBITS: tl.constexpr, SHALF: tl.constexpr, SWORDS: tl.constexpr,
    SVECTOR: tl.constexpr,
    BLOCK_I: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act, rows of TOP_K * I + SI as `store_act` keeps them: each chosen expert's activations times its share, then the
    shared expert's times its gate. ids and weights [M, TOP_K]; grid (blocks of rows, TOP_K + 1, M).

    All waits, although x and the shared expert's weights need not: before the wait they won nothing (docs/log.md)."""
    ready = after_previous(PDL)  # which experts to read is the previous kernel's result
    x_ptr += ready
    ids_ptr += ready
    weights_ptr += ready
    act_ptr += ready
    first = tl.program_id(0) * BLOCK_I
    slot = tl.program_id(1)
    m = tl.program_id(2).to(tl.int64)
    x_ptr += m * x_stride
    row: tl.constexpr = TOP_K * WIDTH + SWIDTH
    act_ptr += m * (row * (2 if LIMBS == 1 else 1)) + slot * WIDTH
    if slot < TOP_K:
        if first < WIDTH:
            expert = tl.load(ids_ptr + m * TOP_K + slot).to(tl.int64)
            share = tl.load(weights_ptr + m * TOP_K + slot)
            w_ptr += expert * (2 * WIDTH * (K // 2 if BITS == 4 else K))
            if BITS <= 8:
                s_ptr += expert * (2 * WIDTH * 2 * (K // GROUP))
            swiglu_rows(
                x_ptr, norm_ptr, w_ptr, s_ptr, act_ptr, share, first,
                EPS, row, WIDTH, K, GROUP, BITS, HALF, WORDS, VECTOR, LIMBS, FAST, BLOCK_I, CACHE,
            )  # fmt: skip
    elif first < SWIDTH:
        k = tl.arange(0, K_PADDED)
        mask = k < K
        x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / K + EPS)
        x *= 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
        gate = r * tl.sum(x * tl.load(shared_gate_ptr + k, mask=mask, other=0.0).to(tl.float32), axis=0)
        swiglu_rows(
            x_ptr, norm_ptr, shared_w_ptr, shared_s_ptr, act_ptr, tl.sigmoid(gate), first,
            EPS, row, SWIDTH, K, SGROUP, SBITS, SHALF, SWORDS, SVECTOR, LIMBS, FAST, BLOCK_I, CACHE,
        )  # fmt: skip


@triton.jit
def down_kernel(
    x_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, y_ptr, x_stride,
    D: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, LIMBS: tl.constexpr, FAST: tl.constexpr,
    PDL: tl.constexpr,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    SWIDTH: tl.constexpr, SGROUP: tl.constexpr, SBITS: tl.constexpr, SHALF: tl.constexpr, SWORDS: tl.constexpr,
    SVECTOR: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, d] = x[m, d] + sum over experts and i of down[expert, d, i] * act[m, expert's slot, i], shared one last.

    The chosen experts' rows for one d, side by side, are one row of SLOTS * WORDS words, SLOTS = TOP_K rounded up to a
    power of 2. FOLD rows of the shared expert are one row likewise, and its activations repeat. Grid (blocks of rows, M)."""
    m = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.arange(0, SLOTS)
    # Not the previous kernel's result but that of one before; past L1, which may hold an older token's.
    expert = tl.load(ids_ptr + m * TOP_K + slot, mask=slot < TOP_K, other=0, cache_modifier=".cg").to(tl.int64)
    width: tl.constexpr = WIDTH * BITS // 32
    column = words_in_vectors(WORDS, VECTOR)
    # Loaded slots first: of the dimensions without contiguous addresses, the first is spread over lanes and warps.
    mask = (slot < TOP_K)[:, None, None] & (d < D)[None, :, None] & (column < width)[None, None, :]
    words = tl.load(
        w_ptr.to(tl.pointer_type(tl.int32)) + (expert * (D * width))[:, None, None] + (d * width)[None, :, None]
        + column[None, None, :],
        mask=mask, other=0, cache_modifier=CACHE,
    )  # fmt: skip
    words = tl.reshape(tl.permute(words, [1, 0, 2]), [BLOCK_D, SLOTS * WORDS])
    pair = d
    if BITS <= 8:
        vectors: tl.constexpr = WORDS // VECTOR
        group = (tl.arange(0, vectors) * VECTOR) // (GROUP * BITS // 32)
        mask = (group < WIDTH // GROUP)[:, None, None] & (slot < TOP_K)[None, :, None] & (d < D)[None, None, :]
        offsets = (expert * (D * (WIDTH // GROUP)))[None, :, None] + (d * (WIDTH // GROUP))[None, None, :] + group[:, None, None]
        pair = tl.load(s_ptr.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0)
        pair = tl.reshape(tl.permute(pair, [2, 1, 0]), [BLOCK_D, SLOTS * vectors])
    folded = tl.program_id(0) * (BLOCK_D // FOLD) + tl.arange(0, BLOCK_D // FOLD)
    shared_words, shared_pair = load_rows(
        shared_w_ptr, shared_s_ptr, folded, folded * FOLD < D, FOLD * SWIDTH, SGROUP, SBITS, FOLD * SWORDS, SVECTOR, CACHE
    )
    # Older still. Had it been loaded after the sums, all programs would end by waiting for it.
    extra = tl.load(x_ptr + m * x_stride + d, mask=d < D, other=0.0, cache_modifier=".cg").to(tl.float32)
    ready = after_previous(PDL)
    y_ptr += ready
    row: tl.constexpr = TOP_K * WIDTH + SWIDTH
    act_ptr += m * (row * (2 if LIMBS == 1 else 1)) + ready

    # The activations in the order of the words, as in `load_row_features`.
    stored: tl.constexpr = WORDS * (4 if BITS <= 8 else 32 // BITS)
    i = tl.arange(0, SLOTS * stored)
    half: tl.constexpr = GROUP // 2
    features: tl.constexpr = stored * (2 if BITS == 4 else 1)
    k = i % stored
    if BITS == 4:
        k = (k // half) * GROUP + k % half
    offsets = (i // stored) * WIDTH + k
    mask = i < TOP_K * stored
    if features == WIDTH:  # the same, in a form that shows the compiler that neighbours are contiguous
        offsets = (i // half) * GROUP + i % half if BITS == 4 else i
    else:
        mask = mask & (k < WIDTH)
    low = load_act(act_ptr, offsets, mask, row, LIMBS)
    high = low
    if BITS == 4:
        high = load_act(act_ptr, offsets + half, mask, row, LIMBS)
    k = stored_features(SWIDTH, SGROUP, SBITS, FOLD * SWORDS, SWORDS)
    mask = k < SWIDTH
    shared_low = load_act(act_ptr + TOP_K * WIDTH, k, mask, row, LIMBS)
    shared_high = shared_low
    if SBITS == 4:
        shared_high = load_act(act_ptr + TOP_K * WIDTH, k + SGROUP // 2, mask, row, LIMBS)
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit = features_of_words(low, high, BITS, SLOTS * WORDS, VECTOR, LIMBS)
    y = extra + dot_rows(
        words, pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit,
        BITS, HALF, FAST, BLOCK_D, SLOTS * WORDS, VECTOR, LIMBS,
    )  # fmt: skip
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit = features_of_words(
        shared_low, shared_high, SBITS, FOLD * SWORDS, SVECTOR, LIMBS
    )
    y += dot_rows(
        shared_words, shared_pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit,
        SBITS, SHALF, FAST, BLOCK_D // FOLD, FOLD * SWORDS, SVECTOR, LIMBS, FOLD,
    )  # fmt: skip
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


# Words that a thread of `down_kernel` loads at once. As many it has of the activations, loaded by the 16 bytes: the two meet
# in its registers, where vectors of 4 words would send the activations through shared memory, with two barriers a tensor.
DOWN_VECTOR = 2


@triton.jit
def store_act(act_ptr, offsets, values, mask, ROW: tl.constexpr, LIMBS: tl.constexpr):
    """Activations between the two kernels: float32, or for 2-byte dtypes (LIMBS 1) as two bfloat16, the second ROW further
    on, what the first leaves over: to 2^-17 of each value, finer than the integers that `down_kernel` makes of it. Loads of
    2-byte elements give a thread the words that it multiplies."""
    if LIMBS == 1:
        first = values.to(tl.bfloat16)
        tl.store(act_ptr + offsets, first, mask=mask)
        tl.store(act_ptr + ROW + offsets, (values - first.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(act_ptr + offsets, values, mask=mask)


@triton.jit
def load_act(act_ptr, offsets, mask, ROW: tl.constexpr, LIMBS: tl.constexpr):
    values = tl.load(act_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if LIMBS == 1:
        values += tl.load(act_ptr + ROW + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


def format_constants(
    *, weight: Tensor, width: int, features: int, bits: int, group: int, most: int = 4, prefix: str = ""
) -> dict:  # fmt: skip
    """The constants of `swiglu_rows` and `down_kernel` that describe one matrix with rows of `features`."""
    words, vector = word_counts(bits=bits, in_features=features, group=group, most=most)
    half = weight.dtype == torch.float16
    values = {"WIDTH": width, "GROUP": group, "BITS": bits, "HALF": half, "WORDS": words, "VECTOR": vector}
    return {prefix + key: value for key, value in values.items()}


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
    first = tuning.lookup("moe_gate_up", f"{tuning.weight_class(formats['gate_up'][1])}/{shape}", arch)
    second = tuning.lookup("moe_down", f"{tuning.weight_class(formats['down'][1])}/{shape}", arch)
    act_row = top_k * width + shared_width
    wide = int16_limbs(x.dtype) == 2
    act_shape = (rows, act_row) if wide else (rows, 2, act_row)
    act = torch.empty(act_shape, dtype=torch.float32 if wide else torch.bfloat16, device=x.device)
    slots = triton.next_power_of_2(top_k)

    def constants(name: str, weight: Tensor, in_features: int, most: int = 4) -> dict:
        own_width, bits, group = formats[name]
        prefix = "S" if name.startswith("shared") else ""
        return format_constants(
            weight=weight, width=own_width, features=in_features, bits=bits, group=group, most=most, prefix=prefix
        )

    def stored(scales: Tensor | None, weight: Tensor) -> Tensor:
        return weight if scales is None else scales

    common = {"TOP_K": top_k, "FAST": x.is_cuda, "LIMBS": int16_limbs(x.dtype), "PDL": has_pdl(x)}
    grid = (triton.cdiv(max(width, shared_width), first["BLOCK_I"]), top_k + 1, rows)
    wrap_triton(gate_up_kernel)[grid](
        x, norm_weight, ids, weights, gate_up, stored(gate_up_scales, gate_up),
        shared_gate_up, stored(shared_gate_up_scales, shared_gate_up), shared_gate, act, x.stride(0),
        EPS=eps, K=features, K_PADDED=triton.next_power_of_2(features), **common,
        **constants("gate_up", gate_up, features), **constants("shared_gate_up", shared_gate_up, features), **first,
    )  # fmt: skip
    wrap_triton(down_kernel)[(triton.cdiv(features, second["BLOCK_D"]), rows)](
        x, ids, down, stored(down_scales, down), shared_down, stored(shared_down_scales, shared_down), act, out,
        x.stride(0), D=features, SLOTS=slots, **common,
        **constants("down", down, width, DOWN_VECTOR), **constants("shared_down", shared_down, shared_width, DOWN_VECTOR),
        FOLD=folded_rows(
            block=second["BLOCK_D"], slots=slots, features=features, bits=shared_width * formats["shared_down"][1]
        ),
        **second,
    )  # fmt: skip
