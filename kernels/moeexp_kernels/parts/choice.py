"""The choice of a token's experts, by each warp for itself, so that no warp waits for another.

A softmax renormalised over the chosen is the softmax of the chosen logits, so that no other exp is needed. Each round takes two
reductions of 32-bit integers, the largest and where it stands first: one instruction a warp each.

Tensors are [W, C, 1, K] as in `warp_rows.py`: every warp has all logits, C chunks of the K that its lanes load at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeexp_kernels.parts.spread import turned

CHUNK_LOGITS: tl.constexpr = tl.constexpr(128)  # 32 lanes load four each
NONE_LEFT: tl.constexpr = tl.constexpr(-(2**31))  # below the key of every float but one NaN
NOT_CHOSEN: tl.constexpr = tl.constexpr(-1)  # in place of an expert that is not known yet


@triton.jit
def load_keys(logits_ptr, E: tl.constexpr, E_PADDED: tl.constexpr, WARPS: tl.constexpr):
    """(keys, experts) int32 [W, C, 1, K] of the E logits at logits_ptr: integers in the order of these floats, and whose each is.
    E_PADDED: E rounded up to a power of 2. Past L1, which may hold an older token's."""
    chunk: tl.constexpr = min(E_PADDED, CHUNK_LOGITS)
    i = tl.arange(0, chunk)
    e = tl.arange(0, E_PADDED // chunk)[:, None] * chunk + (i // 4 * 4 + i % 4)[None, :]
    e = tl.expand_dims(e[None, :, :] + (tl.arange(0, WARPS) * 0)[:, None, None], 2)
    found = tl.load(logits_ptr + turned(e, True), mask=turned(e < E, True), other=0.0, cache_modifier=".cg")
    bits = turned(found, True).to(tl.int32, bitcast=True)
    return tl.where(e < E, bits ^ ((bits >> 31) & 0x7FFFFFFF), NONE_LEFT), e


@triton.jit
def best_of(keys, e, E_PADDED: tl.constexpr):
    """(logit float32, expert int32), both [W, 1], of the largest, the first of equal ones."""
    best = tl.max(tl.max(keys, axis=1), axis=2)
    here = tl.where(keys == best[:, None, :, None], e, E_PADDED)
    return (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True), tl.min(tl.min(here, axis=1), axis=2)


@triton.jit
def without(keys, e, expert):
    """The keys but that of `expert` [W, 1]."""
    return tl.where(e == expert[:, None, :, None], NONE_LEFT, keys)


@triton.jit
def choice(keys, e, slot, E_PADDED: tl.constexpr, TOP_K: tl.constexpr):
    """(ids int32, shares float32), both [W, n], of `slot` [W, n] or [1, n]: slots 0 .. TOP_K - 1 are the largest, largest first,
    equal ones by their indices; beyond TOP_K both are 0."""
    # TOP_K, in a way that hides it from the compiler, which would make a copy of the loop's body for each round: a kernel's
    # instructions come from memory as well, and its first programs wait for them.
    rounds = TOP_K + (tl.program_id(0) >> 30)
    largest, expert = best_of(keys, e, E_PADDED)
    ids, total = tl.where(slot == 0, expert, 0), tl.exp(largest - largest)
    shares = tl.where(slot == 0, total, 0.0)
    for i in range(1, rounds):
        keys = without(keys, e, expert)
        logit, expert = best_of(keys, e, E_PADDED)
        share = tl.exp(logit - largest)
        total += share  # in this order wherever shares are made
        ids, shares = tl.where(slot == i, expert, ids), tl.where(slot == i, share, shares)
    return ids, shares / total


@triton.jit
def choice_of_slot(keys, e, slot, E_PADDED: tl.constexpr):
    """What `choice` has in one slot, in as many rounds as that takes, all [W, 1]: expert int32, its logit, the largest and the
    sum of shares up to it, float32; and the keys that are left for `total_of_rest`."""
    largest, expert = best_of(keys, e, E_PADDED)
    logit, total = largest, tl.exp(largest - largest)
    for _ in range(slot):
        keys = without(keys, e, expert)
        logit, expert = best_of(keys, e, E_PADDED)
        total += tl.exp(logit - largest)
    return expert, logit, largest, total, keys


@triton.jit
def total_of_rest(
    keys, e, expert, slot, total, largest, E_PADDED: tl.constexpr, TOP_K: tl.constexpr, chosen_ptr, tells
):  # fmt: skip
    """The sum of all TOP_K shares, from what `choice_of_slot` found of a slot. Of warps where `tells` [W, 1] the later slots'
    experts go to chosen_ptr [W, 1], from where slot 0's is to stand."""
    for i in range(slot + 1, TOP_K):
        keys = without(keys, e, expert)
        logit, expert = best_of(keys, e, E_PADDED)
        total += tl.exp(logit - largest)
        tl.store(chosen_ptr + i, expert, mask=tells)
    return total


@triton.jit
def smallest_of_all(x):
    """Of four dimensions, for all threads to have."""
    return tl.min(tl.min(tl.min(tl.min(x, axis=3), axis=2), axis=1), axis=0)


@triton.jit
def slept(x, INTERPRETED: tl.constexpr):
    """0, a while after x is known: who asks again at once takes from those that are to answer."""
    if INTERPRETED:
        return 0
    return tl.inline_asm_elementwise("nanosleep.u32 100; mov.b32 $0, 0;", "=r,r", args=[x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def chosen_experts(
    chosen_ptr, slot, TOP_K: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """The experts in `slot` [W, n] of the TOP_K at chosen_ptr, int32, as soon as the previous kernel has stored them all. SLOTS:
    TOP_K rounded up to a power of 2.

    Before the wait, while that kernel may run: the one before it stored NOT_CHOSEN, so that what else is seen is this call's, and
    its programs are on the GPU, all of them, or this one would not be, so that none of them waits for this one.
    Each thread looks at one place, so that no warp goes on before all have found what they look for."""
    warps: tl.constexpr = slot.shape[0]
    place = tl.arange(0, WARPS * 32 // warps)[None, None, None, :] % SLOTS + (tl.arange(0, warps) * 0)[:, None, None, None]
    at, inside = turned(chosen_ptr + place, True), turned(place < TOP_K, True)
    seen = tl.load(at, mask=inside, other=0, volatile=True)
    least = smallest_of_all(seen)
    while least < 0:
        seen = tl.load(at + slept(least, INTERPRETED), mask=inside, other=0, volatile=True)
        least = smallest_of_all(seen)
    found = tl.where(slot[:, :, None, None] == place, turned(seen, True), NOT_CHOSEN)
    return tl.max(tl.max(found, axis=3), axis=2)
