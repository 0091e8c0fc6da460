"""Integer dot products of packed weights and activations: what the GEMVs of `linear` and of the experts share on the device.

A *packed word* is 32 bits, 32 / BITS weights of a row. A *vector* is what a thread loads with one instruction: VECTOR words,
four at most (the vector width), of one quantisation group, so that it costs one scale. An int4 row in groups of 128:

    group    | weights 0 .. 127 under one pair (scale s, shift c): 64 bytes                              |
    vector   | 16 bytes            | 16 bytes            | 16 bytes            | 16 bytes                |
    word     | w0 | w1  | w2  | w3 | w4 | w5  | w6  | w7 | w8 | w9  | w10 | w11 | w12 | w13 | w14 | w15   |

    word w1, bytes 4 .. 7:   low nibbles  weights  4 ..  7
                             high nibbles weights 68 .. 71, GROUP / 2 further

Quantised weights are multiplied as integers: a vector's activations become 16-bit integers x_i times one float scale, so that
    sum_k x_k w_k = scale * (s * (sum_k x_k q_k - m sum_k x_k) + c * sum_k x_k),
where both sums are exact. An instruction (dp2a) multiplies and adds two 16-bit by 8-bit products, which needs 7
instructions a word of int4 where float32 arithmetic needs 25. These integers are 16-bit *limbs* (those of `limbs.py` have 8):
one holds a vector's activations to 1.5e-5 of its largest, a hundred times finer than bfloat16 holds them. With LIMBS = 2, for
float32 activations, a second limb holds what the first leaves over, to 5e-10.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_bytes(bytes4, low, high, total, FAST: tl.constexpr):
    """total + the four unsigned bytes of `bytes4` times four int16: the pair `low` with bytes 0, 1, `high` with 2, 3."""
    if FAST:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.u32 $0, $1, $3, $4; dp2a.hi.s32.u32 $0, $2, $3, $0;",
            "=&r,r,r,r,r",
            args=[low, high, bytes4, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total += ((low << 16) >> 16) * (bytes4 & 0xFF) + (low >> 16) * ((bytes4 >> 8) & 0xFF)
    return total + ((high << 16) >> 16) * ((bytes4 >> 16) & 0xFF) + (high >> 16) * ((bytes4 >> 24) & 0xFF)


@triton.jit
def dot_words(words, x0, x1, x2, x3, BITS: tl.constexpr, FAST: tl.constexpr):
    """Codes of int32 words times the integers of `integers_of`, summed within the word; broadcasts. int32."""
    if BITS == 4:
        total = dot_bytes(words & 0x0F0F0F0F, x0, x1, 0, FAST)
        return dot_bytes((words >> 4) & 0x0F0F0F0F, x2, x3, total, FAST)
    else:
        return dot_bytes(words, x0, x1, 0, FAST)


@triton.jit
def float_products(words, x0, x1, BITS: tl.constexpr, HALF: tl.constexpr):
    """Plain weights of int32 words times their features, float32, summed within the word. HALF: float16, else bfloat16."""
    if BITS == 32:
        return words.to(tl.float32, bitcast=True) * x0
    elif HALF:
        w0 = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        w1 = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return w0 * x0 + w1 * x1
    else:
        return (words << 16).to(tl.float32, bitcast=True) * x0 + ((words >> 16) << 16).to(tl.float32, bitcast=True) * x1


@triton.jit
def pack_pair(low, high):
    """Two float32 tensors of `1.5 * 2^23 + integer`, whose low 16 bits are the integer, as one int32 tensor."""
    return (low.to(tl.int32, bitcast=True) & 0xFFFF) | (high.to(tl.int32, bitcast=True) << 16)


@triton.jit
def value_of(shifted):
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def limb_of(x0, x1, x2, x3, x4, x5, x6, x7, factor, VECTORS: tl.constexpr, VECTOR: tl.constexpr):
    """round(x * factor) of eight features a word as four int32 pairs, their sum over each vector, and the eight remainders."""
    shift: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, to nearest even
    s0, s1, s2, s3 = x0 * factor + shift, x1 * factor + shift, x2 * factor + shift, x3 * factor + shift
    s4, s5, s6, s7 = x4 * factor + shift, x5 * factor + shift, x6 * factor + shift, x7 * factor + shift
    total = (value_of(s0) + value_of(s1)) + (value_of(s2) + value_of(s3))
    total += (value_of(s4) + value_of(s5)) + (value_of(s6) + value_of(s7))
    total = tl.sum(tl.reshape(total, [VECTORS, VECTOR]), axis=1)
    return (
        pack_pair(s0, s1), pack_pair(s2, s3), pack_pair(s4, s5), pack_pair(s6, s7), total,
        x0 * factor - (s0 - shift), x1 * factor - (s1 - shift), x2 * factor - (s2 - shift), x3 * factor - (s3 - shift),
        x4 * factor - (s4 - shift), x5 * factor - (s5 - shift), x6 * factor - (s6 - shift), x7 * factor - (s7 - shift),
    )  # fmt: skip


@triton.jit
def integers_of(
    x0, x1, x2, x3, x4, x5, x6, x7, VECTORS: tl.constexpr, VECTOR: tl.constexpr, LIMBS: tl.constexpr
):  # fmt: skip
    """Features of VECTORS * VECTOR words (float32; int8 weights: x4 to x7 are zeros) as integers: four pairs, their sum by
    vector, four pairs and the sum of the second limb (2^-15 of the first's unit), the unit [VECTORS] float32.

    A feature that is not finite makes its vector's unit NaN, and so the result."""
    largest = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    largest = tl.maximum(largest, tl.maximum(tl.maximum(tl.abs(x4), tl.abs(x5)), tl.maximum(tl.abs(x6), tl.abs(x7))))
    largest = tl.max(tl.reshape(largest, [VECTORS, VECTOR]), axis=1)
    poison = ((x0 + x1) + (x2 + x3) + (x4 + x5) + (x6 + x7)) * 0.0
    unit = largest * (1.0 / 32767.0) + tl.sum(tl.reshape(poison, [VECTORS, VECTOR]), axis=1)
    inverse = tl.where(largest > 1e-30, 32767.0 / tl.where(largest > 1e-30, largest, 1.0), 0.0)
    factor = tl.reshape(tl.broadcast_to(inverse[:, None], [VECTORS, VECTOR]), [VECTORS * VECTOR])
    p0, p1, p2, p3, total, l0, l1, l2, l3, l4, l5, l6, l7 = limb_of(x0, x1, x2, x3, x4, x5, x6, x7, factor, VECTORS, VECTOR)
    q0, q1, q2, q3, rest = p0, p1, p2, p3, total
    if LIMBS == 2:
        more = factor * 0.0 + 32768.0
        q0, q1, q2, q3, rest, l0, l1, l2, l3, l4, l5, l6, l7 = limb_of(
            l0, l1, l2, l3, l4, l5, l6, l7, more, VECTORS, VECTOR
        )  # fmt: skip
    return p0, p1, p2, p3, total, q0, q1, q2, q3, rest, unit


@triton.jit
def scaled(sums, rest_sums, total, rest, pair, unit, BITS: tl.constexpr, LIMBS: tl.constexpr):
    """Weights times features by vector, float32, from the integer sums of codes and features; all broadcast."""
    middle: tl.constexpr = 8 if BITS == 4 else 128
    scale, shift = unpack_scales(pair)
    product = (sums - middle * total).to(tl.float32)
    whole = total.to(tl.float32)
    if LIMBS == 2:
        product += (rest_sums - middle * rest).to(tl.float32) * (1.0 / 32768.0)
        whole += rest.to(tl.float32) * (1.0 / 32768.0)
    return (product * scale + whole * shift) * unit


@triton.jit
def split_words(x, BITS: tl.constexpr, WORDS: tl.constexpr):
    """[WORDS x features in a word], of any shape -> one [WORDS] tensor for each place in the word, up to four."""
    if BITS <= 8:
        even, odd = tl.split(tl.reshape(x, [WORDS, 2, 2]))  # places 0 and 2, 1 and 3
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    elif BITS == 16:
        x0, x1 = tl.split(tl.reshape(x, [WORDS, 2]))
        return x0, x1, x0, x0
    else:
        x = tl.reshape(x, [WORDS])
        return x, x, x, x


@triton.jit
def features_of_words(
    low, high, BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr, LIMBS: tl.constexpr
):  # fmt: skip
    """Features in the order of the stored words, as `dot_rows` takes them: from low [WORDS x 4] (int4: of the low nibbles)
    and high (int4: of the high ones), float32. Plain weights: two float tensors [WORDS], and nine that stay unused."""
    x0, x1, x2, x3 = split_words(low, BITS, WORDS)
    if BITS == 4:
        x4, x5, x6, x7 = split_words(high, BITS, WORDS)
        return integers_of(x0, x1, x2, x3, x4, x5, x6, x7, WORDS // VECTOR, VECTOR, LIMBS)
    elif BITS == 8:
        none = x0 * 0.0
        return integers_of(x0, x1, x2, x3, none, none, none, none, WORDS // VECTOR, VECTOR, LIMBS)
    else:
        return x0, x1, x0, x0, x0, x0, x0, x0, x0, x0, x0


@triton.jit
def stored_features(
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PERIOD: tl.constexpr = 0
):  # fmt: skip
    """Which feature stands where in the words of a row; int4: that of the low nibble, GROUP / 2 before the high one's. With
    PERIOD the same row again after so many words. The compiler sees that neighbours are contiguous."""
    each: tl.constexpr = 4 if BITS <= 8 else 32 // BITS  # int4: stored bytes, each two features
    i = tl.arange(0, WORDS * each)
    half: tl.constexpr = GROUP // 2
    if BITS == 4:
        block = i // half
        if PERIOD:
            block = block % (PERIOD * each // half)
        return block * GROUP + i % half
    elif PERIOD:
        return i % (PERIOD * each)
    else:
        return i


@triton.jit
def load_norm(
    norm_ptr, HAS_NORM: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """1 + the norm's weights in the order of the stored words, float32: those of low nibbles and of high ones (other formats:
    the same twice). Weights lie in memory since long before, so that this needs to wait for no kernel."""
    low, high = 1.0, 1.0
    if HAS_NORM:
        k = stored_features(K, GROUP, BITS, WORDS)
        low = 1.0 + tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        high = low
        if BITS == 4:
            high = 1.0 + tl.load(norm_ptr + k + GROUP // 2, mask=k < K, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def load_row_features(
    x_ptr, norm_low, norm_high, EPS: tl.constexpr, HAS_NORM: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr, LIMBS: tl.constexpr,
):  # fmt: skip
    """One row x [K] as `features_of_words`, and r: the normed row is r * x. The factor r = 1 / rms need not be known before
    the products. norm_low, norm_high: what `load_norm` found."""
    k = stored_features(K, GROUP, BITS, WORDS)
    low = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    high = low
    if BITS == 4:
        high = tl.load(x_ptr + k + GROUP // 2, mask=k < K, other=0.0).to(tl.float32)
    r = 1.0
    if HAS_NORM:
        squares = low * low + high * high if BITS == 4 else low * low
        r = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + EPS)
        low *= norm_low
        if BITS == 4:
            high *= norm_high
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit = features_of_words(low, high, BITS, WORDS, VECTOR, LIMBS)
    return x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, r


@triton.jit
def words_in_vectors(WORDS: tl.constexpr, VECTOR: tl.constexpr):
    """0 .. WORDS - 1, written so that the compiler sees no runs longer than VECTOR, the words that a thread loads at once."""
    i = tl.arange(0, WORDS)
    return (i // VECTOR) * VECTOR + i % VECTOR


@triton.jit
def load_rows(
    w_ptr, s_ptr, row, row_mask,
    K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """Rows of the matrix at w_ptr: words int32 [rows, WORDS] and their scale pairs int32 [rows, WORDS / VECTOR].

    Offsets must fit the type of `row`. 16 bytes a thread where VECTOR, the words under one scale, is 4."""
    width: tl.constexpr = K * BITS // 32
    column = words_in_vectors(WORDS, VECTOR)
    mask = row_mask[:, None] & (column < width)[None, :]
    words = tl.load(
        w_ptr.to(tl.pointer_type(tl.int32)) + (row * width)[:, None] + column[None, :],
        mask=mask, other=0, cache_modifier=CACHE,
    )  # fmt: skip
    pair = row
    if BITS <= 8:
        group = (tl.arange(0, WORDS // VECTOR) * VECTOR) // (GROUP * BITS // 32)
        # Vectors first, then transposed: of two dimensions without contiguous addresses the first is spread over lanes.
        mask = (group < K // GROUP)[:, None] & row_mask[None, :]
        offsets = group[:, None] + (row * (K // GROUP))[None, :]
        pair = tl.trans(tl.load(s_ptr.to(tl.pointer_type(tl.int32)) + offsets, mask=mask, other=0))
    return words, pair


@triton.jit
def dot_rows(
    words, pair, x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit,
    BITS: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    VECTOR: tl.constexpr, LIMBS: tl.constexpr, FOLD: tl.constexpr = 1,
):  # fmt: skip
    """Weights [ROWS, WORDS] times features [WORDS]: float32 [ROWS], every sum in a fixed order. With FOLD each row is FOLD
    rows side by side: float32 [ROWS * FOLD]."""
    if BITS <= 8:
        sums = dot_words(words, x0[None, :], x1[None, :], x2[None, :], x3[None, :], BITS, FAST)
        sums = tl.sum(tl.reshape(sums, [ROWS, WORDS // VECTOR, VECTOR]), axis=2)
        rest = sums
        if LIMBS == 2:
            rest = dot_words(words, x4[None, :], x5[None, :], x6[None, :], x7[None, :], BITS, FAST)
            rest = tl.sum(tl.reshape(rest, [ROWS, WORDS // VECTOR, VECTOR]), axis=2)
        part = scaled(sums, rest, t0[None, :], t1[None, :], pair, unit[None, :], BITS, LIMBS)
    else:
        part = float_products(words, x0[None, :], x1[None, :], BITS, HALF)
    if FOLD == 1:
        return tl.sum(part, axis=1)
    else:
        each: tl.constexpr = (WORDS // VECTOR if BITS <= 8 else WORDS) // FOLD
        return tl.reshape(tl.sum(tl.reshape(part, [ROWS, FOLD, each]), axis=2), [ROWS * FOLD])


@triton.jit
def unpack_scales(pair):
    """(scale, shift) float32 from the two float16 that one int32 load brought."""
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    shift = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, shift
