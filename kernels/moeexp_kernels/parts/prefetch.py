"""Weights that a later kernel will read, brought into L2 while the memory is idle.

Most kernels of a decode step are too small to keep the memory busy: between one large read of weights and the next lie
kernels that wait for one another. Weights are known before the step begins, so that a GEMV asks for the next GEMV's weights
as soon as it has asked for its own; nothing waits for them. What the later kernel computes is the same to the bit.

A GEMV brings at most AHEAD_BYTES, of longer weights the first rows, which the programs that start first will read.
Source: PTX ISA, "cp.async.bulk.prefetch.L2" (Hopper and later): one thread asks for many kilobytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Beside it L2 (50 MB on an H100) has to hold the experts of one layer, 15 MB in int4, which are read meanwhile.
AHEAD_BYTES = 16 * 2**20
UNIT = 16  # bytes: addresses and lengths of a request are multiples


def ahead_lengths(weight: Tensor | None, scales: Tensor | None) -> tuple[int, int]:
    """Bytes of a weight [N, …] and of its scales [N, …] to bring: those of the same first rows, as far as AHEAD_BYTES go."""
    if weight is None:
        return 0, 0
    rows = weight.shape[0]
    row_bytes = weight.numel() // rows * weight.element_size()
    scale_bytes = 0 if scales is None else scales.numel() // rows * scales.element_size()
    rows = min(rows, AHEAD_BYTES // (row_bytes + scale_bytes))
    return rows * row_bytes // UNIT * UNIT, rows * scale_bytes // UNIT * UNIT


@triton.jit
def bring_into_l2(pointer, LENGTH: tl.constexpr):
    """Asks for this program's share of the LENGTH bytes at `pointer`. Returns 0, which must find a use, or the compiler
    drops the request; no pointer may depend on it, or torch takes what it points to for an argument that is written."""
    UNITS: tl.constexpr = LENGTH // 16
    share = tl.cdiv(UNITS, tl.num_programs(0)).to(tl.int32)
    start = tl.program_id(0).to(tl.int64) * share
    count = tl.maximum(tl.minimum(UNITS - start, share), 0).to(tl.int32)
    return tl.inline_asm_elementwise(
        """{
        .reg .pred ask;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 ask, thread, 0;
        setp.gt.and.s32 ask, $2, 0, ask;
        @ask cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        args=[(pointer.to(tl.int64) & -16) + start * 16, count * 16],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
