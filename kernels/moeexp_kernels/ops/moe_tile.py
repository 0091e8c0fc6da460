"""Experts for up to 32 tokens that read an expert's weights once for all tokens that chose it, on int8 tensor cores.

Shape letters and weight formats: `moe.py`; limbs: `parts/limbs.py`; the product: `parts/int8_tile.py`. Also M = B * T tokens
and A = M * k pairs (token, expert); a token's experts differ. Five kernels:

    limbs     of norm(x), and the shared expert's gate for each token
    gate_up   act = silu(gate) * up, a program for some rows of one expert and up to 8 of its tokens
    limbs     of act
    down      out = act @ down.T likewise
    combine   y[m] = x[m] + sum over its experts of share * out + gate[m] * the shared expert's out

act and out have a row for each pair, by expert and then by token, and M more rows for the shared expert:

    pair   (0, e5) (0, e2) (1, e7) (1, e5)   token 0 chose experts 5 and 2, token 1 experts 7 and 5
    row       1       0       3       2      pairs of lower experts + earlier tokens of the same expert

No kernel sorts: a program counts its row in the ids, of which there are a few hundred. There are programs for each pair; those
of an expert's first pair serve the first 8 tokens, those of its ninth the next 8, and all others leave at once. Every sum
has a fixed order, and a row's sums do not depend on the rows beside it: it is the same to the bit for every M.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moeexp_kernels.ops.linear_tile import MOST_ROWS, launch_limbs, tile_constants, tile_serves
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.int8_tile import load_tile, multiply_tile
from moeexp_kernels.parts.limbs import limbs_of
from moeexp_kernels.parts.matrix import FEATURES, GROUP, ROWS, at_row, matrix_format
from moeexp_kernels.parts.pdl import after_previous, has_pdl

COLUMNS = 8  # tokens of a program: the least that the instruction takes, and more than an expert mostly has


@triton.jit
def pair_of(program, M, COLUMNS: tl.constexpr):
    """The pair of number `program` of a grid; negative for the shared expert's, which come first: nobody has as many tokens."""
    return program - (M + COLUMNS - 1) // COLUMNS


@triton.jit
def place_of(pair, p, ids, expert, M, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """What the programs of a pair serve: the first row, how many rows (0: leave) and the tokens, a bit each. ids [PAIRS] of all
    pairs p, expert: the pair's own; they are loaded by the kernel itself, as torch takes a pointer whose values lead to
    an address of a store through a function for one that is written."""
    pairs = M * TOP_K
    same, mine = ids == expert, p >= pair
    # Three counts in one sum: pairs of lower experts; of this one before this pair; from this pair on.
    counts = (ids < expert).to(tl.int32) + tl.where(same, tl.where(mine, 1 << 22, 1 << 12), 0)
    counts = tl.sum(counts, axis=0)
    tokens = tl.sum(tl.where(same & mine, 1 << (p // TOP_K), 0), axis=0)
    lower, before, left = counts & 0xFFF, (counts >> 12) & 0x3FF, counts >> 22
    row = lower + before
    count = tl.where(before % COLUMNS == 0, tl.minimum(left, COLUMNS), 0)
    if pair < 0:
        first = (pair + (M + COLUMNS - 1) // COLUMNS) * COLUMNS
        row, count = pairs + first, tl.minimum(M - first, COLUMNS)
        tokens = -1 << first
    return row, count, tokens


@triton.jit
def weights_of(w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, pair, expert, first, FORMAT: tl.constexpr):
    """Where row `first` of the matrix of the pair's expert, and of its scales, begins."""
    if pair < 0:
        w_ptr, s_ptr = shared_w_ptr, shared_s_ptr
    else:
        w_ptr, s_ptr = at_row(w_ptr, s_ptr, expert.to(tl.int64) * FORMAT[ROWS], FORMAT)
    return at_row(w_ptr, s_ptr, first, FORMAT)


@triton.jit
def gate_up_tile_kernel(
    limbs_ptr, units_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, act_ptr, M,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_I: tl.constexpr, PASSES: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """act [A + M, I] float32, without the pairs' shares; FORMAT: one expert's, [2*I, K]. Grid (blocks of I, pairs + blocks of
    tokens). Before the wait it reads weights and ids; the previous kernel, which writes the limbs, must wait before it lets
    this one start."""
    width: tl.constexpr = FORMAT[ROWS] // 2
    pair, p = pair_of(tl.program_id(1), M, COLUMNS), tl.arange(0, PAIRS)
    # Past L1, which may hold an older step's: the ids are the result of a kernel before the previous one.
    ids = tl.load(ids_ptr + p, mask=p < M * TOP_K, other=0x7FFFFFFF, cache_modifier=".cg")
    expert = tl.load(ids_ptr + tl.maximum(pair, 0), cache_modifier=".cg")
    start = tl.program_id(0) * BLOCK_I
    w_ptr, s_ptr = weights_of(w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, pair, expert, start, FORMAT)
    place, count, tokens = place_of(pair, p, ids, expert, M, TOP_K, COLUMNS)
    if count == 0:  # without a wait: the shared expert's programs wait for all
        return
    tile = load_tile(w_ptr, s_ptr, width - start, FORMAT, 2 * BLOCK_I, PASSES, CACHE, width % BLOCK_I == 0, APART=width)
    ready = after_previous(PDL)
    limbs_ptr += ready
    units_ptr += ready
    act_ptr += ready
    both = multiply_tile(
        tile, limbs_ptr, units_ptr, count, FORMAT, LIMBS, COLUMNS, SPLIT, INTERPRETED, chosen=tokens, CHOSEN=True
    )
    # Rows i and i + 8 of a product are in the same thread, so that its gate row finds its up row there.
    gate, up = tl.split(tl.permute(tl.reshape(both, [2, BLOCK_I, COLUMNS]), [1, 2, 0]))
    i, column = start + tl.arange(0, BLOCK_I)[:, None], tl.arange(0, COLUMNS)[None, :]
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + (place + column) * width + i, act, mask=(column < count) & (i < width))


@triton.jit
def down_tile_kernel(
    limbs_ptr, units_ptr, ids_ptr, w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, out_ptr, M,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, FORMAT: tl.constexpr, LIMBS: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, PASSES: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    """out [A + M, D] float32 of act in limbs [A + M, LIMBS, I]; FORMAT: one expert's, [D, I]. Grid (blocks of D, pairs + blocks
    of tokens). Before the wait it reads weights, and ids, which are older than the kernel before the previous one."""
    D: tl.constexpr = FORMAT[ROWS]
    width: tl.constexpr = FORMAT[FEATURES]
    pair, p = pair_of(tl.program_id(1), M, COLUMNS), tl.arange(0, PAIRS)
    # Past L1, which may hold an older step's: the ids are the result of a kernel before the previous one.
    ids = tl.load(ids_ptr + p, mask=p < M * TOP_K, other=0x7FFFFFFF, cache_modifier=".cg")
    expert = tl.load(ids_ptr + tl.maximum(pair, 0), cache_modifier=".cg")
    start = tl.program_id(0) * BLOCK_D
    w_ptr, s_ptr = weights_of(w_ptr, s_ptr, shared_w_ptr, shared_s_ptr, pair, expert, start, FORMAT)
    place, count, _ = place_of(pair, p, ids, expert, M, TOP_K, COLUMNS)
    if count == 0:
        return
    tile = load_tile(w_ptr, s_ptr, D - start, FORMAT, BLOCK_D, PASSES, CACHE, D % BLOCK_D == 0)
    ready = after_previous(PDL)
    limbs_ptr += place * (LIMBS * width) + ready
    units_ptr += place * (2 * (width // FORMAT[GROUP])) + ready
    out_ptr += ready
    y = multiply_tile(tile, limbs_ptr, units_ptr, count, FORMAT, LIMBS, COLUMNS, SPLIT, INTERPRETED)
    d, column = start + tl.arange(0, BLOCK_D)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + (place + column) * D + d, y, mask=(column < count) & (d < D))


@triton.jit
def combine_tile_kernel(
    x_ptr, ids_ptr, weights_ptr, gates_ptr, out_ptr, y_ptr, M, x_stride,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[m] of the rows of out; SLOTS = TOP_K rounded up to a power of 2. Grid (blocks of D, M). Everything but out is older
    than the previous kernel, and read past L1."""
    m = tl.program_id(1)
    p, slot, d = tl.arange(0, PAIRS), tl.arange(0, SLOTS), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    ids = tl.load(ids_ptr + p, mask=p < M * TOP_K, other=0x7FFFFFFF, cache_modifier=".cg")
    expert = tl.load(ids_ptr + m * TOP_K + slot, mask=slot < TOP_K, other=0, cache_modifier=".cg")
    share = tl.load(weights_ptr + m * TOP_K + slot, mask=slot < TOP_K, other=0.0, cache_modifier=".cg")
    gate = tl.load(gates_ptr + m, cache_modifier=".cg")
    x = tl.load(x_ptr + m * x_stride + d, mask=d < D, other=0.0, cache_modifier=".cg").to(tl.float32)
    earlier = (ids[None, :] < expert[:, None]) | ((ids[None, :] == expert[:, None]) & (p < m * TOP_K)[None, :])
    row = tl.sum(earlier.to(tl.int32), axis=1)
    ready = after_previous(PDL)
    out_ptr += ready
    y_ptr += ready
    shared = tl.load(out_ptr + (M * TOP_K + m) * D + d, mask=d < D, other=0.0)
    # Slot by slot: in which order a sum over an axis goes depends on the launch parameters.
    routed = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(TOP_K):
        one = tl.sum(tl.where(slot == k, row, 0), axis=0)
        part = tl.broadcast_to(tl.sum(tl.where(slot == k, share, 0.0), axis=0), [BLOCK_D])
        routed = tl.fma(part, tl.load(out_ptr + one * D + d, mask=d < D, other=0.0), routed)
    y = x + tl.fma(tl.broadcast_to(gate, [BLOCK_D]), shared, routed)
    tl.store(y_ptr + m * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def experts_served(*, rows: int | torch.SymInt, formats: dict[str, tuple[int, int, int]]) -> bool:
    """Whether these kernels take so many tokens and such experts; formats: (width, bits, group) of the matrices gate_up,
    shared_gate_up, down and shared_down. The shared expert must be as wide and stored as the others are."""
    alike = formats["gate_up"] == formats["shared_gate_up"] and formats["down"] == formats["shared_down"]
    return isinstance(rows, int) and alike and all(
        tile_serves(rows=rows, bits=bits, group=group) for _, bits, group in formats.values()
    )  # fmt: skip


def launch_moe_tile(
    *, x: Tensor, norm_weight: Tensor, eps: float, ids: Tensor, weights: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, shared_gate_up: Tensor, shared_gate_up_scales: Tensor, shared_down: Tensor,
    shared_down_scales: Tensor, shared_gate: Tensor, out: Tensor, width: int, up: tuple[int, int], back: tuple[int, int],
    config: dict,
) -> None:  # fmt: skip
    """out [M, D] of x [M, D], all checked and served; up, back: (bits, group); config: the row of the tuning table."""
    (rows, features), top_k = x.shape, ids.shape[-1]
    pairs, cuda, pdl = rows * top_k, x.is_cuda, has_pdl(x)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    gates = torch.empty((rows,), **wide)
    act = torch.empty((pairs + rows, width), **wide)
    routed = torch.empty((pairs + rows, features), **wide)
    # Enough for any number of tokens, so that the sums' code is the same for all.
    places = {"TOP_K": top_k, "PAIRS": triton.next_power_of_2(MOST_ROWS * top_k), "PDL": pdl}
    common = places | {"LIMBS": limbs_of(x.dtype), "INTERPRETED": not cuda, "COLUMNS": COLUMNS, "num_stages": 1}

    def product(kernel, limbs, stored, result, *, bits, group, blocks, launch):
        groups = triton.next_power_of_2(limbs[0].shape[-1] // group)
        wrap_triton(kernel)[(blocks, pairs + triton.cdiv(rows, COLUMNS))](
            *limbs, ids, *stored, result, rows, FORMAT=matrix_format(stored[0], bits=bits, group=group), **common,
            **tile_constants(groups=groups, config=launch, cuda=cuda),
        )  # fmt: skip

    first, second = config["gate_up"], config["down"]
    product(
        gate_up_tile_kernel,
        # It must wait before it lets the next kernel start, which reads the ids that the kernel before this one wrote.
        launch_limbs(
            x=x, norm_weight=norm_weight, eps=eps, group=up[1], gate=shared_gate, gates=gates, START_NEXT=False
        ),
        (gate_up, gate_up_scales, shared_gate_up, shared_gate_up_scales), act, bits=up[0], group=up[1],
        blocks=triton.cdiv(width, first["BLOCK_I"]), launch=first,
    )  # fmt: skip
    product(
        down_tile_kernel,
        launch_limbs(x=act, norm_weight=None, eps=eps, group=back[1], dtype=x.dtype),
        (down, down_scales, shared_down, shared_down_scales), routed, bits=back[0], group=back[1],
        blocks=triton.cdiv(features, second["BLOCK_D"]), launch=second,
    )  # fmt: skip
    last = config["combine"]
    wrap_triton(combine_tile_kernel)[(triton.cdiv(features, last["BLOCK_D"]), rows)](
        x, ids, weights, gates, routed, out, rows, x.stride(0), SLOTS=triton.next_power_of_2(top_k), D=features, **places,
        **last,
    )  # fmt: skip


def moe_tile_key(*, bits: int, features: int, width: int, rows: int) -> str:
    """Key of the tuning table: "int4/2048x512/16" for 9 to 16 tokens."""
    return f"{tuning.weight_class(bits)}/{features}x{width}/{8 * triton.cdiv(rows, 8)}"


def moe_tile_config(*, arch: str | None = None, **shape: int) -> dict:
    """The row that serves: FROM, the least number of tokens that go to these kernels, and each kernel's launch parameters."""
    return tuning.lookup("moe_tile", moe_tile_key(**shape), arch)
