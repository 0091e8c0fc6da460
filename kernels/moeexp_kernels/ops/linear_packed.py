"""Very few rows of activations times a stored int4 or int8 weight: a GEMV that finds the activations ready.

The GEMV of `linear.py` makes integers of a row's activations in each of its programs, which is three quarters of its
instructions. Here a first kernel does that once a row, in the order in which the second one's threads need them, so that they
load what they multiply. The second reads its weights once for all rows, and may ask for them while the first still waits.

Shape letters and weight formats: `linear.py`; integers, words and vectors: `parts/int_dot.py`. Memory of a packed row, int32:
[LIMBS, PIECES, WORDS] pairs of 16-bit integers (PIECES 4 for int4, 2 for int8), [LIMBS, VECTORS] their sums, and [VECTORS] the
bits of the float32 units, times the norm's 1 / rms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int_dot import dot_words, load_norm, load_row_features, load_rows, scaled, words_in_vectors
from moeexp_kernels.parts.pdl import after_previous, has_pdl, start_next
from moeexp_kernels.parts.prefetch import ahead_lengths, bring_into_l2


@triton.jit
def pack_kernel(
    x_ptr, norm_ptr, packed_ptr, x_stride,
    EPS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr,
    HAS_NORM: tl.constexpr, LIMBS: tl.constexpr, PDL: tl.constexpr, START_NEXT: tl.constexpr,
):  # fmt: skip
    """A packed row of norm(x), a program a row. START_NEXT as in `limbs_kernel`."""
    m = tl.program_id(0).to(tl.int64)
    norm_low, norm_high = load_norm(norm_ptr, HAS_NORM, K, GROUP, BITS, WORDS)
    x_ptr += start_next(PDL and START_NEXT)
    ready = after_previous(PDL)
    x0, x1, x2, x3, t0, x4, x5, x6, x7, t1, unit, r = load_row_features(
        x_ptr + ready + m * x_stride, norm_low, norm_high, EPS, HAS_NORM, K, GROUP, BITS, WORDS, VECTOR, LIMBS
    )
    PIECES: tl.constexpr = 4 if BITS == 4 else 2
    VECTORS: tl.constexpr = WORDS // VECTOR
    packed_ptr += ready + m * (LIMBS * PIECES * WORDS + (LIMBS + 1) * VECTORS)
    word = tl.arange(0, WORDS)
    tl.store(packed_ptr + word, x0)
    tl.store(packed_ptr + WORDS + word, x1)
    if PIECES == 4:
        tl.store(packed_ptr + 2 * WORDS + word, x2)
        tl.store(packed_ptr + 3 * WORDS + word, x3)
    sums_ptr = packed_ptr + LIMBS * PIECES * WORDS + tl.arange(0, VECTORS)
    tl.store(sums_ptr, t0)
    if LIMBS == 2:
        packed_ptr += PIECES * WORDS
        tl.store(packed_ptr + word, x4)
        tl.store(packed_ptr + WORDS + word, x5)
        if PIECES == 4:
            tl.store(packed_ptr + 2 * WORDS + word, x6)
            tl.store(packed_ptr + 3 * WORDS + word, x7)
        tl.store(sums_ptr + VECTORS, t1)
    tl.store(sums_ptr + LIMBS * VECTORS, (unit * r).to(tl.int32, bitcast=True))


@triton.jit
def load_pieces(packed_ptr, BITS: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr):
    """One limb's pairs [1, WORDS] each, in the vectors in which `load_rows` brings the weights."""
    word = words_in_vectors(WORDS, VECTOR)
    x0, x1 = tl.load(packed_ptr + word)[None, :], tl.load(packed_ptr + WORDS + word)[None, :]
    x2, x3 = x0, x1
    if BITS == 4:
        x2, x3 = tl.load(packed_ptr + 2 * WORDS + word)[None, :], tl.load(packed_ptr + 3 * WORDS + word)[None, :]
    return x0, x1, x2, x3


@triton.jit
def packed_gemv_kernel(
    packed_ptr, w_ptr, s_ptr, res_ptr, y_ptr, ahead_ptr, ahead_s_ptr, res_stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
    VECTOR: tl.constexpr, HAS_RESIDUAL: tl.constexpr, LIMBS: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr, AHEAD_SCALES: tl.constexpr, BLOCK_N: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """y[m, n] of all M rows and BLOCK_N outputs n a program. AHEAD and AHEAD_SCALES as in `gemv_kernel`. Before the wait it
    reads weights and nothing else: `pack_kernel` relies on that."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    # From here offsets are relative to the program's first row: int32 is enough within it.
    w_ptr += start * (K // 2 if BITS == 4 else K)
    s_ptr += start * (2 * (K // GROUP))
    rows_left = tl.minimum(N - start, BLOCK_N).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    words, pair = load_rows(w_ptr, s_ptr, row, row < rows_left, K, GROUP, BITS, WORDS, VECTOR, CACHE)
    if AHEAD:  # behind this program's own reads, and before it waits
        rows_left += bring_into_l2(ahead_ptr, AHEAD)
    if AHEAD_SCALES:
        rows_left += bring_into_l2(ahead_s_ptr, AHEAD_SCALES)
    ready = after_previous(PDL)
    packed_ptr += ready
    res_ptr += start + ready
    y_ptr += start + ready
    PIECES: tl.constexpr = 4 if BITS == 4 else 2
    VECTORS: tl.constexpr = WORDS // VECTOR
    for m in tl.static_range(M):
        extra = 0.0
        if HAS_RESIDUAL:  # at once: after the sums all would wait for it
            extra = tl.load(res_ptr + m * res_stride + row, mask=row < rows_left, other=0.0).to(tl.float32)
        sums_ptr = packed_ptr + LIMBS * PIECES * WORDS + tl.arange(0, VECTORS)
        total = tl.load(sums_ptr)[None, :]
        unit = tl.load(sums_ptr + LIMBS * VECTORS).to(tl.float32, bitcast=True)[None, :]
        x0, x1, x2, x3 = load_pieces(packed_ptr, BITS, WORDS, VECTOR)
        sums = dot_words(words, x0, x1, x2, x3, BITS, FAST)
        sums = tl.sum(tl.reshape(sums, [BLOCK_N, VECTORS, VECTOR]), axis=2)
        rest, rest_total = sums, total
        if LIMBS == 2:
            x0, x1, x2, x3 = load_pieces(packed_ptr + PIECES * WORDS, BITS, WORDS, VECTOR)
            rest = dot_words(words, x0, x1, x2, x3, BITS, FAST)
            rest = tl.sum(tl.reshape(rest, [BLOCK_N, VECTORS, VECTOR]), axis=2)
            rest_total = tl.load(sums_ptr + VECTORS)[None, :]
        y = tl.sum(scaled(sums, rest, total, rest_total, pair, unit, BITS, LIMBS), axis=1)
        if HAS_RESIDUAL:
            y += extra
        tl.store(y_ptr + m * N + row, y.to(y_ptr.dtype.element_ty), mask=row < rows_left)
        packed_ptr += LIMBS * PIECES * WORDS + (LIMBS + 1) * VECTORS


MOST_ROWS = 8  # a row more is a row of products more in each program; from a few on, tensor cores take less


def packed_serves(*, rows: int, bits: int) -> bool:
    """Whether so many rows of such a weight may be packed: stored integers, whose programs make integers of the activations."""
    return 1 <= rows <= MOST_ROWS and bits in (4, 8)


def packed_config(*, bits: int, out_features: int, features: int, rows: int, arch: str | None = None) -> dict:
    """The row of the tuning table, "int4/12352x2048/2" for two rows of activations."""
    return tuning.lookup("packed_gemv", f"{tuning.weight_class(bits)}/{out_features}x{features}/{rows}", arch)


def launch_packed(
    *, x: Tensor, weight: Tensor, scales: Tensor, norm_weight: Tensor | None, eps: float, residual: Tensor | None, out: Tensor,
    bits: int, group: int, words: int, vector: int, limbs: int, ahead: Tensor | None = None,
    ahead_scales: Tensor | None = None, config: dict | None = None,
) -> None:  # fmt: skip
    """out [M, N] = residual + norm(x [M, K]) @ weight.T; all flat, checked, and out contiguous. words, vector, limbs: as
    `word_counts` and `int16_limbs` give them."""
    (rows, features), out_features = x.shape, weight.shape[0]
    arch, pdl = tuning.architecture(x.device), has_pdl(x)
    config = config or packed_config(bits=bits, out_features=out_features, features=features, rows=rows, arch=arch)
    length = limbs * (4 if bits == 4 else 2) * words + (limbs + 1) * (words // vector)
    packed = torch.empty((rows, length), dtype=torch.int32, device=x.device)
    common = {
        "K": features, "GROUP": group, "BITS": bits, "WORDS": words, "VECTOR": vector, "LIMBS": limbs, "PDL": pdl,
    }  # fmt: skip
    wrap_triton(pack_kernel)[(rows,)](
        x, x if norm_weight is None else norm_weight, packed, x.stride(0), EPS=eps, HAS_NORM=norm_weight is not None,
        **common, **tuning.lookup("pack", f"{tuning.activation_class(x.dtype)}/{features}", arch),
    )  # fmt: skip
    bring, bring_scales = ahead_lengths(ahead, ahead_scales) if pdl else (0, 0)
    wrap_triton(packed_gemv_kernel)[(triton.cdiv(out_features, config["BLOCK_N"]),)](
        packed, weight, scales, out if residual is None else residual, out, weight if ahead is None else ahead,
        scales if ahead_scales is None else ahead_scales, 0 if residual is None else residual.stride(0),
        M=rows, N=out_features, HAS_RESIDUAL=residual is not None, FAST=x.is_cuda, AHEAD=bring, AHEAD_SCALES=bring_scales,
        **common, **config,
    )  # fmt: skip
