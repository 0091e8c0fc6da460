"""Gate, up and SwiGLU of the experts of few tokens, on rows that the router packed: `moe_pairs.py`'s first kernel, in which
a warp has rows of its own and nothing to prepare.

Shape letters and weight formats: `moe.py`; packed rows: `parts/packed.py`; their products: `parts/warp_rows.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.linear import weight_format
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import store_act
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.matrix import BITS, FEATURES, ROWS, WORDS, at_row
from moeexp_kernels.parts.packed import packable, packed_length
from moeexp_kernels.parts.pdl import after_previous, has_pdl
from moeexp_kernels.parts.warp_rows import EACH, WARPS, dot_warp_rows, load_packed, load_warp_rows, spread_of

PACKED_ROWS = 16  # tokens for which the router packs rows; beyond, experts on the tile are faster


@triton.jit
def load_gate_up(
    w_ptr, s_ptr, first, FORMAT: tl.constexpr, SPREAD: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """(words, scale pairs) of gate rows, the same of up rows, of one expert, whose matrix [2*I, K] starts at w_ptr."""
    width: tl.constexpr = FORMAT[ROWS] // 2
    gate = load_warp_rows(w_ptr, s_ptr, first, width, FORMAT, SPREAD, CACHE)
    return gate, load_warp_rows(w_ptr, s_ptr, first + width, 2 * width, FORMAT, SPREAD, CACHE)


@triton.jit
def shared_share(x_ptr, norm_ptr, gate_ptr, EPS: tl.constexpr, FORMAT: tl.constexpr):
    """sigmoid(gate @ norm(x)) of one row x [K]; past L1, as x is loaded before the wait."""
    k = tl.arange(0, FORMAT[WORDS] * 32 // FORMAT[BITS])  # K, rounded up to a power of 2, as WORDS is
    mask = k < FORMAT[FEATURES]
    x = tl.load(x_ptr + k, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / FORMAT[FEATURES] + EPS)
    x *= 1.0 + tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    return tl.sigmoid(r * tl.sum(x * tl.load(gate_ptr + k, mask=mask, other=0.0).to(tl.float32), axis=0))


@triton.jit
def swiglu_rows(
    packed_ptr, weights, act_ptr, factor, first,
    FORMAT: tl.constexpr, SPREAD: tl.constexpr, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr, PACKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """act[first : first + R * W] = factor * silu(gate) * up of one expert; weights: what `load_gate_up` loaded."""
    features, r = load_packed(packed_ptr, FORMAT, SPREAD, LIMBS, PACKED)
    gate = r * dot_warp_rows(weights[0][0], weights[0][1], features, FORMAT, LIMBS, INTERPRETED)
    up = r * dot_warp_rows(weights[1][0], weights[1][1], features, FORMAT, LIMBS, INTERPRETED)
    row = first + tl.arange(0, SPREAD[WARPS])[:, None] + tl.arange(0, SPREAD[EACH])[None, :] * SPREAD[WARPS]
    store_act(act_ptr, row, factor * gate * tl.sigmoid(gate) * up, row < FORMAT[ROWS] // 2, ACT_ROW, LIMBS)


@triton.jit
def gate_up_packed_kernel(
    x_ptr, norm_ptr, packed_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, shared_gate_ptr, act_ptr,
    EPS: tl.constexpr, TOP_K: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, SPREAD: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """act as `gate_up_kernel` writes it: each chosen expert's activations times its share, then the shared expert's times its
    gate. packed [M, PACKED]: of x [M, K], which is left for the gate; ids and weights [M, TOP_K]. FORMAT: one expert's.
    Grid (blocks of rows, 1 + TOP_K, M), the shared expert first: its programs know their weights before the
    choice, and x, which is older."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    width: tl.constexpr = FORMAT[ROWS] // 2
    act_row: tl.constexpr = TOP_K * width + SHARED_FORMAT[ROWS] // 2
    first = tl.program_id(0) * (SPREAD[EACH] * SPREAD[WARPS])
    m = tl.program_id(2).to(tl.int64)
    packed_ptr += m * PACKED
    act_ptr += m * (act_row * (2 if LIMBS == 1 else 1))
    if tl.program_id(1) == 0:
        if first < SHARED_FORMAT[ROWS] // 2:
            weights = load_gate_up(shared_w_ptr, shared_s_ptr, first, SHARED_FORMAT, SPREAD, CACHE)
            factor = shared_share(x_ptr + m * FORMAT[FEATURES], norm_ptr, shared_gate_ptr, EPS, SHARED_FORMAT)
            ready = after_previous(PDL)
            swiglu_rows(
                packed_ptr + ready, weights, act_ptr + ready + TOP_K * width, factor, first,
                SHARED_FORMAT, SPREAD, act_row, LIMBS, PACKED, INTERPRETED,
            )  # fmt: skip
    elif first < width:
        slot = tl.program_id(1) - 1
        ready = after_previous(PDL)  # which experts to read is the previous kernel's result
        expert = tl.load(ids_ptr + ready + m * TOP_K + slot).to(tl.int64)
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert * FORMAT[ROWS], FORMAT)
        weights = load_gate_up(w_ptr, s_ptr, first, FORMAT, SPREAD, CACHE)
        factor = tl.load(weights_ptr + ready + m * TOP_K + slot)
        swiglu_rows(
            packed_ptr + ready, weights, act_ptr + ready + slot * width, factor, first,
            FORMAT, SPREAD, act_row, LIMBS, PACKED, INTERPRETED,
        )  # fmt: skip


def packing(
    *, gate_up: Tensor, gate_up_scales: Tensor | None, shared_gate_up: Tensor, shared_gate_up_scales: Tensor | None, rows: int,
    features: int,
) -> dict[str, int]:  # fmt: skip
    """{"pack_bits", "pack_group"} of `router_packed` where the kernels of so many tokens take packed rows; else nothing."""
    found = weight_format(weight=gate_up, scales=gate_up_scales, in_features=features, name="gate_up")
    shared = weight_format(weight=shared_gate_up, scales=shared_gate_up_scales, in_features=features, name="shared_gate_up")
    bits, group = found
    if rows > PACKED_ROWS or shared != found or not packable(bits=bits, group=group):
        return {}
    return {"pack_bits": bits, "pack_group": group}


def launch_gate_up_packed(
    *, x: Tensor, norm_weight: Tensor, packed: Tensor, eps: float, ids: Tensor, weights: Tensor, gate_up: Tensor,
    gate_up_scales: Tensor | None, shared_gate_up: Tensor, shared_gate_up_scales: Tensor | None, shared_gate: Tensor, act: Tensor,
    form: tuple[int, ...], shared_form: tuple[int, ...], key: str,
) -> None:  # fmt: skip
    """act of x [M, D]; all but `packed` checked. form, shared_form: FORMAT of an expert and of the shared one."""
    (rows, _), top_k, length = x.shape, ids.shape[-1], packed_length(form, x.dtype)
    check_argument(packed, name="packed", shape=(rows, length), dtypes=(torch.int32,))
    if form[1:] != shared_form[1:] or gate_up_scales is None or shared_gate_up_scales is None:
        raise ValueError("packed rows are for quantised experts and a shared expert of the same format, which these are not")
    config = tuning.lookup("moe_gate_up_packed", f"{key}/{rows}", tuning.architecture(x.device))
    each, warps = config["EACH"], config["num_warps"]
    blocks = triton.cdiv(max(form[0], shared_form[0]) // 2, each * warps)
    wrap_triton(gate_up_packed_kernel)[(blocks, top_k + 1, rows)](
        x, norm_weight, packed, ids, weights, gate_up, gate_up_scales, shared_gate_up, shared_gate_up_scales, shared_gate, act,
        EPS=eps, TOP_K=top_k, FORMAT=form, SHARED_FORMAT=shared_form, SPREAD=spread_of(form, each=each, warps=warps),
        PACKED=length, INTERPRETED=not x.is_cuda, PDL=has_pdl(x), CACHE=config["CACHE"], num_warps=warps,
    )  # fmt: skip
