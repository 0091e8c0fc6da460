"""How a loaded tensor is spread over a program's threads, in whichever order Triton takes its dimensions.

Triton gives runs of contiguous addresses to a thread and its neighbours. Of the other dimensions one is next for lanes, and then
for warps: up to Triton 3.6 the first, since 3.7 the last but those runs. Kernels here have that dimension first which is to be
next, so that each warp loads what it multiplies and nothing goes through shared memory. For a newer Triton `turned` turns the
dimensions round for a load, and back what was loaded, which costs no instruction (docs/log.md, "Newer Triton").
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST_FIRST: tl.constexpr = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


@triton.jit
def turned(x, RUNS: tl.constexpr):
    """x of two to four dimensions, these the other way round; with RUNS, contiguous addresses, the last stays. Twice is x."""
    rank: tl.constexpr = len(x.shape)
    if LAST_FIRST:
        if rank == 2:
            if RUNS:
                return x
            else:
                return tl.trans(x)
        elif rank == 3:
            if RUNS:
                return tl.permute(x, [1, 0, 2])
            else:
                return tl.permute(x, [2, 1, 0])
        elif RUNS:
            return tl.permute(x, [2, 1, 0, 3])
        else:
            return tl.permute(x, [3, 2, 1, 0])
    else:
        return x
