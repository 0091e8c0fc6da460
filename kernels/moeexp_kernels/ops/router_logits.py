"""The router without its choice, which is fused into the experts' kernels (`moe_routed.py`): logits, and rows packed for them.

Shape letters: `router.py`. One kernel, whose programs either multiply or pack: both need x alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.linear import flat_rows, weight_format
from moeexp_kernels.ops.router import check_packing
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import FLOATS, check_argument
from moeexp_kernels.parts.choice import NOT_CHOSEN
from moeexp_kernels.parts.int_dot import dot_rows, load_norm, load_row_features, load_rows
from moeexp_kernels.parts.matrix import FEATURES, GROUP, ROWS, matrix_format
from moeexp_kernels.parts.packed import (
    lanes_filled,
    load_group_norm,
    load_share_gate,
    of_one_group,
    pack_factors,
    pack_group,
    packed_format,
    packed_length,
)
from moeexp_kernels.parts.pdl import after_previous, has_pdl


@triton.jit
def logits_packed_kernel(
    x_ptr, w_ptr, norm_ptr, gate_ptr, logits_ptr, packed_ptr, chosen_ptr,
    EPS: tl.constexpr, M: tl.constexpr, TOP_K: tl.constexpr, FORMAT: tl.constexpr, PACK_FORMAT: tl.constexpr, PART: tl.constexpr,
    PACKED: tl.constexpr, PACKING: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """logits [M, E] = norm(x [M, K]) @ w.T, rows packed [M, PACKED] with factor and share, and NOT_CHOSEN in chosen [M, TOP_K],
    for the next kernel, which chooses. FORMAT: of w, plain; PACK_FORMAT and PART as of `pack_group`; PACKING: warps of a program.
    Grid (M * (groups + 1 + blocks of E),), m fastest. All load their weights before they wait."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    groups: tl.constexpr = PACK_FORMAT[FEATURES] // PACK_FORMAT[GROUP]
    m, part = (tl.program_id(0) % M).to(tl.int64), tl.program_id(0) // M
    if part > groups:
        row = (part - (groups + 1)) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row < FORMAT[ROWS]
        words, pair = load_rows(w_ptr, w_ptr, row, mask, FORMAT, CACHE, FORMAT[ROWS] % BLOCK_N == 0)
        norm = load_norm(norm_ptr, True, FORMAT)
        ready = after_previous(PDL)
        features, r = load_row_features(x_ptr + ready + m * FORMAT[FEATURES], norm, EPS, True, FORMAT, LIMBS)
        y = r * dot_rows(words, pair, features, FORMAT, LIMBS, INTERPRETED)
        tl.store(logits_ptr + ready + m * FORMAT[ROWS] + row, y, mask=mask)
    elif part < groups:
        norm = load_group_norm(norm_ptr, part, PACK_FORMAT, PART)
        ready = after_previous(PDL)
        pack_group(x_ptr + ready + m * FORMAT[FEATURES], norm, packed_ptr + ready + m * PACKED, part, PACK_FORMAT, PART, LIMBS)
    else:
        gate = load_share_gate(norm_ptr, gate_ptr, PACK_FORMAT, PACKING)
        ready = after_previous(PDL)
        for slot in tl.static_range(TOP_K):
            tl.store(chosen_ptr + ready + m * TOP_K + slot, NOT_CHOSEN)
        x_ptr += ready + m * FORMAT[FEATURES]
        pack_factors(x_ptr, gate, packed_ptr + ready + m * PACKED, EPS, PACK_FORMAT, PACKED, PACKING)


def launch_logits(
    *, x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, shared_gate: Tensor, top_k: int, pack_bits: int,
    pack_group: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logits float32 [M, E] of norm(x) @ weight.T, rows packed int32 [M, length] as `router_packed` packs them, chosen int32
    [M, top_k] of NOT_CHOSEN) of x [..., K], M rows. For few tokens: each reads the weight. `ValueError` for strides, shapes or
    dtypes not taken."""
    (experts, features), rows = weight.shape, x.shape[:-1].numel()
    check_argument(norm_weight, name="norm_weight", shape=(features,), dtypes=FLOATS)
    check_packing(features=features, shared_gate=shared_gate, bits=pack_bits, group=pack_group)
    bits, _ = weight_format(weight=weight, scales=None, in_features=features, name="router weight")
    flat = flat_rows(x, name="x", features=features)
    config = tuning.lookup(
        "router_gemv", f"{tuning.weight_class(bits)}/{experts}x{features}", tuning.architecture(x.device)
    )  # fmt: skip
    form = packed_format(bits=pack_bits, group=pack_group, features=features)
    length = packed_length(form, x.dtype)
    # A half of a row that a warp's lanes do not fill would be all warps', each of which writes its sum to the same place.
    warps = config["num_warps"] if lanes_filled(form) else 1
    logits = torch.empty((rows, experts), dtype=torch.float32, device=x.device)
    packed = torch.empty((rows, length), dtype=torch.int32, device=x.device)
    chosen = torch.empty((rows, top_k), dtype=torch.int32, device=x.device)
    programs = features // pack_group + 1 + triton.cdiv(experts, config["BLOCK_N"])
    wrap_triton(logits_packed_kernel)[(rows * programs,)](
        flat, weight, norm_weight, shared_gate, logits, packed, chosen, EPS=eps, M=rows, TOP_K=top_k,
        FORMAT=matrix_format(weight, bits=bits, group=features, widest=config["VECTOR"]), PACK_FORMAT=form,
        PART=of_one_group(form), PACKED=length, PACKING=warps if x.is_cuda else 1, INTERPRETED=not x.is_cuda,
        PDL=has_pdl(x), BLOCK_N=config["BLOCK_N"], CACHE=config["CACHE"], num_warps=warps,
    )  # fmt: skip
    return logits, packed, chosen
