"""Times attention and the sampler at the shapes of Qwen3.5-35B-A3B, with a cold cache, inside CUDA graphs.

    PYTHONPATH=kernels:tests python tests/gpu/bench_attention.py [decode] [prefill] [rope] [sample]

Every call of a graph uses another KV cache, > 200 MB in all, so that none is found in L2. One row per candidate; `*`
marks what TUNED holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import test_kernels_attention as cases
import torch
from bench_linear_moe import COLD_BYTES, attempt, clones, microseconds, report
from moeexp_kernels import attention as ops
from moeexp_kernels import sample as sampler
from moeexp_kernels.attention import TUNED

HEADS, KV_HEADS, HEAD_DIM, ROTARY, VOCABULARY = 16, 2, 256, 64, 248_320
BF16 = torch.bfloat16
DECODE_KEY, PREFILL_KEY = ("decode", "half", 256), ("prefill", "half", 256)

DECODE_CANDIDATES = [
    (programs, {"BLOCK_N": block, "num_warps": warps, "num_stages": stages})
    for programs in (128, 256, 512)
    for block, warps, stages in [(16, 4, 4), (32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 8, 2)]
]
MERGE_CANDIDATES = [{"BLOCK_D": block, "num_warps": warps} for block in (16, 32, 64, 128) for warps in (2, 4, 8)]
PREFILL_CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in [
        (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3),
        (128, 64, 8, 1),
    ]
]  # fmt: skip


@contextmanager
def tuned_as(key, value) -> Iterator[None]:
    """Within, TUNED[key] is `value`. Ops read the table at every eager call."""
    before, TUNED[key] = TUNED[key], value
    try:
        yield
    finally:
        TUNED[key] = before


def call(op: Callable, shared: dict, copy: dict) -> None:
    op(**shared, **copy)


def attention_copies(tokens: int, position: int, slots: int) -> tuple[dict, list[dict]]:
    """What all calls share, and the caches that they do not: enough of them that their *live* parts overflow L2."""
    case = cases.make_attention_case(1, tokens, HEADS, KV_HEADS, HEAD_DIM, BF16, [position], slots)
    caches = {name: case.pop(name) for name in ("k_cache", "v_cache")}
    live_bytes = 2 * KV_HEADS * (position + tokens) * HEAD_DIM * 2
    count = max(2, min(256, COLD_BYTES // live_bytes))
    return case, [{name: cache.clone() for name, cache in caches.items()} for _ in range(count)]


def bench_decode() -> None:
    for live in (512, 4096, 65_536):
        shared, copies = attention_copies(1, live - 1, max(live, 4096))
        size = 2 * KV_HEADS * live * HEAD_DIM * 2
        for programs, config in DECODE_CANDIDATES:
            mark = (programs, config) == (TUNED["splitk_programs"], TUNED[DECODE_KEY])
            with tuned_as("splitk_programs", programs), tuned_as(DECODE_KEY, config):
                attempt(
                    f"splitk live={live}", (programs, config), partial(call, ops.sdpa_decode_splitk, shared),
                    copies, size, mark=mark,
                )  # fmt: skip
        for config in MERGE_CANDIDATES:
            mark = config == TUNED["merge"]
            with tuned_as("merge", config):
                attempt(
                    f"splitk live={live} merge", config, partial(call, ops.sdpa_decode_splitk, shared),
                    copies, size, mark=mark,
                )  # fmt: skip
        if live <= 4096:
            attempt(
                f"tiled live={live}", "", partial(call, ops.sdpa_decode_tiled, shared), copies, size, mark=True,
            )  # fmt: skip


def bench_prefill() -> None:
    for tokens, position in ((512, 0), (2048, 0), (512, 8192)):
        shared, copies = attention_copies(tokens, position, position + tokens)
        pairs = tokens * position + tokens * (tokens + 1) // 2
        flops = 4 * HEADS * HEAD_DIM * pairs
        for config in PREFILL_CANDIDATES:
            mark = config == TUNED[PREFILL_KEY]
            with tuned_as(PREFILL_KEY, config):
                # The last column is GFLOP/s here: `report` divides by microseconds.
                attempt(
                    f"prefill T={tokens} pos={position}", config, partial(call, ops.sdpa_prefill, shared),
                    copies[:8], flops, mark=mark,
                )  # fmt: skip


def bench_rope() -> None:
    weights = cases.make_weights(HEAD_DIM, ROTARY)
    for tokens in (1, 512, 2048):
        qkv = cases.make_qkv(1, tokens, HEADS, KV_HEADS, HEAD_DIM, BF16)
        caches = dict(zip(("k_cache", "v_cache"), cases.make_cache(1, KV_HEADS, 4096, HEAD_DIM, BF16), strict=True))
        arguments = {"positions": cases.positions_of(100), "num_heads": HEADS, "eps": 1e-6, **weights, **caches}
        copies = clones({"qkv": qkv})
        moved = tokens * (2 * HEADS + 4 * KV_HEADS) * HEAD_DIM * 2
        for warps in (1, 2, 4):
            mark = warps == TUNED["qk_norm_rope"]["num_warps"]
            with tuned_as("qk_norm_rope", {"num_warps": warps}):
                attempt(
                    f"qk_norm_rope T={tokens}", {"num_warps": warps},
                    partial(call, ops.qk_norm_rope, arguments), copies, moved, mark=mark,
                )  # fmt: skip


def bench_sample() -> None:
    seed_state = torch.tensor([1, 0], device="cuda")
    for dtype in (BF16, torch.float32):
        x = torch.randn(1, 1, VOCABULARY, device="cuda").mul(3).to(dtype)
        copies, size = clones({"logits": x}), VOCABULARY * x.element_size()
        report(f"greedy {dtype}", "", microseconds(partial(call, sampler.greedy, {}), copies), size, mark=True)
        before = dict(sampler.TUNED)
        for block, step, warps, narrow in [(2048, 256, 8, 4), (1024, 256, 4, 4), (4096, 256, 8, 8), (2048, 128, 4, 2)]:
            config = {"BLOCK": block, "num_warps": warps, "narrow_warps": narrow, "NARROW_STEP": step}
            sampler.TUNED.update(config)
            for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.8, 50, 1.0), (0.6, 20, 0.95)):
                settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
                attempt(
                    f"sample {dtype} k={top_k} p={top_p}", config,
                    partial(call, sampler.sample, {"seed_state": seed_state, **settings}),
                    copies, size, mark=config == before,
                )  # fmt: skip
            sampler.TUNED.update(before)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["decode", "prefill", "rope", "sample"]
    for name in wanted:
        {"decode": bench_decode, "prefill": bench_prefill, "rope": bench_rope, "sample": bench_sample}[name]()
