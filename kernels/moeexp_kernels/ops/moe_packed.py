"""Experts of few tokens whose weights are quantised: the two kernels of `moe_pairs.py` on activations that are integers already.
The router's kernel packs the rows of x, and a warp of gate/up has rows of its own and nothing to prepare. Gate/up packs what it
finds, so that the hundreds of programs of `down` need not each do so.

Shape letters and weight formats: `moe.py`; packed rows: `parts/packed.py` and `parts/act.py`; products: `parts/warp_rows.py` and
`parts/int_dot.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.moe_pairs import DOWN_VECTOR, folded_rows, load_down, load_ids, slots_of_warps, warps_of
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import EXPERTS, LENGTH, act_format, load_packed_act, rows_of_vectors, store_packed_act
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.int_dot import dot_rows, int16_limbs, sum_last, vector_products
from moeexp_kernels.parts.matrix import BITS, FEATURES, ROWS, VECTOR, WORDS, at_row, matrix_format
from moeexp_kernels.parts.packed import packable, packed_length
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next
from moeexp_kernels.parts.warp_rows import BY_EXPERT, EACH, WARPS, dot_warp_rows, load_packed, load_warp_rows, spread_of

ORDERED_PAIRS = 32  # of a program
PACKED_ROWS = 32  # tokens for which the router packs rows, as many as the tile of experts takes


@triton.jit
def load_gate_up(
    w_ptr, s_ptr, row, base, FORMAT: tl.constexpr, SPREAD: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """(words, scale pairs) of gate rows, the same of up rows, of one expert, whose matrix [2*I, K] begins `base` rows behind
    w_ptr."""
    width: tl.constexpr = FORMAT[ROWS] // 2
    gate = load_warp_rows(w_ptr, s_ptr, row, base, width, FORMAT, SPREAD, CACHE)
    # From a row further on, for offsets of their own would be worked out otherwise.
    w_ptr, s_ptr = at_row(w_ptr, s_ptr, width, FORMAT)
    return gate, load_warp_rows(w_ptr, s_ptr, row, base, width, FORMAT, SPREAD, CACHE)


@triton.jit
def store_swiglu(
    gate_pair, up_pair, share, packed_ptr, act_ptr, first, last, FORMAT: tl.constexpr, ACT: tl.constexpr,
    SPREAD: tl.constexpr, LIMBS: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Packs share * silu(gate) * up of a token as vectors first .. of its packed activations at act_ptr, those before `last`.
    packed_ptr: its packed row."""
    features = load_packed(packed_ptr, FORMAT, SPREAD, LIMBS)
    r = tl.load(packed_ptr + (PACKED - 4)).to(tl.float32, bitcast=True)
    gate = r * dot_warp_rows(gate_pair[0], gate_pair[1], features, FORMAT, LIMBS, INTERPRETED)
    up = r * dot_warp_rows(up_pair[0], up_pair[1], features, FORMAT, LIMBS, INTERPRETED)
    store_packed_act(act_ptr, share * gate * tl.sigmoid(gate) * up, first, last, ACT, SPREAD, LIMBS)


@triton.jit
def order_pairs_kernel(ids_ptr, order_ptr, PAIRS, PADDED: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr):
    """order [PAIRS] int32: the pairs of token and expert by expert, then by token, each as expert << 16 | pair. ids [PAIRS], a
    token's experts in a row; PADDED: PAIRS rounded up to a power of 2. Grid (blocks of pairs,)."""
    order_ptr += start_next(PDL)
    p, own = tl.arange(0, PADDED), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ready = after_previous(PDL)
    ids = tl.load(ids_ptr + ready + p, mask=p < PAIRS, other=0x7FFF)
    mine = tl.load(ids_ptr + ready + own, mask=own < PAIRS, other=0)
    before = (ids[None, :] < mine[:, None]) | ((ids[None, :] == mine[:, None]) & (p[None, :] < own[:, None]))
    tl.store(order_ptr + ready + tl.sum(before.to(tl.int32), axis=1), mine << 16 | own, mask=own < PAIRS)


@triton.jit
def gate_up_packed_kernel(
    packed_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, ACT: tl.constexpr, SPREAD: tl.constexpr, LIMBS: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act [M, ACT[LENGTH]]: packed, share * silu(gate) * up of each chosen expert, then of the shared one, whose share is its
    gate's. packed [M, PACKED]; ids and weights, the experts' shares, [M, TOP_K]. FORMAT: one expert's. Grid (blocks of vectors,
    1 + TOP_K, M), the shared expert first: its programs ask for their weights before the choice is known.

    With SPREAD[BY_EXPERT] ids are those of `order_pairs_kernel`: programs go from expert to expert, so that one that several
    tokens chose is read while L2 has it."""
    TOP_K: tl.constexpr = ACT[EXPERTS]
    in_vector: tl.constexpr = ACT[VECTOR] * 32 // ACT[BITS]  # activations
    vectors: tl.constexpr = FORMAT[ROWS] // 2 // in_vector  # of an expert
    shared_vectors: tl.constexpr = SHARED_FORMAT[ROWS] // 2 // in_vector
    first = tl.program_id(0) * (SPREAD[EACH] * SPREAD[WARPS] // in_vector)
    row = rows_of_vectors(first, ACT, SPREAD)
    # What differs goes through one piece of code: instructions come from memory as well.
    if tl.program_id(1) == 0:
        m = tl.program_id(2)
        gate_pair, up_pair = load_gate_up(shared_w_ptr, shared_s_ptr, row, 0, SHARED_FORMAT, SPREAD, CACHE)
        ready = after_previous(PDL)
        before, last = TOP_K * vectors, TOP_K * vectors + shared_vectors
        share_ptr = packed_ptr.to(tl.pointer_type(tl.float32)) + m.to(tl.int64) * PACKED + (PACKED - 3)
    else:
        pair = tl.program_id(2) * TOP_K + tl.program_id(1) - 1
        ready = after_previous(PDL)  # which experts to read is the previous kernel's result
        expert = tl.load(ids_ptr + ready + pair)
        if SPREAD[BY_EXPERT]:
            pair = expert & 0xFFFF
            expert = expert >> 16
        m = pair // TOP_K
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert.to(tl.int64) * FORMAT[ROWS], FORMAT)
        gate_pair, up_pair = load_gate_up(w_ptr, s_ptr, row, 0, FORMAT, SPREAD, CACHE)
        before = pair % TOP_K * vectors
        last = before + vectors
        share_ptr = weights_ptr + pair
    share = tl.load(share_ptr + ready)
    m = m.to(tl.int64)
    store_swiglu(
        gate_pair, up_pair, share, packed_ptr + m * PACKED + ready, act_ptr + m * ACT[LENGTH] + ready, before + first, last,
        FORMAT, ACT, SPREAD, LIMBS, PACKED, INTERPRETED,
    )  # fmt: skip


@triton.jit
def sum_by_warp(part, WARPS: tl.constexpr):
    """[rows, vectors] -> [W, rows]: first what a thread has of a row, then lanes i and i + 16, i and i + 8, ... of each warp.

    `tl.sum` does so by 5 shuffles a row. Here the lanes of a warp first exchange what they have of several rows, by two
    instructions that store to shared memory and two that load, until each has several lanes' terms of one row."""
    rows: tl.constexpr = part.shape[0]
    lanes: tl.constexpr = min(32, part.shape[1])
    warps: tl.constexpr = min(WARPS, part.shape[1] // lanes)
    held: tl.constexpr = min(lanes, rows)
    part = tl.sum(tl.reshape(part, [rows, part.shape[1] // (lanes * warps), warps, lanes]), axis=1)
    part = tl.permute(tl.reshape(part, [rows, warps, held, lanes // held]), [1, 0, 3, 2])
    part = sum_last(tl.reshape(part, [warps, rows * (lanes // held), held]))
    return tl.sum(tl.reshape(part, [warps, rows, lanes // held]), axis=2)


@triton.jit
def dot_packed_act(
    found, act_ptr, ACT: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr,
    FOLD: tl.constexpr, LIMBS: tl.constexpr, EXCHANGED: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What `load_down` found of a program's rows, times a token's packed activations: float32 [BLOCK_D].

    EXCHANGED: summed by `sum_by_warp`, with fewer instructions and barriers, and 4 KiB of shared memory. It wins where programs
    are told their experts, and the shared expert's activations are asked for before it; of one token, whose programs start beside
    those of gate/up, it was slower (docs/log.md)."""
    own, shared, extra = found
    TOP_K: tl.constexpr = ACT[EXPERTS]
    stored: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32  # words of an expert's row
    features = load_packed_act(act_ptr, 0, SLOTS, TOP_K, stored, FORMAT[WORDS], stored, ACT, LIMBS)
    if EXCHANGED:
        # The shared expert's at once: behind the barriers of the sums all would wait for them.
        others = load_packed_act(
            act_ptr, TOP_K * stored, FOLD, FOLD, ACT[WORDS] - TOP_K * stored, SHARED_FORMAT[WORDS] // FOLD, 0, ACT, LIMBS
        )
        part = vector_products(own[0], own[1], features, FORMAT, LIMBS, INTERPRETED)
        y = extra + tl.sum(sum_by_warp(part, WARPS), axis=0)
        return y + dot_rows(shared[0], shared[1], others, SHARED_FORMAT, LIMBS, INTERPRETED, FOLD)
    else:
        y = extra + dot_rows(own[0], own[1], features, FORMAT, LIMBS, INTERPRETED)
        # The shared expert's, once for each of the rows that are side by side.
        features = load_packed_act(
            act_ptr, TOP_K * stored, FOLD, FOLD, ACT[WORDS] - TOP_K * stored, SHARED_FORMAT[WORDS] // FOLD, 0, ACT, LIMBS
        )
        return y + dot_rows(shared[0], shared[1], features, SHARED_FORMAT, LIMBS, INTERPRETED, FOLD)


@triton.jit
def down_packed_kernel(
    x_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, y_ptr, x_stride,
    ACT: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, FOLD: tl.constexpr,
    WARPS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """`down_kernel` of packed act [M, ACT[LENGTH]]."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    TOP_K: tl.constexpr = ACT[EXPERTS]
    D: tl.constexpr = FORMAT[ROWS]
    m = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = slots_of_warps(SLOTS, WARPS)
    found = load_down(
        x_ptr + m * x_stride, load_ids(ids_ptr, m, slot, TOP_K), slot, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, TOP_K, SLOTS,
        FORMAT, SHARED_FORMAT, FOLD, BLOCK_D, CACHE,
    )  # fmt: skip
    ready = after_previous(PDL)
    y_ptr += ready
    act_ptr += m * ACT[LENGTH] + ready
    y = dot_packed_act(found, act_ptr, ACT, SLOTS, FORMAT, SHARED_FORMAT, FOLD, LIMBS, True, WARPS, INTERPRETED)
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


def order_pairs(ids: Tensor) -> Tensor:
    """ids [..., k] int32 of experts as `gate_up_packed_kernel` takes them to go by expert."""
    pairs, order = ids.numel(), torch.empty((ids.numel(),), dtype=torch.int32, device=ids.device)
    wrap_triton(order_pairs_kernel)[(triton.cdiv(pairs, ORDERED_PAIRS),)](
        ids, order, pairs, PADDED=triton.next_power_of_2(pairs), BLOCK_P=ORDERED_PAIRS, PDL=has_pdl(ids), num_warps=4
    )
    return order


class PackedLaunch(NamedTuple):
    """What the launches of gate/up and `down` have in common with those of `moe_routed.py`."""

    act: Tensor  # [M, ACT[LENGTH]] int32, of no content yet
    by_expert: bool  # whether gate/up takes what `order_pairs` makes of the ids
    up_grid: tuple[int, int, int]
    up: dict[str, Any]
    down_grid: tuple[int, int]
    down: dict[str, Any]


def packed_launch(
    *, x: Tensor, top_k: int, gate_up: Tensor, shared_gate_up: Tensor, down: Tensor, shared_down: Tensor,
    formats: dict[str, tuple[int, int, int]],
) -> PackedLaunch:  # fmt: skip
    """Of x [M, D] and experts whose formats are as `packing` takes them.

    `ValueError` for weights that these kernels do not take."""
    rows, features = x.shape
    if not packing(formats, rows=min(rows, PACKED_ROWS)):
        raise ValueError(f"packed rows are for quantised experts and a shared expert of the same format, not for {formats}")
    (width, up_bits, up_group), (_, bits, group) = formats["gate_up"], formats["down"]
    shared_width = formats["shared_gate_up"][0]
    form = matrix_format(gate_up, bits=up_bits, group=up_group)
    down_form = matrix_format(down, bits=bits, group=group, widest=DOWN_VECTOR)
    arch, shape = tuning.architecture(x.device), f"{features}x{width}/{rows}"
    first = tuning.lookup("moe_gate_up_packed", f"{tuning.weight_class(up_bits)}/{shape}", arch)
    second = tuning.lookup("moe_down_packed", f"{tuning.weight_class(bits)}/{shape}", arch)
    act_form = act_format(
        bits=bits, group=group, vector=down_form[5], features=top_k * width + shared_width, dtype=x.dtype, top_k=top_k
    )
    each, warps, in_vector = first["EACH"], first["num_warps"], down_form[5] * 32 // bits
    each = max(each, in_vector // warps)  # whole vectors
    common = {"ACT": act_form, "INTERPRETED": not x.is_cuda, "PDL": has_pdl(x)}
    whole = width == shared_width and width % (each * warps) == 0
    by_expert = first["BY_EXPERT"] is not None and rows >= first["BY_EXPERT"]
    up = common | {
        "FORMAT": form, "SHARED_FORMAT": matrix_format(shared_gate_up, bits=up_bits, group=up_group),
        "SPREAD": spread_of(form, each=each, warps=warps, by_expert=by_expert, whole=whole), "LIMBS": int16_limbs(x.dtype),
        "PACKED": packed_length(form, x.dtype), "CACHE": first["CACHE"], "num_warps": warps,
    }  # fmt: skip
    slots = triton.next_power_of_2(top_k)
    fold = folded_rows(block=second["BLOCK_D"], slots=slots, features=features, bits=shared_width * bits)
    shared_form = matrix_format(shared_down, bits=bits, group=group, widest=DOWN_VECTOR, fold=fold)
    back = common | second | {"SLOTS": slots, "FORMAT": down_form, "SHARED_FORMAT": shared_form, "FOLD": fold}
    return PackedLaunch(
        act=torch.empty((rows, act_form[7]), dtype=torch.int32, device=x.device), by_expert=by_expert,
        up_grid=(triton.cdiv(max(width, shared_width), each * warps), top_k + 1, rows), up=up,
        down_grid=(triton.cdiv(features, second["BLOCK_D"]), rows), down=back,
    )  # fmt: skip


def launch_packed(
    *, x: Tensor, norm_weight: Tensor, packed: Tensor, eps: float, ids: Tensor, weights: Tensor, gate_up: Tensor,
    gate_up_scales: Tensor | None, down: Tensor, down_scales: Tensor | None, shared_gate_up: Tensor,
    shared_gate_up_scales: Tensor | None, shared_down: Tensor, shared_down_scales: Tensor | None, shared_gate: Tensor,
    out: Tensor, formats: dict[str, tuple[int, int, int]],
) -> None:  # fmt: skip
    """out [M, D] of x [M, D]; all checked but `packed`, of `router_packed`, which has what norm_weight, eps and shared_gate say.
    formats: as `packing` takes them.

    `ValueError` for weights that these kernels do not take."""
    launch = packed_launch(
        x=x, top_k=ids.shape[-1], gate_up=gate_up, shared_gate_up=shared_gate_up, down=down, shared_down=shared_down,
        formats=formats,
    )  # fmt: skip
    check_argument(packed, name="packed", shape=(x.shape[0], launch.up["PACKED"]), dtypes=(torch.int32,))
    wrap_triton(gate_up_packed_kernel)[launch.up_grid](
        packed, order_pairs(ids) if launch.by_expert else ids, weights, gate_up, gate_up_scales, shared_gate_up,
        shared_gate_up_scales, launch.act, **launch.up,
    )  # fmt: skip
    wrap_triton(down_packed_kernel)[launch.down_grid](
        x, ids, down, down_scales, shared_down, shared_down_scales, launch.act, out, x.stride(0),
        WARPS=warps_of(launch.down, cuda=x.is_cuda), **launch.down,
    )  # fmt: skip
