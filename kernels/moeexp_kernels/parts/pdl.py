"""Programmatic dependent launch (PDL): a kernel may start while the one before it still runs, and fetch its weights meanwhile.

A kernel calls `after_previous` once in every program, adds what it returns (0) to the pointers it touches afterwards, and
touches before it only what neither the previous kernel nor anything still running can write: weights, the state that it
alone writes, positions (which a step's last kernel writes, after its wait), what earlier steps left in the KV cache, and
results of the kernel before the previous. As much as that allows is done before: afterwards the whole GPU waits for each load and
each reduction. The last kind is safe because the call waits *first* and lets the next kernel start *then*: when a kernel starts
under PDL, all programs of the previous one are past their own wait, so that everything before that one is complete and visible. A
kernel that reads its own state before its wait must not directly follow another call on the same state; in a model its layer's
other kernels stand between. One thing of the previous kernel's is read while that may run: its choice of experts, by the number
that says that none is there yet (`parts/choice.py`). A program that has nothing to do may leave without a wait, as long as others
of its kernel wait.

A kernel whose successor reads nothing before its wait but weights, or what is older than this kernel's predecessor, lets it
start at once, by `start_next`: a short kernel would otherwise leave it no time to load its weights. The successor is of another
op and may be any, so that those of `EARLY` alone get a programmatic edge behind such a kernel.

The order is kept by the pointers and not by a side effect: torch takes a kernel with an assembly instruction that has side
effects for one that writes all its arguments.

Without a programmatic edge (an ordinary launch) both instructions do nothing. Edges are made programmatic after capture,
by `graph_edges`, for the kernels named below alone.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moeexp_kernels.parts.tuning import architecture

# Kernels that call `after_previous` on every path; a test compares the list with the sources.
PDL_KERNELS = (
    "embedding_kernel",
    "gemv_kernel",
    "limbs_kernel",
    "linear_tile_kernel",
    "choose_experts_kernel",
    "logits_packed_kernel",
    "gate_up_kernel",
    "order_pairs_kernel",
    "gate_up_packed_kernel",
    "down_kernel",
    "down_packed_kernel",
    "gate_up_routed_kernel",
    "down_routed_kernel",
    "gate_up_tile_kernel",
    "down_tile_kernel",
    "combine_tile_kernel",
    "_decode_kernel",
    "_finish_kernel",
    "gated_gemv_kernel",
    "_qk_norm_rope_kernel",
    "_attend_kernel",
    "_attend_splits_kernel",
    "_merge_kernel",
    "_narrow_kernel",
    "_chunk_best_kernel",
    "_best_kernel",
)

# Of these, the kernels (earlier, later) of one op: the edges that PDL may have where an op is timed by itself.
WITHIN_AN_OP = (
    ("limbs_kernel", "linear_tile_kernel"),
    ("gemv_kernel", "choose_experts_kernel"),
    ("gate_up_kernel", "down_kernel"),
    ("order_pairs_kernel", "gate_up_packed_kernel"),
    ("gate_up_packed_kernel", "down_packed_kernel"),
    ("gate_up_routed_kernel", "down_routed_kernel"),
    ("limbs_kernel", "gate_up_tile_kernel"),
    ("gate_up_tile_kernel", "limbs_kernel"),
    ("limbs_kernel", "down_tile_kernel"),
    ("down_tile_kernel", "combine_tile_kernel"),
    ("_decode_kernel", "_finish_kernel"),
    ("_decode_kernel", "gated_gemv_kernel"),
    ("_attend_splits_kernel", "_merge_kernel"),
    ("_chunk_best_kernel", "_narrow_kernel"),
    ("_narrow_kernel", "_narrow_kernel"),
    ("_narrow_kernel", "_chunk_best_kernel"),
    ("_chunk_best_kernel", "_best_kernel"),
)

# Kernels that let the next one start before they wait, and the kernels that may follow them so: what those read before their own
# wait is weights, or older than the kernel before.
EARLY = {
    "limbs_kernel": ("linear_tile_kernel", "gate_up_tile_kernel", "down_tile_kernel"),
    "_finish_kernel": ("gemv_kernel", "limbs_kernel", "linear_tile_kernel"),
    "_merge_kernel": ("gemv_kernel", "limbs_kernel", "linear_tile_kernel"),
    "_qk_norm_rope_kernel": ("_attend_kernel", "_attend_splits_kernel"),
    "choose_experts_kernel": ("gate_up_kernel", "gate_up_packed_kernel", "limbs_kernel", "order_pairs_kernel"),
    "order_pairs_kernel": ("gate_up_packed_kernel",),
}


@triton.jit
def start_next(PDL: tl.constexpr):
    """0; lets the next kernel start before this one waits. For the kernels of `EARLY` alone."""
    zero = 0
    if PDL:
        known = tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
            "=r,r",
            args=[tl.program_id(0) * 0],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        zero = known * 16
    return zero


@triton.jit
def after_previous(PDL: tl.constexpr):
    """0, known once the previous kernel is complete; a multiple of 16, so that pointers keep their alignment."""
    zero = 0
    if PDL:
        known = tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;",
            "=r,r",
            args=[tl.program_id(0) * 0],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        zero = known * 16
    return zero


def has_pdl(tensor: Tensor) -> bool:
    """Whether the tensor's GPU knows the instructions (Hopper and later); never asks CUDA about a CPU tensor."""
    if not tensor.is_cuda:
        return False
    return int(architecture(tensor.device).removeprefix("sm_")) >= 90
