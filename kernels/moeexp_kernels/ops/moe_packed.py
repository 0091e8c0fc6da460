"""Experts of few tokens whose weights are quantised: the two kernels of `moe_pairs.py` on activations that are integers already.
The router's kernel packs the rows of x, and a warp of gate/up has rows of its own and nothing to prepare. Gate/up packs what it
finds, so that the hundreds of programs of `down` need not each do so.

Shape letters and weight formats: `moe.py`; packed rows: `parts/packed.py` and `parts/act.py`; products: `parts/warp_rows.py` and
`parts/int_dot.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.moe_pairs import DOWN_VECTOR, folded_rows, load_down
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import EXPERTS, LENGTH, act_format, load_packed_act, rows_of_vectors, store_packed_act
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.int_dot import dot_rows, int16_limbs
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, ROWS, VECTOR, WORDS, at_row, matrix_format
from moeexp_kernels.parts.packed import packable, packed_length
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next
from moeexp_kernels.parts.warp_rows import EACH, PIECE, WARPS, dot_warp_rows, load_packed, load_warp_rows, spread_of

ORDERED_PAIRS = 32  # of a program
PACKED_ROWS = 32  # tokens for which the router packs rows, as many as the tile of experts takes


@triton.jit
def load_gate_up(
    w_ptr, s_ptr, row, count, FORMAT: tl.constexpr, SPREAD: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """(words, scale pairs) of gate rows, the same of up rows, of one expert, whose matrix [2*I, K] starts at w_ptr; with PIECE
    above 1 nothing is read where count is 0."""
    width: tl.constexpr = FORMAT[ROWS] // 2
    limit = width
    if SPREAD[PIECE] > 1:
        limit = tl.where(count > 0, width, 0)
    gate = load_warp_rows(w_ptr, s_ptr, row, limit, FORMAT, SPREAD, CACHE)
    at = FORMAT[FEATURES] * FORMAT[BITS] // 8 * width
    scales = FORMAT[FEATURES] // FORMAT[GROUP] * 2 * width
    return gate, load_warp_rows(w_ptr + at, s_ptr + scales, row, limit, FORMAT, SPREAD, CACHE)


@triton.jit
def order_pairs_kernel(
    ids_ptr, order_ptr, PAIRS, PIECE: tl.constexpr, PADDED: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """order [2, PAIRS] int32: the pairs of token and expert by expert, then by token, each as expert << 16 | pair; and how many
    from each on are one piece, up to PIECE of one expert, 0 where it does not begin one. ids [PAIRS], a token's experts in a
    row; PADDED: PAIRS rounded up to a power of 2. Grid (blocks of pairs,)."""
    order_ptr += start_next(PDL)
    p, own = tl.arange(0, PADDED), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ready = after_previous(PDL)
    ids = tl.load(ids_ptr + ready + p, mask=p < PAIRS, other=0x7FFF)
    mine = tl.load(ids_ptr + ready + own, mask=own < PAIRS, other=0)
    same = ids[None, :] == mine[:, None]
    earlier = tl.sum((same & (p[None, :] < own[:, None])).to(tl.int32), axis=1)  # of this expert
    place = tl.sum((ids[None, :] < mine[:, None]).to(tl.int32), axis=1) + earlier
    left = tl.sum(same.to(tl.int32), axis=1) - earlier
    tl.store(order_ptr + ready + place, mine << 16 | own, mask=own < PAIRS)
    count = tl.where(earlier % PIECE == 0, tl.minimum(left, PIECE), 0)
    tl.store(order_ptr + ready + PAIRS + place, count, mask=own < PAIRS)


@triton.jit
def again(words, i, INTERPRETED: tl.constexpr):
    """`words`, which the compiler does not know to be the same for each i: else it takes them apart once, for twice the
    registers."""
    if INTERPRETED:
        return words
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", args=[words, i], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def swiglu_rows(
    packed_ptr, act_ptr, m, share, gate_pair, up_pair, first, last,
    FORMAT: tl.constexpr, ACT: tl.constexpr, SPREAD: tl.constexpr, LIMBS: tl.constexpr, PACKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Packs share * silu(gate) * up of token m's row, as vectors first .. of its activations, those before `last`. gate_pair,
    up_pair: words and scale pairs of the rows."""
    packed_ptr += m.to(tl.int64) * PACKED
    features = load_packed(packed_ptr, FORMAT, SPREAD, LIMBS)
    r = tl.load(packed_ptr + (PACKED - 4)).to(tl.float32, bitcast=True)
    gate = r * dot_warp_rows(gate_pair[0], gate_pair[1], features, FORMAT, LIMBS, INTERPRETED)
    up = r * dot_warp_rows(up_pair[0], up_pair[1], features, FORMAT, LIMBS, INTERPRETED)
    act_ptr += m.to(tl.int64) * ACT[LENGTH]
    store_packed_act(act_ptr, share * gate * tl.sigmoid(gate) * up, first, last, ACT, SPREAD, LIMBS)


@triton.jit
def gate_up_packed_kernel(
    packed_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, ACT: tl.constexpr, SPREAD: tl.constexpr, LIMBS: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act [M, ACT[LENGTH]]: packed, share * silu(gate) * up of each chosen expert, then of the shared one, whose share is its
    gate's. packed [M, PACKED]; ids and weights, the experts' shares, [M, TOP_K]. FORMAT: one expert's. Grid (blocks of vectors,
    1 + TOP_K, M), the shared expert first: its programs ask for their weights before the choice is known.

    With SPREAD[PIECE] ids are those of `order_pairs_kernel`: programs go from expert to expert, so that L2 has what more than
    one of them read; and above 1 a program reads its rows once for so many tokens of an expert that several chose. Who comes
    second in a piece has nothing to do."""
    TOP_K: tl.constexpr = ACT[EXPERTS]
    in_vector: tl.constexpr = ACT[VECTOR] * 32 // ACT[BITS]  # activations
    vectors: tl.constexpr = FORMAT[ROWS] // 2 // in_vector  # of an expert
    shared_vectors: tl.constexpr = SHARED_FORMAT[ROWS] // 2 // in_vector
    first = tl.program_id(0) * (SPREAD[EACH] * SPREAD[WARPS] // in_vector)
    row = rows_of_vectors(first, ACT, SPREAD)
    shared = tl.program_id(1) == 0
    token, tokens = tl.program_id(2), tl.num_programs(2)
    place = token * TOP_K + tl.program_id(1) - 1
    # What differs goes through one piece of code: instructions come from memory as well.
    if shared:
        count = 1
        if SPREAD[PIECE] > 1:
            count = tl.where(token % SPREAD[PIECE] == 0, tl.minimum(tokens - token, SPREAD[PIECE]), 0)
        gate_pair, up_pair = load_gate_up(shared_w_ptr, shared_s_ptr, row, count, SHARED_FORMAT, SPREAD, CACHE)
        ready = after_previous(PDL)
        before, last = TOP_K * vectors, TOP_K * vectors + shared_vectors
        m, place = token, 0
        share_ptr = packed_ptr.to(tl.pointer_type(tl.float32)) + m.to(tl.int64) * PACKED + (PACKED - 3)
    else:
        count = 1
        ready = after_previous(PDL)  # which experts to read is the previous kernel's result
        expert, pair = tl.load(ids_ptr + ready + place), place
        if SPREAD[PIECE] > 1:
            count = tl.load(ids_ptr + ready + tokens * TOP_K + place)
        if SPREAD[PIECE]:
            pair = expert & 0xFFFF
            expert = expert >> 16
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert.to(tl.int64) * FORMAT[ROWS], FORMAT)
        gate_pair, up_pair = load_gate_up(w_ptr, s_ptr, row, count, FORMAT, SPREAD, CACHE)
        before = pair % TOP_K * vectors
        last = before + vectors
        m = pair // TOP_K
        share_ptr = weights_ptr + pair
    if SPREAD[PIECE] > 1:
        for i in range(count):
            pair = tl.load(ids_ptr + ready + place + i) & 0xFFFF
            m = tl.where(shared, token + i, pair // TOP_K)
            before = tl.where(shared, TOP_K, pair % TOP_K) * vectors
            share = tl.load(weights_ptr + ready + pair)
            own = tl.load(packed_ptr + ready + m.to(tl.int64) * PACKED + (PACKED - 3)).to(tl.float32, bitcast=True)
            gate, up = (again(gate_pair[0], i, INTERPRETED), gate_pair[1]), (again(up_pair[0], i, INTERPRETED), up_pair[1])
            swiglu_rows(
                packed_ptr + ready, act_ptr + ready, m, tl.where(shared, own, share), gate, up, before + first,
                before + tl.where(shared, shared_vectors, vectors), FORMAT, ACT, SPREAD, LIMBS, PACKED, INTERPRETED,
            )  # fmt: skip
    else:
        swiglu_rows(
            packed_ptr + ready, act_ptr + ready, m, tl.load(share_ptr + ready), gate_pair, up_pair, before + first, last,
            FORMAT, ACT, SPREAD, LIMBS, PACKED, INTERPRETED,
        )  # fmt: skip


@triton.jit
def down_packed_kernel(
    x_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, y_ptr, x_stride,
    ACT: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, FOLD: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """`down_kernel` of packed act [M, ACT[LENGTH]]."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    TOP_K: tl.constexpr = ACT[EXPERTS]
    D: tl.constexpr = FORMAT[ROWS]
    stored: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32  # words of an expert's row
    m = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    own, shared, extra = load_down(
        x_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, m, x_stride, TOP_K, SLOTS, FORMAT, SHARED_FORMAT, FOLD,
        BLOCK_D, CACHE,
    )  # fmt: skip
    ready = after_previous(PDL)
    y_ptr += ready
    act_ptr += m * ACT[LENGTH] + ready
    features = load_packed_act(act_ptr, 0, SLOTS, TOP_K, stored, FORMAT[WORDS], stored, ACT, LIMBS)
    y = extra + dot_rows(own[0], own[1], features, FORMAT, LIMBS, INTERPRETED)
    # The shared expert's, once for each of the rows that are side by side.
    features = load_packed_act(
        act_ptr, TOP_K * stored, FOLD, FOLD, ACT[WORDS] - TOP_K * stored, SHARED_FORMAT[WORDS] // FOLD, 0, ACT, LIMBS
    )
    y += dot_rows(shared[0], shared[1], features, SHARED_FORMAT, LIMBS, INTERPRETED, FOLD)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def packing(formats: dict[str, tuple[int, int, int]], *, rows: int) -> dict[str, int]:
    """{"pack_bits", "pack_group"} of `router_packed` where these kernels take so many tokens and weights of these formats, as
    `moe.decode_formats` finds them; else nothing."""
    (_, *found), (_, *shared) = formats["gate_up"], formats["shared_gate_up"]
    (_, bits, group), (_, *shared_down) = formats["down"], formats["shared_down"]
    fits = packable(bits=found[0], group=found[1]) and packable(bits=bits, group=group)
    if rows > PACKED_ROWS or shared != found or shared_down != [bits, group] or not fits:
        return {}
    return {"pack_bits": found[0], "pack_group": found[1]}


def order_pairs(ids: Tensor, piece: int) -> Tensor:
    """ids [..., k] int32 of experts as `gate_up_packed_kernel` takes them to go by expert, in pieces of so many tokens."""
    pairs, order = ids.numel(), torch.empty((2, ids.numel()), dtype=torch.int32, device=ids.device)
    wrap_triton(order_pairs_kernel)[(triton.cdiv(pairs, ORDERED_PAIRS),)](
        ids, order, pairs, PIECE=piece, PADDED=triton.next_power_of_2(pairs), BLOCK_P=ORDERED_PAIRS, PDL=has_pdl(ids), num_warps=4
    )
    return order


def launch_packed(
    *, x: Tensor, norm_weight: Tensor, packed: Tensor, eps: float, ids: Tensor, weights: Tensor, gate_up: Tensor,
    gate_up_scales: Tensor | None, down: Tensor, down_scales: Tensor | None, shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None, shared_down: Tensor, shared_down_scales: Tensor | None, shared_gate: Tensor,
    out: Tensor, formats: dict[str, tuple[int, int, int]],
) -> None:  # fmt: skip
    """out [M, D] of x [M, D]; all checked but `packed`, of `router_packed`. formats: as `packing` takes them.

    `ValueError` for weights that these kernels do not take."""
    (rows, features), top_k = x.shape, ids.shape[-1]
    if not packing(formats, rows=min(rows, PACKED_ROWS)):
        raise ValueError(f"packed rows are for quantised experts and a shared expert of the same format, not for {formats}")
    (width, up_bits, up_group), (_, bits, group) = formats["gate_up"], formats["down"]
    shared_width = formats["shared_gate_up"][0]
    form = matrix_format(gate_up, bits=up_bits, group=up_group)
    shared_form = matrix_format(shared_gate_up, bits=up_bits, group=up_group)
    down_form = matrix_format(down, bits=bits, group=group, widest=DOWN_VECTOR)
    length = packed_length(form, x.dtype)
    check_argument(packed, name="packed", shape=(rows, length), dtypes=(torch.int32,))
    arch, shape = tuning.architecture(x.device), f"{features}x{width}/{rows}"
    first = tuning.lookup("moe_gate_up_packed", f"{tuning.weight_class(up_bits)}/{shape}", arch)
    second = tuning.lookup("moe_down_packed", f"{tuning.weight_class(bits)}/{shape}", arch)
    act_form = act_format(
        bits=bits, group=group, vector=down_form[5], width=width, shared_width=shared_width, top_k=top_k, dtype=x.dtype
    )
    each, warps, in_vector = first["EACH"], first["num_warps"], down_form[5] * 32 // bits
    each = max(each, in_vector // warps)  # whole vectors
    act = torch.empty((rows, act_form[7]), dtype=torch.int32, device=x.device)
    common = {"ACT": act_form, "INTERPRETED": not x.is_cuda, "PDL": has_pdl(x)}
    blocks = triton.cdiv(max(width, shared_width), each * warps)
    whole = width == shared_width and width % (each * warps) == 0
    by_expert = first["BY_EXPERT"] is not None and rows >= first["BY_EXPERT"]
    piece = first["PIECE"] if by_expert else 0
    spread = spread_of(form, each=each, warps=warps, piece=piece, whole=whole and piece < 2)
    wrap_triton(gate_up_packed_kernel)[(blocks, top_k + 1, rows)](
        packed, order_pairs(ids, piece) if piece else ids, weights, gate_up, gate_up_scales, shared_gate_up,
        shared_gate_up_scales, act, FORMAT=form, SHARED_FORMAT=shared_form, SPREAD=spread, LIMBS=int16_limbs(x.dtype),
        PACKED=length, CACHE=first["CACHE"], num_warps=warps, **common,
    )  # fmt: skip
    slots = triton.next_power_of_2(top_k)
    fold = folded_rows(block=second["BLOCK_D"], slots=slots, features=features, bits=shared_width * bits)
    wrap_triton(down_packed_kernel)[(triton.cdiv(features, second["BLOCK_D"]), rows)](
        x, ids, down, down_scales, shared_down, shared_down_scales, act, out, x.stride(0), SLOTS=slots, FORMAT=down_form,
        SHARED_FORMAT=matrix_format(shared_down, bits=bits, group=group, widest=DOWN_VECTOR, fold=fold), FOLD=fold, **common,
        **second,
    )  # fmt: skip
