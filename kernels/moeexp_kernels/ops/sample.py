"""Choice of the next token: the largest logit, or a draw from the filtered softmax, without leaving the GPU.

Shape letters: B batch, V vocabulary, C chunks of the vocabulary (one program each), S rows of ids.

    logits      [B, 1, V] any float dtype
    seed_state  [2] int64: seed and offset. Every draw advances the offset by one, so that replays of one graph differ;
                writing the seed and offset again repeats the draws. Rows of a batch draw independently.
    returns     [B, 1] int64

`feed_greedy` and `feed_sample` return nothing and make the token the next step's input, all int64, contiguous, in place:

    token       [B, 1]  becomes the chosen token
    positions   [B]     move on by one
    index       [1]     moves on by one; then it is the row of ids that is written
    ids         [S, B]  gets the token as that row, or nothing where 0..S-1 has no such row

A draw is a Gumbel-argmax: the token with the largest x/temperature - log(E), E ~ Exp(1), is
distributed as softmax(x/temperature). The noise is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) of (token, offset, row) under the seed, so that it depends on neither the grid nor the filter.

Filters act as in transformers: first the `top_k` largest logits (all that tie with the k-th stay), then, among those,
the most likely tokens whose probabilities first add up to `top_p` (all that tie with the last of them stay).

The kernels sort nothing: `sample_search.py` finds what the filters keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moeexp_kernels.ops.sample_search import found_by_step, launch_searches, ordered, search_steps, sizes_of
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.checks import check_argument
from moeexp_kernels.parts.pdl import after_previous, has_pdl

Fed = tuple[Tensor, Tensor, Tensor, Tensor]  # token, positions, index, ids

MIN_TEMPERATURE = 1e-6
PHILOX_ROUND, PHILOX_KEY = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def reference_greedy(*, logits: Tensor) -> Tensor:
    """logits [B, 1, V] any float dtype -> [B, 1] int64, the index of each row's largest logit (the lowest on a tie)."""
    return logits.argmax(dim=-1)


def reference_support(*, logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[B, V] bool: the tokens that a draw may return. top_k 0 and top_p 1 filter nothing."""
    x = logits[:, 0].float()
    keep = torch.ones_like(x, dtype=torch.bool)
    ordered = x.sort(dim=-1, descending=True).values
    if 0 < top_k < x.shape[-1]:
        keep = x >= ordered[:, top_k - 1, None]
        ordered = ordered.masked_fill(ordered < ordered[:, top_k - 1, None], float("-inf"))
    if top_p < 1:
        mass = (ordered.double() / temperature).softmax(-1)
        before = mass.cumsum(-1) - mass
        last = (before < top_p).sum(-1, keepdim=True) - 1
        keep = keep & (x >= ordered.gather(-1, last.clamp(min=0)))
    return keep


def reference_words(seed_state: Tensor, rows: int, tokens: int) -> Tensor:
    """[B, V] int64, Philox's first 32-bit word of each counter. Products wrap in int64, but their 64 bits are right."""
    low = 0xFFFFFFFF
    device = seed_state.device
    seed, offset = seed_state[0], seed_state[1]
    zero = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    c0, c1 = zero + torch.arange(tokens, device=device), zero + (offset & low)
    c2, c3 = zero + torch.arange(rows, device=device)[:, None], zero + ((offset >> 32) & low)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * PHILOX_ROUND[0], c2 * PHILOX_ROUND[1]
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + PHILOX_KEY[0]) & low, (k1 + PHILOX_KEY[1]) & low
    return c0


def reference_scores(*, logits: Tensor, seed_state: Tensor, temperature: float) -> Tensor:
    """[B, V] float32: each token's score, before filters."""
    rows, _, tokens = logits.shape
    uniform = (reference_words(seed_state, rows, tokens).float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return logits[:, 0].float() / temperature - (-torch.log1p(-uniform)).log()


def reference_sample(*, logits: Tensor, seed_state: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draws one token per row (legend above) and advances `seed_state`. temperature 0 is greedy and draws nothing."""
    _check(logits, seed_state, temperature, top_k, top_p)
    if temperature == 0:
        return reference_greedy(logits=logits)
    score = reference_scores(logits=logits, seed_state=seed_state, temperature=temperature)
    keep = reference_support(logits=logits, temperature=temperature, top_k=top_k, top_p=top_p)
    seed_state[1:].add_(1)
    return score.masked_fill(~keep, float("-inf")).argmax(-1, keepdim=True)


@triton.jit
def _pack(x, token):
    """int64 >= 0 whose maximum is the largest x, at the lowest token where several are equal."""
    return ordered(x) * 2147483648 + (2147483647 - token)


@triton.jit
def _exponential(seed_state, token, row):
    """Exp(1) noise. Small values decide a draw, so they keep full relative precision (log alone would lose it)."""
    seed, offset = tl.load(seed_state), tl.load(seed_state + 1)
    zero = token * 0
    offset_low, offset_high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(
        seed, token.to(tl.uint32), zero.to(tl.uint32) + offset_low, (zero + row).to(tl.uint32),
        zero.to(tl.uint32) + offset_high,
    )  # fmt: skip
    u = tl.minimum(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * 0.2))))
    return tl.where(u < 0.0625, series, -tl.log(1.0 - u))


@triton.jit
def _chunk_best_kernel(
    logits, seed_state, sums, prefixes, best, index, vocabulary, stride_b, first, shift,
    STEPS: tl.constexpr, INVERSE_T: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BY_MASS: tl.constexpr,
    NOISE: tl.constexpr, FEED: tl.constexpr, SIZES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B, C), as only its first dimension may exceed 65,535; SIZES as of `sizes_of`. best [B, C] int64: the packed winner of
    a chunk, among all its logits, or (NOISE) of the draw among those that the STEPS of searches left. FEED: index moves here,
    where no other program reads it: in `_best_kernel` all do."""
    CHUNKS: tl.constexpr = SIZES[0]
    BLOCK: tl.constexpr = SIZES[3]
    chunk, b = tl.program_id(1), tl.program_id(0).to(tl.int64)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    runs = token < vocabulary
    ready = after_previous(PDL)
    if FEED:
        one = (chunk == 0) & (b == 0)
        row = tl.load(index + ready, mask=one, other=0)
    x = tl.load(logits + ready + b * stride_b + token, mask=runs, other=float("-inf")).to(tl.float32)
    score = x
    if NOISE:
        score = x * INVERSE_T - tl.log(_exponential(seed_state + ready, token, tl.program_id(0)))
        if STEPS > 0:
            threshold = found_by_step(
                sums + ready, prefixes + ready, b * STEPS + STEPS - 1, b * STEPS + first, shift, TOP_K, TOP_P, BY_MASS, SIZES
            )  # fmt: skip
            runs = runs & (ordered(x) >= threshold)
    tl.store(best + ready + b * CHUNKS + chunk, tl.max(tl.where(runs, _pack(score, token), -1), 0))
    if FEED:
        tl.store(index + ready, row + 1, mask=one)


@triton.jit
def _best_kernel(
    best, out, seed_state, positions, index, ids, slots,
    NOISE: tl.constexpr, FEED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B,): out [B], the winner over all chunks. The offset moves here, where nobody reads it any more. FEED: positions [B]
    move too, and row `index`, which `_chunk_best_kernel` has moved, of ids [slots, B] is written."""
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    ready = after_previous(PDL)
    packed = tl.load(best + ready + b * CHUNKS + chunk, mask=chunk < CHUNKS, other=-1)
    if FEED:  # at once: after the maximum all would wait for them
        position, row = tl.load(positions + ready + b), tl.load(index + ready)
    if NOISE:
        offset = tl.load(seed_state + ready + 1)
    token = 2147483647 - (tl.max(packed, 0) & 2147483647)
    tl.store(out + ready + b, token)
    if NOISE:
        tl.store(seed_state + ready + 1, offset + 1, mask=b == 0)
    if FEED:
        tl.store(positions + ready + b, position + 1)
        tl.store(ids + ready + row * tl.num_programs(0) + b, token, mask=(row >= 0) & (row < slots))


def _check(logits: Tensor, seed_state: Tensor | None, temperature: float, top_k: int, top_p: float) -> None:
    if logits.shape[1] != 1 or logits.stride(2) != 1 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)} with strides {tuple(logits.stride())}; supported is "
            "[B, 1, V] of float32, bfloat16 or float16, contiguous in V"
        )
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} is not 0 (greedy) or a number of at least {MIN_TEMPERATURE}")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} is negative; use 0 to keep every token, or a count")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; use 1 to keep every token")
    if seed_state is not None and (seed_state.dtype != torch.int64 or seed_state.shape != (2,)):
        raise ValueError(f"seed_state is {seed_state.dtype} {tuple(seed_state.shape)}; it must be int64 [2]: seed, offset")


# Of `_chunk_best_kernel` over all logits as they are.
UNFILTERED = {"TOP_K": 0, "STEPS": 0, "INVERSE_T": 1.0, "TOP_P": 1.0, "BY_MASS": False}


def _tuned(logits: Tensor) -> dict[str, int]:
    key = f"{tuning.activation_class(logits.dtype)}/{logits.shape[2]}"
    return tuning.lookup("sample", key, tuning.architecture(logits.device))


def _fed(logits: Tensor, token: Tensor, positions: Tensor, index: Tensor, ids: Tensor) -> Fed:
    """What is fed, checked."""
    rows, wide = logits.shape[0], (torch.int64,)
    check_argument(token, name="token", shape=(rows, 1), dtypes=wide)
    check_argument(positions, name="positions", shape=(rows,), dtypes=wide)
    check_argument(index, name="index", shape=(1,), dtypes=wide)
    check_argument(ids, name="ids", shape=(*ids.shape[:1], rows), dtypes=wide)
    return token, positions, index, ids


def _pick(
    logits: Tensor, seed_state: Tensor, searches: tuple[Tensor, Tensor, int, int], constants: dict, fed: Fed | None
) -> Tensor:
    """Winner per chunk, then per row: `token` of what is fed, else a new tensor. searches as of `launch_searches`."""
    rows, _, vocabulary = logits.shape
    sums, prefixes, first, shift = searches
    tuned = _tuned(logits)
    sizes = sizes_of(vocabulary, tuned["BLOCK"])
    best = torch.empty((rows, sizes[0]), dtype=torch.int64, device=logits.device)
    # `best` stands in for the tensors that nothing is fed to.
    out, positions, index, ids = fed or (torch.empty((rows, 1), dtype=torch.int64, device=logits.device), best, best, best)
    common = {"NOISE": constants["NOISE"], "FEED": fed is not None, "PDL": has_pdl(logits)}
    wrap_triton(_chunk_best_kernel)[(rows, sizes[0])](
        logits, seed_state, sums, prefixes, best, index, vocabulary, logits.stride(0), first, shift, SIZES=sizes,
        num_warps=tuned["num_warps"], **(constants | common),
    )  # fmt: skip
    wrap_triton(_best_kernel)[(rows,)](
        best, out, seed_state, positions, index, ids, 0 if fed is None else ids.shape[0], CHUNKS=sizes[0],
        BLOCK_CHUNKS=sizes[1], num_warps=1, **common,
    )  # fmt: skip
    return out


def _greedy(logits: Tensor, fed: Fed | None = None) -> Tensor:
    _check(logits, None, 0.0, 0, 1.0)
    # `logits` stands in for the tensors that this variant neither reads nor writes.
    return _pick(logits, logits, (logits, logits, 0, 0), UNFILTERED | {"NOISE": False}, fed)


def _draw(logits: Tensor, seed_state: Tensor, temperature: float, top_k: int, top_p: float, fed: Fed | None = None) -> Tensor:
    _check(logits, seed_state, temperature, top_k, top_p)
    if temperature == 0:
        return _greedy(logits, fed)
    rows, _, vocabulary = logits.shape
    steps = search_steps(dtype=logits.dtype, vocabulary=vocabulary, top_k=top_k, top_p=top_p)
    constants = {"TOP_K": top_k, "STEPS": len(steps), "INVERSE_T": 1.0 / temperature, "TOP_P": top_p}
    if not steps:
        return _pick(logits, seed_state, (logits, logits, 0, 0), constants | {"BY_MASS": False, "NOISE": True}, fed)
    tuned, peaks = _tuned(logits), None
    sizes = sizes_of(vocabulary, tuned["BLOCK"])
    if top_p < 1:
        peaks = torch.empty((rows, sizes[0]), dtype=torch.int64, device=logits.device)
        wrap_triton(_chunk_best_kernel)[(rows, sizes[0])](
            logits, logits, logits, logits, peaks, peaks, vocabulary, logits.stride(0), 0, 0, **UNFILTERED, NOISE=False,
            FEED=False, SIZES=sizes, PDL=has_pdl(logits), num_warps=tuned["num_warps"],
        )  # fmt: skip
    searches = launch_searches(logits=logits, peaks=peaks, steps=steps, sizes=sizes, tuned=tuned, constants=constants)
    return _pick(logits, seed_state, searches, constants | {"BY_MASS": steps[-1][0], "NOISE": True}, fed)


@triton_op("moeexp::greedy", mutates_args=())
def greedy(logits: Tensor) -> Tensor:
    """`reference_greedy` in two kernels: [B, 1, V] -> [B, 1] int64, the lowest index on a tie. NaN counts as largest."""
    return _greedy(logits)


@triton_op("moeexp::sample", mutates_args=("seed_state",))
def sample(logits: Tensor, seed_state: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """`reference_sample`: same seed_state, same tokens (up to rounding of a near-tie). 2 kernels without filters; each
    filter adds a kernel per four bits of the logits' dtype."""
    return _draw(logits, seed_state, temperature, top_k, top_p)


@triton_op("moeexp::feed_greedy", mutates_args=("token", "positions", "index", "ids"))
def feed_greedy(logits: Tensor, token: Tensor, positions: Tensor, index: Tensor, ids: Tensor) -> None:
    """`greedy`, and its token is fed (legend above) by the same two kernels. `ValueError` for shapes, dtypes or strides other
    than the legend's."""
    _greedy(logits, _fed(logits, token, positions, index, ids))


@triton_op("moeexp::feed_sample", mutates_args=("seed_state", "token", "positions", "index", "ids"))
def feed_sample(
    logits: Tensor,
    seed_state: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    token: Tensor,
    positions: Tensor,
    index: Tensor,
    ids: Tensor,
) -> None:
    """`sample`, and its token is fed (legend above) by the same kernels. `ValueError` as of both."""
    _draw(logits, seed_state, temperature, top_k, top_p, _fed(logits, token, positions, index, ids))
