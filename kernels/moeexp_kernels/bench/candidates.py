"""What the tuner tries: for each row of the table, the cases that judge it and the values to choose among.

A candidate names only what it changes; the rest of the row stays. Targets come in the order of their kernels' run, and a
later target sees the earlier one's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeexp_kernels.bench.cases import Spec, build
from moeexp_kernels.bench.shapes import FULL, Shapes
from moeexp_kernels.ops.linear_tile import columns_of, tile_key


@dataclass(frozen=True)
class Target:
    """`op` and `key` of the row that is written, and the cases whose times (their geometric mean) decide."""

    op: str
    key: str
    specs: tuple[Spec, ...]
    candidates: tuple[dict, ...]


def _gemv(triples: list[tuple[int, int, int]]) -> tuple[dict, ...]:
    # VECTOR, the words that a thread loads at once: with two, activations of many shapes meet them in registers, where with four
    # they go through shared memory; but twice as many scales are read.
    return tuple(
        {"BLOCK_N": block, "TILES": tiles, "CACHE": ".cg", "num_warps": warps, "TOGETHER": 1, "VECTOR": vector}
        for block, tiles, warps in triples
        for vector in (4, 2)
    )


# Every program prepares the row for itself, so that for long weights fewer programs with several tiles win.
GEMV = _gemv([(8, 1, 2), (4, 1, 4), (8, 1, 4), (16, 1, 4), (8, 1, 8), (16, 1, 8), (8, 2, 4), (8, 3, 4), (8, 4, 4), (4, 3, 4),
              (4, 4, 4), (16, 2, 8)])  # fmt: skip
TWO_ROWS = tuple(
    row | {"TOGETHER": together}
    for row in _gemv([(16, 2, 8), (16, 3, 8), (16, 4, 8), (8, 1, 8), (8, 2, 4), (8, 4, 4), (4, 2, 4)])
    for together in (1, 2)
)
THREE_ROWS = tuple(
    row | {"TOGETHER": together} for row in _gemv([(16, 2, 8), (8, 1, 8), (8, 2, 4), (4, 2, 4)]) for together in (1, 3)
)
HEAD = _gemv([(16, 1, 4), (32, 1, 4), (16, 4, 4), (16, 8, 4), (16, 16, 4), (32, 4, 8), (8, 8, 4)])
WIDE_GEMV = _gemv([(2, 1, 2), (4, 1, 2), (8, 1, 2), (2, 1, 4), (4, 1, 4), (8, 1, 4), (16, 1, 4), (8, 1, 8), (4, 1, 8), (16, 1, 8),
                   (2, 1, 1), (4, 1, 1), (4, 4, 4), (8, 4, 8)])  # fmt: skip
ROUTER = _gemv([(1, 1, 2), (2, 1, 2), (1, 1, 4), (2, 1, 4), (4, 1, 4), (2, 1, 8)])
# Every warp has groups of its own: with eight, half as many registers hold the same weights. Several tiles load the rows of
# activations once.
TILE: tuple[dict[str, Any], ...] = tuple(
    {"BLOCK_N": block, "COLUMNS": columns, "TILES": tiles, "PASSES": passes, "CACHE": ".cg", "num_warps": warps}
    for block, columns, tiles, passes, warps in [
        (16, 8, 1, 1, 4), (16, 8, 2, 1, 4), (16, 8, 3, 2, 4), (16, 8, 1, 2, 4), (16, 8, 1, 1, 8), (32, 8, 1, 1, 4),
        (32, 8, 1, 2, 4), (64, 8, 1, 1, 8), (16, 8, 1, 1, 2), (16, 8, 2, 1, 2), (16, 8, 1, 2, 2), (16, 16, 1, 1, 4),
        (16, 16, 1, 2, 4), (16, 16, 1, 1, 8), (16, 16, 2, 1, 4), (16, 16, 2, 2, 4), (16, 32, 1, 1, 8),
    ]
)  # fmt: skip
MOE_TILE = tuple(
    {kernel: {name: block, "PASSES": passes, "CACHE": ".cg", "num_warps": warps}}
    for kernel, name, choices in [  # few warps win: eight lost everywhere
        ("gate_up", "BLOCK_I", [(8, 1, 4), (8, 2, 4), (8, 2, 2)]),
        ("down", "BLOCK_D", [(32, 1, 2), (16, 1, 2), (16, 1, 1), (64, 1, 4)]),
    ]
    for block, passes, warps in choices
) + tuple({"combine": {"BLOCK_D": block, "num_warps": warps}} for block, warps in [(256, 4), (128, 4), (512, 4)])
LIMBS = tuple({"START_NEXT": True, "num_warps": warps} for warps in (2, 4, 8, 16))
# A GPU starts some 600 programs in a microsecond: many small ones begin late.
# BY_EXPERT: from how many tokens on programs go from expert to expert; None: never.
GATE_UP_PACKED = tuple(
    {"EACH": each, "BY_EXPERT": tokens, "CACHE": ".cg", "num_warps": warps}
    for each, warps, tokens in [  # 16 rows make a vector of int4 activations
        (2, 8, None), (1, 16, None), (4, 4, None), (2, 16, None), (4, 8, None), (2, 8, 1), (4, 4, 1), (4, 8, 1),
    ]
)  # fmt: skip
DOWN = tuple(
    {"BLOCK_D": block, "num_warps": warps}
    for block, warps in [(2, 2), (4, 2), (8, 2), (2, 4), (4, 4), (8, 4), (16, 4), (8, 8), (16, 8)]
)
GEMM = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in [
        (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 3), (64, 128, 64, 4, 4), (128, 128, 32, 8, 4), (256, 64, 64, 8, 3),
    ]
)  # fmt: skip

# Every program reads the rows of activations: where these are few, blocks as high as they are and long ones of weights.
GEMM_FEW = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in [
        (32, 64, 64, 4, 4), (32, 128, 64, 4, 3), (32, 128, 64, 4, 4), (32, 128, 64, 8, 4), (32, 256, 64, 8, 3),
        (32, 128, 32, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 4),
    ]
)  # fmt: skip


def _blocks(n: int, k: int, warps: int, stages: int) -> dict[str, Any]:
    return {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# Of each height the kernels one after the other, the other one as it was best; two groups of warps (8) lost everywhere.
MOE_PREFILL = tuple(
    {name: {"height": height, "gate_up": _blocks(*up) | {"AFTER": after}, "down": _blocks(*down)}}
    for name, height, firsts, seconds in [
        ("tall", 128, [((64, 64, 4, 3), False), ((64, 32, 4, 4), False)], [(128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4)]),
        ("middle", 64, [((64, 32, 4, 4), False), ((64, 64, 4, 3), False)], [(128, 64, 4, 3), (128, 32, 8, 4), (64, 64, 4, 3)]),
        ("low", 32, [((64, 64, 4, 3), True), ((64, 64, 4, 3), False), ((64, 32, 4, 4), False)],
         [(128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4)]),
        ("least", 16, [((64, 64, 4, 3), True), ((64, 64, 4, 4), True)], [(64, 64, 4, 3), (128, 64, 4, 3)]),
    ]
    for up, after in firsts for down in seconds
)  # fmt: skip
DEQUANTISE = tuple({"BLOCK": block, "num_warps": warps} for block, warps in [(16, 4), (32, 4), (64, 4), (128, 8), (256, 8)])
ROUTER_LIMBS = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}
    for m, n, stages in [(16, 64, 4), (32, 64, 4), (64, 64, 3), (32, 128, 3), (64, 128, 3)]
)
GDN_DECODE = tuple(
    {"split": split, "num_warps": warps}
    for split, warps in [(1, 8), (1, 4), (2, 8), (2, 4), (2, 2), (4, 4), (4, 2), (4, 1), (8, 2), (8, 1), (16, 1)]
)
# The scan keeps block_v below 64: gated_delta_prefill.py says why.
GDN_PREFILL: tuple[dict[str, Any], ...] = (
    *({"local": {"num_warps": warps, "num_stages": 1}} for warps in (4, 8)),
    *({"block_v": block, "scan": {"num_warps": warps, "num_stages": stages}}
      for block, warps, stages in [(16, 2, 3), (16, 4, 2), (16, 4, 3), (16, 4, 4), (16, 8, 3), (32, 4, 3)]),
    *({"output": {"num_warps": warps, "num_stages": 1}} for warps in (4, 8)),
    *({"conv_tokens": tokens, "conv": {"num_warps": warps, "num_stages": 1}} for tokens, warps in [(64, 4), (32, 2)]),
)  # fmt: skip
ATTENTION_DECODE = tuple(
    {"BLOCK_N": block, "num_warps": warps, "num_stages": stages}
    for block, warps, stages in [(16, 4, 4), (32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 8, 2)]
)
SPLITS = tuple({"programs": programs} for programs in (64, 128, 256, 512))
MERGE = tuple({"BLOCK_D": block, "num_warps": warps} for block in (16, 32, 64, 128) for warps in (2, 4))
ATTENTION_PREFILL = tuple(
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in [
        (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1),
    ]
)  # fmt: skip
SAMPLE = tuple(
    {"BLOCK": block, "NARROW_STEP": step, "num_warps": warps, "narrow_warps": narrow}
    for block, step, warps, narrow in [(2048, 256, 8, 4), (1024, 256, 4, 4), (4096, 256, 8, 8), (2048, 128, 4, 2)]
)


def targets(ops: list[str]) -> list[Target]:
    """What to tune for `ops`, at the full model's shapes."""
    linears, dims = FULL.linears(), f"{FULL.gdn_k_dim}x{FULL.gdn_v_dim}"
    head = f"half/{FULL.head_dim}"
    expert = f"{FULL.hidden}x{FULL.expert_width}"
    kv_lens = tuple(Spec("attention", "decode", 1, str(n)) for n in FULL.kv_lens)
    gemm, matmul = (Spec("linear", "prefill", tokens, "gdn in") for tokens in (256, FULL.prefill[0]))
    moe_prefill, router_prefill = (tuple(Spec(op, "prefill", length) for length in FULL.prefill) for op in ("moe", "router"))
    gdn_prefill = tuple(Spec("gdn", "prefill", length) for length in FULL.prefill)
    found = [
        Target("gemv", f"int4/{out}x{features}", (Spec("linear", "decode", 1, name),), HEAD if name == "head" else GEMV)
        for name, (out, features, _) in linears.items()
    ]
    found += [
        Target(
            "linear_tile", tile_key(bits=4, out_features=out, features=features, rows=rows),
            (Spec("linear", "decode", rows, name),), tuple(row for row in TILE if row["COLUMNS"] <= rows),
        )
        for name, (out, features, _) in linears.items()
        for rows in (8, 16, 32)
    ]  # fmt: skip
    out, features, _ = linears["gdn in"]
    found += [
        *(Target("limbs", f"half/{linears[name][1]}", (Spec("linear", "decode", 8, name),), LIMBS) for name in ("gdn in", "out")),
        Target("gemv", f"int8/{out}x{features}", (Spec("linear", "decode", 1, "gdn in", bits=8),), WIDE_GEMV),
        Target("gemv", f"plain16/{out}x{features}", (Spec("linear", "decode", 1, "gdn in", bits=16),), WIDE_GEMV),
        Target("gemm", "int4/half", (gemm,), GEMM),
        Target("router_gemv", f"plain16/{FULL.experts}x{FULL.hidden}", (Spec("router", "decode", 1),), ROUTER),
        *(
            Target(f"moe_{kernel}_packed", f"int4/{expert}/{tokens}", (Spec("moe", "decode", tokens),), candidates)
            for tokens in (1, 2, 4, 8)
            for kernel, candidates in (("gate_up", GATE_UP_PACKED), ("down", DOWN))
        ),
        Target("gemv", f"int4/{out}x{features}/2", (Spec("linear", "decode", 2, "gdn in"),), TWO_ROWS),
        *(
            Target("moe_tile", f"int4/{expert}/{tokens}", (Spec("moe", "decode", tokens),), MOE_TILE)
            for tokens in (8, 16, 24, 32)
        ),
        Target("moe_prefill", f"half/int4/{expert}", moe_prefill, MOE_PREFILL),
        Target("dequantise", "int4", (matmul,), DEQUANTISE),
        Target("router_limbs", f"plain16/{FULL.experts}x{FULL.hidden}", router_prefill, ROUTER_LIMBS),
        Target("gdn_decode", f"{dims}/few", (Spec("gdn", "decode", 1),), GDN_DECODE),
        Target("gdn_decode", f"{dims}/many", (Spec("gdn", "decode", 8),), GDN_DECODE),
        Target("gdn_prefill", f"half/{dims}", gdn_prefill, GDN_PREFILL),
        Target("attention_decode", head, kv_lens, ATTENTION_DECODE),
        Target("attention_splits", head, kv_lens, SPLITS),
        Target("attention_merge", head, kv_lens, MERGE),
        Target(
            "attention_prefill", head, tuple(Spec("attention", "prefill", length) for length in FULL.prefill),
            ATTENTION_PREFILL,
        ),
        Target("sample", "half", (Spec("sample", "decode", 1),), SAMPLE),
    ]  # fmt: skip
    return [target for target in found if target.specs[0].op in ops]


def _few(sequences: int) -> tuple[dict, ...]:
    return tuple(row for row in TILE if row["COLUMNS"] <= columns_of(sequences))


def head_target(shapes: Shapes, sequences: int, device: str = "cuda") -> Target:
    """The row that serves the head of a step, which is long enough for its own time to decide."""
    spec = Spec("linear", "decode", sequences, "head")
    ((op, key),) = build(spec, shapes, device, cold=0).tuned
    return Target(op, key, (spec,), {"gemv": HEAD, "gemm": GEMM_FEW}.get(op) or _few(sequences))


def chain_targets(shapes: Shapes, sequences: int, asked: set[tuple[str, str]]) -> list[Target]:
    """What to tune of the rows that a chain of `sequences` asked for. Left as they are: those of attention, which serve contexts
    of any length, and of several sequences those that serve one too."""
    linears = shapes.linears()
    names = {f"{out}x{features}": name for name, (out, features, _) in linears.items()}
    names |= {str(features): name for name, (_, features, _) in reversed(linears.items())}  # a row of limbs serves all of them
    candidates = {
        "gemv": {1: GEMV, 2: TWO_ROWS, 3: THREE_ROWS}.get(sequences, GEMV), "limbs": LIMBS, "linear_tile": _few(sequences),
        "gdn_decode": GDN_DECODE, "router_gemv": ROUTER, "moe_gate_up_packed": GATE_UP_PACKED, "moe_tile": MOE_TILE,
        "moe_down_packed": DOWN,
    }  # fmt: skip
    ops = {"gdn_decode": "gdn", "router_gemv": "router"} | dict.fromkeys(
        ("moe_gate_up_packed", "moe_tile", "moe_down_packed"), "moe"
    )
    found = []
    if "moe_down_packed" in {op for op, _ in asked}:
        del candidates["moe_tile"]  # its row was asked for no more than the number of tokens from which it serves
    for op, choices in candidates.items():
        if sequences > 1 and op in ("gdn_decode", "router_gemv"):
            continue
        for key in sorted(key for asked_op, key in asked if asked_op == op):
            variant = "" if op in ops else names[key.split("/")[1]]
            found.append(Target(op, key, (Spec(ops.get(op, "linear"), "decode", sequences, variant),), choices))
    return found
