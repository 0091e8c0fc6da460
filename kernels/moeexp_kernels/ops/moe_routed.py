"""The router's choice fused into the kernels of the experts, of very few tokens: those of `moe_packed.py` on the logits.

The choice by a kernel of its own is a program for each token, for which the whole GPU waits. Here each warp of gate/up makes as
much of it as tells which expert is its own, and the rest while the weights are on their way. A program of `down` makes it before
its wait, or is told by gate/up, whose programs have chosen long before those of two tokens find room. With more tokens there is
more to do than to wait for.

Shape letters and weight formats: `moe.py`; the choice: `parts/choice.py`; the logits: `router_logits.py`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.moe_packed import PACKED_ROWS, dot_packed_act, load_gate_up, packed_launch, packing, store_swiglu
from moeexp_kernels.ops.moe_pairs import load_down, slots_of_warps, warps_of
from moeexp_kernels.ops.router import check_choice
from moeexp_kernels.ops.router_logits import launch_logits
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.act import EXPERTS, LENGTH, rows_of_vectors
from moeexp_kernels.parts.checks import FLOATS, check_argument
from moeexp_kernels.parts.choice import choice, choice_of_slot, chosen_experts, load_keys, total_of_rest
from moeexp_kernels.parts.matrix import BITS, ROWS, VECTOR
from moeexp_kernels.parts.pdl import after_previous
from moeexp_kernels.parts.warp_rows import EACH, WARPS

# CHOICE: the logits and where a choice is traced, by these names.
LOGITS: tl.constexpr = tl.constexpr(0)  # E
LOGITS_PADDED: tl.constexpr = tl.constexpr(1)  # to a power of 2
TOKENS_EACH: tl.constexpr = tl.constexpr(2)  # T
TRACED: tl.constexpr = tl.constexpr(3)  # S
STRIDE_SEQUENCE: tl.constexpr = tl.constexpr(4)  # of the trace
STRIDE_POSITION: tl.constexpr = tl.constexpr(5)
DOWN_WARPS: tl.constexpr = tl.constexpr(6)  # of a program of `down`
TOLD: tl.constexpr = tl.constexpr(7)  # whether gate/up tells `down` what it chose


@triton.jit
def gate_up_routed_kernel(
    packed_ptr, logits_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, chosen_ptr,
    FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, ACT: tl.constexpr, SPREAD: tl.constexpr, CHOICE: tl.constexpr,
    LIMBS: tl.constexpr, PACKED: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """`gate_up_packed_kernel` of logits [M, E]. With CHOICE[TOLD] its choice goes to chosen [M, TOP_K], each expert as soon as it
    is known."""
    TOP_K: tl.constexpr = ACT[EXPERTS]
    E_PADDED: tl.constexpr = CHOICE[LOGITS_PADDED]
    in_vector: tl.constexpr = ACT[VECTOR] * 32 // ACT[BITS]  # activations
    vectors: tl.constexpr = FORMAT[ROWS] // 2 // in_vector  # of an expert
    shared_vectors: tl.constexpr = SHARED_FORMAT[ROWS] // 2 // in_vector
    first = tl.program_id(0) * (SPREAD[EACH] * SPREAD[WARPS] // in_vector)
    row = rows_of_vectors(first, ACT, SPREAD)
    m = tl.program_id(2).to(tl.int64)
    warp = tl.arange(0, SPREAD[WARPS])[:, None]
    if tl.program_id(1) == 0:
        base = (warp * 0).to(tl.int64)
        gate_pair, up_pair = load_gate_up(shared_w_ptr, shared_s_ptr, row, base, SHARED_FORMAT, SPREAD, CACHE)
        ready = after_previous(PDL)
        before, last = TOP_K * vectors, TOP_K * vectors + shared_vectors
        share_ptr = packed_ptr.to(tl.pointer_type(tl.float32)) + ready + m * PACKED + (PACKED - 3)
        share = tl.load(share_ptr + warp * 0)
    else:
        slot = tl.program_id(1) - 1
        ready = after_previous(PDL)
        keys, e = load_keys(logits_ptr + ready + m * CHOICE[LOGITS], CHOICE[LOGITS], E_PADDED, SPREAD[WARPS])
        expert, logit, largest, total, keys = choice_of_slot(keys, e, slot, E_PADDED)
        gate_pair, up_pair = load_gate_up(w_ptr, s_ptr, row, expert.to(tl.int64) * FORMAT[ROWS], FORMAT, SPREAD, CACHE)
        # The programs of slot 0 tell: they are among a token's first, and come past all of its experts.
        tells = (warp * 0 + slot == 0) & CHOICE[TOLD]
        at = chosen_ptr + ready + m * TOP_K + warp * 0
        tl.store(at, expert, mask=tells)
        sum_of_all = total_of_rest(keys, e, expert, slot, total, largest, E_PADDED, TOP_K, at, tells)
        share = tl.exp(logit - largest) / sum_of_all
        before = slot * vectors
        last = before + vectors
    store_swiglu(
        gate_pair, up_pair, share, packed_ptr + m * PACKED + ready, act_ptr + m * ACT[LENGTH] + ready, before + first, last,
        FORMAT, ACT, SPREAD, LIMBS, PACKED, INTERPRETED,
    )  # fmt: skip


@triton.jit
def down_routed_kernel(
    x_ptr, choice_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, y_ptr, trace_ptr, positions_ptr,
    ACT: tl.constexpr, SLOTS: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, FOLD: tl.constexpr,
    CHOICE: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr, BLOCK_D: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """`down_packed_kernel` of logits [M, E] at choice_ptr, the result of the kernel before the previous, or, CHOICE[TOLD], of the
    experts [M, TOP_K] that the previous one chooses, asked for while it runs. A token's first program also traces its choice.
    Positions are older than a step: past L1, which may hold the last token's."""
    LIMBS: tl.constexpr = 2 if x_ptr.dtype.element_ty == tl.float32 else 1  # as `int16_limbs`
    TOP_K: tl.constexpr = ACT[EXPERTS]
    D: tl.constexpr = FORMAT[ROWS]
    m = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    position = tl.load(positions_ptr + m // CHOICE[TOKENS_EACH], cache_modifier=".cg") + m % CHOICE[TOKENS_EACH]
    slot = slots_of_warps(SLOTS, CHOICE[DOWN_WARPS])
    if CHOICE[TOLD]:
        ids = chosen_experts(choice_ptr + m * TOP_K, slot, TOP_K, SLOTS, CHOICE[DOWN_WARPS], INTERPRETED)
    else:
        keys, e = load_keys(choice_ptr + m * CHOICE[LOGITS], CHOICE[LOGITS], CHOICE[LOGITS_PADDED], slot.shape[0])
        ids, _ = choice(keys, e, slot, CHOICE[LOGITS_PADDED], TOP_K)
    found = load_down(
        x_ptr + m * D, ids, slot, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, TOP_K, SLOTS, FORMAT, SHARED_FORMAT, FOLD, BLOCK_D,
        CACHE,
    )  # fmt: skip
    ready = after_previous(PDL)
    y_ptr += ready
    act_ptr += m * ACT[LENGTH] + ready
    # The interpreter's `tl.sum` adds in an order of its own: there all sum as those do that are told their experts.
    EXCHANGED: tl.constexpr = INTERPRETED or CHOICE[TOLD]
    WARPS: tl.constexpr = CHOICE[DOWN_WARPS]
    y = dot_packed_act(found, act_ptr, ACT, SLOTS, FORMAT, SHARED_FORMAT, FOLD, LIMBS, EXCHANGED, WARPS, INTERPRETED)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)
    # The session refuses positions outside the trace; here they must not reach other memory.
    counts = (position >= 0) & (position < CHOICE[TRACED])
    limit = tl.where(counts, tl.where(tl.program_id(0) == 0, TOP_K, 0), 0)
    trace_ptr += ready + m // CHOICE[TOKENS_EACH] * CHOICE[STRIDE_SEQUENCE] + position * CHOICE[STRIDE_POSITION]
    tl.store(trace_ptr + slot, ids, mask=slot < limit)


def routed_key(*, bits: int, features: int, width: int) -> str:
    """Key of the tuning table's "moe_routed", after which "/2" is of two tokens; bits and width of gate_up."""
    return f"{tuning.weight_class(bits)}/{features}x{width}"


def launch_routed(
    *, x: Tensor, tokens: int, router: dict[str, Any], positions: Tensor, expert_ids: Tensor, out: Tensor,
    formats: dict[str, tuple[int, int, int]], **matrices: Tensor,
) -> None:  # fmt: skip
    """out [M, D] of x [M, D], `tokens` of each sequence, and the trace in expert_ids; x, out and the matrices of `moe_decode`
    checked. router: the other arguments of `launch_logits`, but for how rows are packed.

    `ValueError` for what these kernels do not take."""
    rows, experts, top_k = x.shape[0], router["weight"].shape[0], expert_ids.shape[-1]
    check_choice(batch=rows // tokens, experts=experts, top_k=top_k, positions=positions, expert_ids=expert_ids)
    launch = packed_launch(
        x=x, top_k=top_k, formats=formats,
        **{name: matrices[name] for name in ("gate_up", "shared_gate_up", "down", "shared_down")},
    )  # fmt: skip
    check_argument(router["weight"], name="weight", shape=(matrices["gate_up"].shape[0], x.shape[1]), dtypes=FLOATS)
    form: dict[str, Any] = packing(formats, rows=min(rows, PACKED_ROWS))
    logits, packed, chosen = launch_logits(x=x, top_k=top_k, **router, **form)
    trace = expert_ids.shape[1], expert_ids.stride(0), expert_ids.stride(1)
    warps = warps_of(launch.down, cuda=x.is_cuda)
    key = routed_key(bits=formats["gate_up"][1], features=x.shape[1], width=formats["gate_up"][0])
    told = tuning.lookup("moe_routed", f"{key}/{rows}", tuning.architecture(x.device))["TELLS"]
    chosen_by: dict[str, Any] = {"CHOICE": (experts, triton.next_power_of_2(experts), tokens, *trace, warps, told)}

    def stored(name: str) -> tuple[Tensor, Tensor]:
        return matrices[name], matrices[f"{name}_scales"]

    wrap_triton(gate_up_routed_kernel)[launch.up_grid](
        packed, logits, *stored("gate_up"), *stored("shared_gate_up"), launch.act, chosen, **launch.up, **chosen_by
    )
    wrap_triton(down_routed_kernel)[launch.down_grid](
        x, chosen if told else logits, *stored("down"), *stored("shared_down"), launch.act, out, expert_ids, positions,
        **launch.down, **chosen_by,
    )  # fmt: skip
