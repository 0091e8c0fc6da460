"""Activations between the two kernels of the experts of very few tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_act(act_ptr, offsets, values, mask, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr):
    """Activations between the two kernels: float32, or for 2-byte dtypes (LIMBS 1) as two bfloat16, the second ACT_ROW further
    on, what the first leaves over: to 2^-17 of each value, finer than the integers that `down_kernel` makes of it. Loads of
    2-byte elements give a thread the words that it multiplies."""
    if LIMBS == 1:
        first = values.to(tl.bfloat16)
        tl.store(act_ptr + offsets, first, mask=mask)
        tl.store(act_ptr + ACT_ROW + offsets, (values - first.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(act_ptr + offsets, values, mask=mask)


@triton.jit
def load_act(act_ptr, offsets, mask, ACT_ROW: tl.constexpr, LIMBS: tl.constexpr):
    """What `store_act` stored, float32."""
    values = tl.load(act_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if LIMBS == 1:
        values += tl.load(act_ptr + ACT_ROW + offsets, mask=mask, other=0.0).to(tl.float32)
    return values
