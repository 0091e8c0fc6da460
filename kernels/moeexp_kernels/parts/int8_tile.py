"""A tile of stored int4 or int8 weights times up to 32 rows of activations on int8 tensor cores.

The weights are read once for all rows. Weights are the product's M side, rows of activations (in limbs, see `limbs.py`) its N
side, padded to COLUMNS = 8, 16 or 32. Within a quantisation group all sums are of integers, hence exact in any order; per
group one float32 formula follows, and then a sum over the groups in one fixed order. So a row's result is the same to the
bit for every number of rows, every COLUMNS and every BLOCK.

    y[n, m] = sum_g  scale[n, g] * unit[m, g] * sum_i code[n, g, i] * X[m, g, i]  +  shift'[n, g] * total[m, g]

with code 0 .. 15 (int4: shift' = shift - 8 * scale) or -128 .. 127 (int8: the stored code - 128, shift' = shift).

How the work lies: a product is three-dimensional, [groups, BLOCK, GROUP / 2] x [groups, GROUP / 2, COLUMNS], so that each warp
has groups of its own and needs no loop. A group is two products, its first and its second half (int4: low and high
nibbles; so that nothing is repacked).

    one row of a half, 64 bytes:   thread 0  0 .. 15 | thread 1  16 .. 31 | thread 2  32 .. 47 | thread 3  48 .. 63

Each of four neighbouring threads loads 16 consecutive bytes, while an instruction (mma.m16n8k32) wants 4 + 4 bytes of each
thread. Which features meet in an instruction does not matter as long as weights and activations agree: `fragment` takes the
4-byte words of all threads in turn. So a thread multiplies what its loads bring into its registers, of weights and of limbs,
and neither goes through shared memory. FORMAT: `matrix.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moeexp_kernels.parts.int_dot import sum_last, unpack_scales
from moeexp_kernels.parts.limbs import FINER
from moeexp_kernels.parts.matrix import BITS, FEATURES, GROUP, WORDS
from moeexp_kernels.parts.spread import turned

GROUPS_SERVED = (64, 128)  # the instruction takes 32 bytes of a half at a time; sums of larger groups are not tested


@triton.jit
def fragment(x):
    """[8, groups, rows / 8, GROUP / 2] as loaded -> [groups, rows, GROUP / 2], features in the order in which threads hold
    them."""
    groups: tl.constexpr = x.shape[1]
    rows: tl.constexpr = 8 * x.shape[2]
    half: tl.constexpr = x.shape[3]
    x = tl.reshape(x, [8, groups, rows // 8, 4, half // 16, 4])
    return tl.reshape(tl.permute(x, [1, 2, 0, 4, 3, 5]), [groups, rows, half])


@triton.jit
def low_nibbles(q, INTERPRETED: tl.constexpr):
    """Low nibbles of packed bytes, int8 0 .. 15: one instruction for four."""
    if INTERPRETED:
        return (q & 0xF).to(tl.int8)
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", args=[q], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def high_nibbles(q, INTERPRETED: tl.constexpr):
    """High nibbles of packed bytes, int8 0 .. 15: two instructions for four."""
    if INTERPRETED:
        return (q >> 4).to(tl.int8)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 w; shr.u32 w, $1, 4; and.b32 $0, w, 0x0F0F0F0F; }",
        "=r,r",
        args=[q],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def centred_bytes(q, INTERPRETED: tl.constexpr):
    """Bytes -> code - 128, int8."""
    if INTERPRETED:
        return (q ^ 0x80).to(tl.int8, bitcast=True)
    return tl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", args=[q], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def stored_row(row, rows_left, BLOCK: tl.constexpr, APART: tl.constexpr, WHOLE: tl.constexpr):
    """Where row 0 .. BLOCK - 1 of a tile stands in the matrix, of which rows_left exist (with APART: in each half of the tile).
    One beyond them, whose result nobody stores, is the last one again. WHOLE: there is none such."""
    of_half = row % (BLOCK // 2) if APART else row
    stored = of_half if WHOLE else tl.minimum(of_half, rows_left - 1)
    return stored + row // (BLOCK // 2) * APART if APART else stored


@triton.jit
def load_inside(pointers, group, LEFT: tl.constexpr, GROUPS: tl.constexpr, CACHE: tl.constexpr):
    """What is at `pointers` of GROUPS groups, zeros for those from LEFT on. Without such nothing is masked: a masked load
    costs instructions that put the zeros there first."""
    pointers = turned(pointers, True)
    if LEFT >= GROUPS:
        found = tl.load(pointers, cache_modifier=CACHE)
    else:
        found = tl.load(pointers, mask=turned(group < LEFT, True), other=0, cache_modifier=CACHE)
    return turned(found, True)


@triton.jit
def load_groups(
    w_ptr, s_ptr, rows_left, BEGIN: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
    CACHE: tl.constexpr, APART: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of GROUPS groups from BEGIN on: stored bytes (int8: of the groups' first halves, and of their second ones; int4: the same
    twice) [8, GROUPS, BLOCK / 8, GROUP / 2], and scale pairs int32 [GROUPS, BLOCK].

    Rows of eight stand in the last but one dimension and groups before it, so that the compiler gives eight rows to a warp, and
    to each warp groups of its own."""
    half: tl.constexpr = FORMAT[GROUP] // 2
    in_row: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
    bytes_of_group: tl.constexpr = half if FORMAT[BITS] == 4 else FORMAT[GROUP]
    row = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, BLOCK // 8)[None, None, :, None] * 8
    group, byte = tl.arange(0, GROUPS)[None, :, None, None], tl.arange(0, half)[None, None, None, :]
    left: tl.constexpr = in_row - BEGIN
    w_ptr += BEGIN * bytes_of_group
    s_ptr += BEGIN * 2
    w_ptr += stored_row(row, rows_left, BLOCK, APART, WHOLE) * (in_row * bytes_of_group) + byte
    w_ptr += group * bytes_of_group  # by itself: of each sum the compiler puts one distance into the load
    first = load_inside(w_ptr, group, left, GROUPS, CACHE)
    second = first
    if FORMAT[BITS] == 8:
        second = load_inside(w_ptr + half, group, left, GROUPS, CACHE)
    row, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, GROUPS)[:, None]
    s_ptr = s_ptr.to(tl.pointer_type(tl.int32)) + stored_row(row, rows_left, BLOCK, APART, WHOLE) * in_row + group
    pair = load_inside(s_ptr, group, left, GROUPS, "")
    return first, second, pair


@triton.jit
def load_tile(
    w_ptr, s_ptr, rows_left, FORMAT: tl.constexpr, BLOCK: tl.constexpr, PASSES: tl.constexpr, CACHE: tl.constexpr,
    WHOLE: tl.constexpr, APART: tl.constexpr = 0,
):  # fmt: skip
    """BLOCK rows of the matrix at w_ptr, of which rows_left exist, as `multiply_tile` takes them: a tuple of what `load_groups`
    finds in each of PASSES, 1 or 2. WHOLE: all BLOCK rows exist, in every program, so that none is clamped.

    With APART the second half of the rows stands APART rows below the first (up rows below gate rows), and rows_left counts
    those of a half."""
    # Of K / GROUP groups, rounded up to a power of 2, as WORDS is.
    each: tl.constexpr = FORMAT[WORDS] * 32 // (FORMAT[BITS] * FORMAT[GROUP]) // PASSES
    first = load_groups(w_ptr, s_ptr, rows_left, 0, each, FORMAT, BLOCK, CACHE, APART, WHOLE)
    if PASSES == 1:
        return (first,)
    else:
        return first, load_groups(w_ptr, s_ptr, rows_left, each, each, FORMAT, BLOCK, CACHE, APART, WHOLE)


@triton.jit
def row_of(column, M, chosen, CHOSEN: tl.constexpr):
    """The row of activations in a column: the same, or with CHOSEN that of the column-th lowest bit set in `chosen` (up to 8
    columns, 32 rows): each thread finds it by itself, without a load. Columns from M on have the last row again: they are
    there because the instruction takes 8, and nobody stores their results."""
    column = tl.minimum(column, M - 1)
    if CHOSEN:
        bits = column * 0 + chosen
        for i in tl.static_range(7):  # 8 columns - 1
            bits = tl.where(column > i, bits & (bits - 1), bits)
        lowest = (bits & (0 - bits)).to(tl.uint32).to(tl.float32)  # 2^place, a float32 of bits (127 + place) << 23
        return (lowest.to(tl.int32, bitcast=True) >> 23) - 127
    else:
        return column


@triton.jit
def load_limb(
    limb_ptr, M, chosen, GROUPS: tl.constexpr, LEFT: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr,
    COLUMNS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """One limb of the half groups that begin at limb_ptr, as a product takes it: [GROUPS, GROUP / 2, COLUMNS], zeros beyond LEFT
    groups."""
    column = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, COLUMNS // 8)[None, None, :, None] * 8
    # Not 0 .. GROUPS - 1: the compiler would take each number once for this and for the weights' addresses, and as it has two
    # uses then, compute an address for each group. So all groups have one, and the loads hold their distances from it.
    group = tl.arange(GROUPS, 2 * GROUPS)[None, :, None, None]
    byte = tl.arange(0, FORMAT[GROUP] // 2)[None, None, None, :]
    m = row_of(column, M, chosen, CHOSEN)
    limb_ptr += m * (LIMBS * FORMAT[FEATURES]) + byte
    limb_ptr += group * FORMAT[GROUP]  # by itself: of each sum the compiler puts one distance into the load
    limb_ptr -= GROUPS * FORMAT[GROUP]
    return tl.permute(fragment(load_inside(limb_ptr, group - GROUPS, LEFT, GROUPS, "")), [0, 2, 1])


@triton.jit
def load_activations(
    limbs_ptr, units_ptr, M, chosen, BEGIN: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr,
    COLUMNS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Of GROUPS groups from BEGIN on: limbs of the first halves, limbs of the second ones, and (unit, total) of each group and
    column as one int64 [GROUPS, COLUMNS]."""
    in_row: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
    left: tl.constexpr = in_row - BEGIN
    column, group = tl.arange(0, COLUMNS)[None, :], tl.arange(0, GROUPS)[:, None]
    m = row_of(column, M, chosen, CHOSEN)
    units_ptr = units_ptr.to(tl.pointer_type(tl.int64)) + m * in_row + BEGIN + group
    units = load_inside(units_ptr, group, left, GROUPS, "")
    found = ()
    for half in tl.static_range(2):
        for limb in tl.static_range(LIMBS):
            limb_ptr = limbs_ptr + BEGIN * FORMAT[GROUP] + half * (FORMAT[GROUP] // 2) + limb * FORMAT[FEATURES]
            x = load_limb(limb_ptr, M, chosen, GROUPS, left, FORMAT, LIMBS, COLUMNS, CHOSEN)
            found = found + (x,)  # type: ignore[assignment]
    return found + (units,)


@triton.jit
def sum_groups(x, SPLIT: tl.constexpr):
    """[groups, BLOCK, COLUMNS] -> [BLOCK, COLUMNS]: groups g and g + groups / 2 first, then the sums g and g + groups / 4, ...

    The last SPLIT are one a warp."""
    if x.shape[0] > SPLIT:
        return sum_groups(tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1], x.shape[2]]), axis=0), SPLIT)
    else:
        return sum_last(tl.permute(x, [1, 2, 0]))


@triton.jit
def products_of_groups(
    loaded, held, limbs_ptr, units_ptr, M, chosen, BEGIN: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr,
    COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Each of the groups that `load_groups` loaded, from BEGIN on, by itself: float32 [groups, BLOCK, COLUMNS]; and the
    activations as they are in registers now, for another tile's `held`, which is empty for the first."""
    first, second, pair = loaded
    groups: tl.constexpr = pair.shape[0]
    shape: tl.constexpr = [groups, pair.shape[1], COLUMNS]
    now = held
    if len(held) == 0:
        now = load_activations(limbs_ptr, units_ptr, M, chosen, BEGIN, groups, FORMAT, LIMBS, COLUMNS, CHOSEN)
    # The first halves with all limbs, then the second ones: so that both need not be in registers at once.
    codes = fragment(low_nibbles(first, INTERPRETED) if FORMAT[BITS] == 4 else centred_bytes(first, INTERPRETED))
    high = tl.dot(codes, now[0], out_dtype=tl.int32)
    low = tl.dot(codes, now[1], out_dtype=tl.int32)
    if LIMBS == 3:
        rest = tl.dot(codes, now[2], out_dtype=tl.int32)
    codes = fragment(high_nibbles(second, INTERPRETED) if FORMAT[BITS] == 4 else centred_bytes(second, INTERPRETED))
    high = tl.dot(codes, now[LIMBS], high, out_dtype=tl.int32)
    low = tl.dot(codes, now[LIMBS + 1], low, out_dtype=tl.int32)
    # X = 256 * high + low. Exact: a sum of 128 products of signed bytes is 2^21 at most, so that this is 2^29 + 2^21 at most,
    # which int32 holds. The conversion rounds it once, to nearest even.
    value = (high * 256 + low).to(tl.float32)
    # Every rounding is written out: if the compiler were to choose what it fuses, it might choose another way for another shape.
    if LIMBS == 3:
        rest = tl.dot(codes, now[LIMBS + 2], rest, out_dtype=tl.int32)
        value = tl.fma(rest.to(tl.float32), 1.0 / FINER, value)
    # Per group and output, and per group and row: widened before they are taken apart, so that one conversion each brings them
    # to where the products are. The compiler takes equal values apart once.
    scale, shift = unpack_scales(tl.broadcast_to(pair[:, :, None], shape))
    if FORMAT[BITS] == 4:
        shift = tl.fma(scale, -8.0, shift)  # 8 = 2^(BITS - 1); int8's codes are centred already
    both = tl.broadcast_to(now[2 * LIMBS][:, None, :], shape)
    unit, total = both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.fma(value, scale * unit, shift * total), now


@triton.jit
def multiply_held(
    tile, held, limbs_ptr, units_ptr, M, FORMAT: tl.constexpr, LIMBS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, INTERPRETED: tl.constexpr, chosen=0, CHOSEN: tl.constexpr = False,
):  # fmt: skip
    """What `load_tile` found times M rows in limbs: float32 [BLOCK, COLUMNS], of which columns from M on mean nothing. The rows
    are the first ones from limbs_ptr and units_ptr on, or with CHOSEN those of the bits in `chosen`, of which M are set. And
    these rows as they are in registers now, by passes, for the next tile's `held`; ((), ()) for the first.

    Two passes: the first half of the groups, then the second, which needs fewer registers. The sums' order is the same."""
    values, now = products_of_groups(
        tile[0], held[0], limbs_ptr, units_ptr, M, chosen, 0, FORMAT, LIMBS, COLUMNS, INTERPRETED, CHOSEN
    )
    later = ()
    if len(tile) == 2:
        others, later = products_of_groups(
            tile[1], held[1], limbs_ptr, units_ptr, M, chosen, values.shape[0], FORMAT, LIMBS, COLUMNS, INTERPRETED, CHOSEN
        )
        values += others
    return sum_groups(values, SPLIT), (now, later)


@triton.jit
def multiply_tile(
    tile, limbs_ptr, units_ptr, M, FORMAT: tl.constexpr, LIMBS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr, chosen=0, CHOSEN: tl.constexpr = False,
):  # fmt: skip
    """`multiply_held` of one tile."""
    y, _ = multiply_held(
        tile, ((), ()), limbs_ptr, units_ptr, M, FORMAT, LIMBS, COLUMNS, SPLIT, INTERPRETED, chosen, CHOSEN
    )  # fmt: skip
    return y
