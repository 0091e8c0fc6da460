"""Integer dot products of packed weights and activations: what the GEMVs of `linear` and of the experts share on the device.

A *word* is 32 bits, 32 / BITS weights of a row. A *vector* is what a thread loads with one instruction: VECTOR words, four at
most, of one quantisation *group*, so that it costs one scale. An int4 row in groups of 128:

    group    | 64 bytes: weights 0 .. 127, under one pair of float16 (scale s, shift c)                |
    vector   | bytes 0 .. 15       | 16 .. 31            | 32 .. 47            | 48 .. 63            |
    word     | w0 | w1  | w2  | w3 | w4 | w5  | w6  | w7 | w8 | w9  | w10 | w11 | w12 | w13 | w14 | w15   |

    word w1      byte 4         byte 5         byte 6         byte 7
    low nibble   weight  4      weight  5      weight  6      weight  7    <- first quad of activations
    high nibble  weight 68      weight 69      weight 70      weight 71    <- second quad, GROUP / 2 further
                 `-- first pair of a quad --'  `-- its second pair -----'

The bytes of an int8 word are four weights, which meet one quad. Words of plain weights hold two, or one float32.

Quantised weights are multiplied as integers: a vector's activations become 16-bit integers x_i times one float unit, so that
    sum_k x_k w_k = unit * (s * (sum_k x_k q_k - m sum_k x_k) + c * sum_k x_k),   m = 2^(BITS - 1)
where both sums are exact. An instruction (dp2a) multiplies and adds two 16-bit by 8-bit products, which needs 6
instructions a word of int4 where float32 arithmetic needs 25. These integers are 16-bit *limbs* (those of `limbs.py` have 8):
one holds a vector's activations to 1.5e-5 of its largest, a hundred times finer than bfloat16 holds them. With LIMBS = 2, for
float32 activations, a second limb holds what the first leaves over, to 5e-10.

Activations are handed on as one tuple, *features*: (unit, limb) or (unit, limb, limb), where a limb is (pairs, total): two or
four int32 [words], two integers in each, and their sum by vector. For plain weights: (x,) or (x, x), float32 [words].
FORMAT: `matrix.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeexp_kernels.parts.limbs import TINY, integer_of
from moeexp_kernels.parts.matrix import BITS, FEATURES, FLOAT16, GROUP, VECTOR, WORDS
from moeexp_kernels.parts.spread import turned

LARGEST_INT16: tl.constexpr = tl.constexpr(32767.0)  # 2^15 - 1
FINER_INT16: tl.constexpr = tl.constexpr(32768.0)  # 2^15 units of the second limb in one of the first: half of one is 2^14
NIBBLES: tl.constexpr = tl.constexpr(0x0F0F0F0F)  # the low one of each byte
HIGH_NIBBLES: tl.constexpr = tl.constexpr(-0x0F0F0F10)  # the high one, 16 times its value: 0xF0F0F0F0 as int32


def int16_limbs(dtype: torch.dtype) -> int:
    """16-bit limbs of an activation: one is finer than a 2-byte dtype, float32 takes two."""
    return 2 if dtype == torch.float32 else 1


# --- activations ---


@triton.jit
def round_quad(x, factor):
    """round(x * factor) of a quad, int32, their sum, and the quad that is left over."""
    i0, left0 = integer_of(x[0] * factor)
    i1, left1 = integer_of(x[1] * factor)
    i2, left2 = integer_of(x[2] * factor)
    i3, left3 = integer_of(x[3] * factor)
    return (i0, i1, i2, i3), (i0 + i1) + (i2 + i3), (left0, left1, left2, left3)


@triton.jit
def pack_quad(i):
    """Four integers of 16 bits as two int32 pairs."""
    return (i[0] & 0xFFFF) | (i[1] << 16), (i[2] & 0xFFFF) | (i[3] << 16)


@triton.jit
def by_vector(x, FORMAT: tl.constexpr):
    """[words] -> [words / VECTOR, VECTOR]"""
    return tl.reshape(x, [x.shape[0] // FORMAT[VECTOR], FORMAT[VECTOR]])


@triton.jit
def limb_of(quads, factor, FORMAT: tl.constexpr):
    """round(x * factor) of one quad a word, or two, as a limb; and the quads that are left over."""
    i, total, left = round_quad(quads[0], factor)
    if FORMAT[BITS] == 4:
        j, others, last = round_quad(quads[1], factor)
        total = tl.sum(by_vector(total + others, FORMAT), axis=1)
        return (pack_quad(i) + pack_quad(j), total), (left, last)
    else:
        return (pack_quad(i), tl.sum(by_vector(total, FORMAT), axis=1)), (left,)


@triton.jit
def larger(a, b):
    """The larger of two; NaN where one is that, as the plain maximum is not."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(x):
    """The largest magnitude of a quad; NaN where one is that."""
    return larger(larger(tl.abs(x[0]), tl.abs(x[1])), larger(tl.abs(x[2]), tl.abs(x[3])))


@triton.jit
def integers_of(quads, FORMAT: tl.constexpr, LIMBS: tl.constexpr):
    """Features of words of quantised weights from one float32 quad a word, or two.

    A feature that is not finite makes its vector's unit NaN, and so the result."""
    x = quads[0]
    largest = largest_of(x)
    if FORMAT[BITS] == 4:
        x = quads[1]
        largest = larger(largest, largest_of(x))
    largest = tl.reduce(by_vector(largest, FORMAT), 1, larger)
    unit = largest * (1.0 / LARGEST_INT16) + (largest - largest)  # infinity less itself is NaN
    inverse = tl.where(largest > TINY, LARGEST_INT16 / tl.where(largest > TINY, largest, 1.0), 0.0)
    factor = tl.reshape(tl.broadcast_to(inverse[:, None], by_vector(x[0], FORMAT).shape), x[0].shape)
    first, rest = limb_of(quads, factor, FORMAT)
    if LIMBS == 1:
        return unit, first
    else:
        second, _ = limb_of(rest, FINER_INT16, FORMAT)
        return unit, first, second


@triton.jit
def split_words(x, BITS: tl.constexpr):
    """[words x features in a word] -> one [words] tensor for each place in the word, up to four: a quad, for 4 and 8 bits."""
    if BITS <= 8:
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))  # places 0 and 2, 1 and 3
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    elif BITS == 16:
        return tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    else:
        return (x,)


@triton.jit
def features_of_words(low, high, FORMAT: tl.constexpr, LIMBS: tl.constexpr):
    """Features as `dot_rows` takes them from activations in the order of the stored words, float32: low (int4: of the low
    nibbles) and high (int4: of the high ones), in each the four of a word, or what a word of plain weights has."""
    places = split_words(low, FORMAT[BITS])
    if FORMAT[BITS] == 4:
        return integers_of((places, split_words(high, 4)), FORMAT, LIMBS)
    elif FORMAT[BITS] == 8:
        return integers_of((places,), FORMAT, LIMBS)
    else:
        return places


@triton.jit
def stored_features(FORMAT: tl.constexpr, FOLD: tl.constexpr = 1):
    """Which feature stands where in the words of a row; int4: that of the low nibble, GROUP / 2 before the high one's. Where
    the format's row is FOLD rows side by side: which of its own. The compiler sees that neighbours are contiguous."""
    each: tl.constexpr = 4 if FORMAT[BITS] <= 8 else 32 // FORMAT[BITS]  # int4: stored bytes, each two features
    stored: tl.constexpr = FORMAT[WORDS] * each
    i = tl.arange(0, stored)
    half: tl.constexpr = FORMAT[GROUP] // 2
    if FORMAT[BITS] == 4:
        block = i // half
        if FOLD > 1:
            block = block % (stored // FOLD // half)
        return block * FORMAT[GROUP] + i % half
    elif FOLD > 1:
        return i % (stored // FOLD)
    else:
        return i


@triton.jit
def load_norm(norm_ptr, HAS_NORM: tl.constexpr, FORMAT: tl.constexpr):
    """1 + the norm's weights in the order of the stored words, float32: those of low nibbles and of high ones (other formats:
    the same twice). Weights lie in memory since long before, so that this needs to wait for no kernel."""
    low, high = 1.0, 1.0
    if HAS_NORM:
        k = stored_features(FORMAT)
        low = 1.0 + tl.load(norm_ptr + k, mask=k < FORMAT[FEATURES], other=0.0).to(tl.float32)
        high = low
        if FORMAT[BITS] == 4:
            k += FORMAT[GROUP] // 2
            high = 1.0 + tl.load(norm_ptr + k, mask=k < FORMAT[FEATURES], other=0.0).to(tl.float32)
    return low, high


@triton.jit
def load_row_features(
    x_ptr, norm, EPS: tl.constexpr, HAS_NORM: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr
):  # fmt: skip
    """Features of one row x [K], and r: the normed row is r * x. The factor r = 1 / rms need not be known before the products.
    norm: what `load_norm` found."""
    k = stored_features(FORMAT)
    low = tl.load(x_ptr + k, mask=k < FORMAT[FEATURES], other=0.0).to(tl.float32)
    high = low
    if FORMAT[BITS] == 4:
        k += FORMAT[GROUP] // 2
        high = tl.load(x_ptr + k, mask=k < FORMAT[FEATURES], other=0.0).to(tl.float32)
    r = 1.0
    if HAS_NORM:
        squares = low * low + high * high if FORMAT[BITS] == 4 else low * low
        r = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / FORMAT[FEATURES] + EPS)
        low *= norm[0]
        if FORMAT[BITS] == 4:
            high *= norm[1]
    return features_of_words(low, high, FORMAT, LIMBS), r


# --- weights ---


@triton.jit
def words_in_vectors(FORMAT: tl.constexpr):
    """0 .. WORDS - 1, written so that the compiler sees no runs longer than VECTOR, the words that a thread loads at once."""
    i = tl.arange(0, FORMAT[WORDS])
    return (i // FORMAT[VECTOR]) * FORMAT[VECTOR] + i % FORMAT[VECTOR]


@triton.jit
def load_rows(
    w_ptr, s_ptr, row, row_mask, FORMAT: tl.constexpr, CACHE: tl.constexpr, WHOLE: tl.constexpr = False
):  # fmt: skip
    """Rows of the matrix at w_ptr: words int32 [rows, WORDS] and their scale pairs int32 [rows, WORDS / VECTOR].

    Offsets must fit the type of `row`. 16 bytes a thread where VECTOR, the words under one scale, is 4. WHOLE: row_mask is true
    throughout, and not read; what is masked costs an instruction a load."""
    width: tl.constexpr = FORMAT[FEATURES] * FORMAT[BITS] // 32
    whole: tl.constexpr = WHOLE and width == FORMAT[WORDS]
    column = words_in_vectors(FORMAT)
    w_ptr = w_ptr.to(tl.pointer_type(tl.int32)) + (row * width)[:, None] + column[None, :]
    if whole:
        words = tl.load(w_ptr, cache_modifier=CACHE)
    else:
        words = tl.load(w_ptr, mask=row_mask[:, None] & (column < width)[None, :], other=0, cache_modifier=CACHE)
    pair = row
    if FORMAT[BITS] <= 8:
        groups: tl.constexpr = FORMAT[FEATURES] // FORMAT[GROUP]
        group = group_of_vector(FORMAT)
        # Vectors first, then transposed: of two dimensions without contiguous addresses the first is spread over lanes.
        s_ptr = s_ptr.to(tl.pointer_type(tl.int32)) + group[:, None] + (row * groups)[None, :]
        if whole:
            pair = tl.load(turned(s_ptr, False))
        else:
            pair = tl.load(turned(s_ptr, False), mask=turned((group < groups)[:, None] & row_mask[None, :], False), other=0)
        pair = tl.trans(turned(pair, False))
    return words, pair


@triton.jit
def group_of_vector(FORMAT: tl.constexpr):
    """The group of each vector of a row, [WORDS / VECTOR]."""
    return (tl.arange(0, FORMAT[WORDS] // FORMAT[VECTOR]) * FORMAT[VECTOR]) // (FORMAT[GROUP] * FORMAT[BITS] // 32)


@triton.jit
def unpack_scales(pair):
    """(scale, shift) float32 from the two float16 that one int32 load brought."""
    scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    shift = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, shift


# --- products ---


@triton.jit
def dot_bytes(bytes4, pair0, pair1, total, INTERPRETED: tl.constexpr):
    """total + the four unsigned bytes of `bytes4` times four int16: `pair0` with bytes 0 and 1, `pair1` with 2 and 3."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            "dp2a.lo.s32.u32 $0, $1, $3, $4; dp2a.hi.s32.u32 $0, $2, $3, $0;",
            "=&r,r,r,r,r",
            args=[pair0, pair1, bytes4, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total += ((pair0 << 16) >> 16) * (bytes4 & 0xFF) + (pair0 >> 16) * ((bytes4 >> 8) & 0xFF)
    return total + ((pair1 << 16) >> 16) * ((bytes4 >> 16) & 0xFF) + (pair1 >> 16) * ((bytes4 >> 24) & 0xFF)


@triton.jit
def places_of(x, VECTOR: tl.constexpr):
    """[a, b, c, words] -> VECTOR tensors [a, b, c, vectors], one for each place in a vector; each thread has whole vectors."""
    if VECTOR == 1:
        return (x,)
    elif VECTOR == 2:
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2]))
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3


@triton.jit
def dot_limb(words, pairs, FORMAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Codes of words int32 [a, b, c, words] times the integers of a limb, of as many dimensions, summed by vector: int32
    [a, b, c, vectors]. High nibbles are summed where they stand, as 16 times their value: to shift the sum is one instruction
    where a shift of each word would be VECTOR. 16 products of 16 * 15 * 32,767 are below 2^27."""
    count: tl.constexpr = FORMAT[VECTOR]
    own, first, second = places_of(words, count), places_of(pairs[0], count), places_of(pairs[1], count)
    sums = 0
    if FORMAT[BITS] == 4:
        third, fourth, high = places_of(pairs[2], count), places_of(pairs[3], count), 0
        for i in tl.static_range(count):
            sums = dot_bytes(own[i] & NIBBLES, first[i], second[i], sums, INTERPRETED)
            high = dot_bytes(own[i] & HIGH_NIBBLES, third[i], fourth[i], high, INTERPRETED)
        return sums + (high >> 4)
    else:
        for i in tl.static_range(count):
            sums = dot_bytes(own[i], first[i], second[i], sums, INTERPRETED)
        return sums


@triton.jit
def integer_products(
    words, pair, features, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Quantised weights times features, float32, summed by vector: words [a, b, c, words], pairs [a, b, c, vectors], and features
    of as many dimensions."""
    middle: tl.constexpr = 1 << (FORMAT[BITS] - 1)
    scale, shift = unpack_scales(pair)
    total = features[1][1]
    product = (dot_limb(words, features[1][0], FORMAT, INTERPRETED) - middle * total).to(tl.float32)
    whole = total.to(tl.float32)
    if LIMBS == 2:
        total = features[2][1]
        rest = dot_limb(words, features[2][0], FORMAT, INTERPRETED) - middle * total
        product = tl.fma(rest.to(tl.float32), 1.0 / FINER_INT16, product)
        whole = tl.fma(total.to(tl.float32), 1.0 / FINER_INT16, whole)
    # Written out: what the compiler fuses of a sum of two products, and which of them, depends on the rows of a program.
    return tl.fma(product, scale * features[0], shift * (whole * features[0]))


@triton.jit
def limb_in_four_dimensions(limb, FORMAT: tl.constexpr):
    """A limb [words] and its totals [vectors], with three dimensions of 1 before."""
    pairs, total = limb
    one, two, sums = pairs[0][None, None, None, :], pairs[1][None, None, None, :], total[None, None, None, :]
    if FORMAT[BITS] == 4:
        return (one, two, pairs[2][None, None, None, :], pairs[3][None, None, None, :]), sums
    else:
        return (one, two), sums


@triton.jit
def in_four_dimensions(features, FORMAT: tl.constexpr, LIMBS: tl.constexpr):
    """Features [words] as `integer_products` takes them."""
    unit, first = features[0][None, None, None, :], limb_in_four_dimensions(features[1], FORMAT)
    if LIMBS == 1:
        return unit, first
    else:
        return unit, first, limb_in_four_dimensions(features[2], FORMAT)


@triton.jit
def float_products(words, features, FORMAT: tl.constexpr):
    """Plain weights of words int32 [rows, WORDS] times features, float32, summed within the word."""
    if FORMAT[BITS] == 32:
        return words.to(tl.float32, bitcast=True) * features[0][None, :]
    else:
        if FORMAT[FLOAT16]:
            w0 = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            w1 = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:  # bfloat16 is the upper half of a float32
            w0 = (words << 16).to(tl.float32, bitcast=True)
            w1 = ((words >> 16) << 16).to(tl.float32, bitcast=True)
        return tl.fma(w0, features[0][None, :], w1 * features[1][None, :])  # written out as in `integer_products`


@triton.jit
def vector_products(words, pair, features, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Quantised weights [rows, WORDS] times features [WORDS], summed by vector: float32 [rows, WORDS / VECTOR]."""
    alike = in_four_dimensions(features, FORMAT, LIMBS)
    part = integer_products(words[None, None, :, :], pair[None, None, :, :], alike, FORMAT, LIMBS, INTERPRETED)
    return tl.reshape(part, pair.shape)


@triton.jit
def dot_rows(
    words, pair, features, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr, FOLD: tl.constexpr = 1
):  # fmt: skip
    """Weights [rows, WORDS] times features [WORDS]: float32 [rows], every sum in a fixed order. With FOLD each row is FOLD
    rows side by side: float32 [rows * FOLD]."""
    if FORMAT[BITS] <= 8:
        part = vector_products(words, pair, features, FORMAT, LIMBS, INTERPRETED)
    else:
        part = float_products(words, features, FORMAT)
    if FOLD == 1:
        return tl.sum(part, axis=1)
    else:
        rows: tl.constexpr = part.shape[0]
        return tl.reshape(tl.sum(tl.reshape(part, [rows, FOLD, part.shape[1] // FOLD]), axis=2), [rows * FOLD])


@triton.jit
def dot_rows_by_four(words, pair, features, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr):
    """`dot_rows`, for programs whose warps share rows. Of quantised weights four neighbours of a row's terms are summed by one
    thread first: they come to it through shared memory once, a row then lies within a warp, and a quarter of the terms is left
    to be summed across lanes, by two instructions for each in every step."""
    if FORMAT[BITS] <= 8 and FORMAT[WORDS] // FORMAT[VECTOR] >= 4:
        part = vector_products(words, pair, features, FORMAT, LIMBS, INTERPRETED)
        return tl.sum(sum_last(tl.reshape(part, [part.shape[0], part.shape[1] // 4, 4])), axis=1)
    else:
        return dot_rows(words, pair, features, FORMAT, LIMBS, INTERPRETED)


# --- sums ---


@triton.jit
def sum_last(x):
    """[a, b, n] -> [a, b]: i and i + n / 2 first, and so on.

    `tl.split` takes apart what one thread holds. So the compiler brings all terms of a sum to the thread that stores it, at
    once. `tl.sum` joins warps, brings the sums to all of them, and from there another conversion to that thread."""
    half: tl.constexpr = x.shape[2] // 2
    if half == 0:
        return tl.reshape(x, [x.shape[0], x.shape[1]])
    else:
        one, other = tl.split(tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, half]), [0, 1, 3, 2]))
        return sum_last(one + other)
