"""Times `linear`, the router and the experts at the shapes of Qwen3.5-35B-A3B, with cold weights, inside CUDA graphs.

    PYTHONPATH=kernels:tests python tests/gpu/bench_linear_moe.py [linear] [moe] [prefill]

Every call of a graph uses another copy of the weights, > 200 MB in all, so that none is found in L2. One row per
candidate; `*` marks what the tables hold.
"""

from __future__ import annotations

import sys

import torch
from kernels_common import randn
from moeexp_kernels.gemm import TUNED_GEMM
from moeexp_kernels.linear import TUNED_GEMV, gemv_config, launch_gemv, linear
from moeexp_kernels.moe import TUNED_DECODE, decode_with, router
from moeexp_kernels.moe_prefill import TUNED_PREFILL, prefill_with
from test_kernels_linear import quantised
from test_kernels_moe import choices, experts

COLD_BYTES = 256 << 20
GEMV_SHAPES = [(12352, 2048), (9216, 2048), (2048, 4096), (248320, 2048)]
GEMV_CANDIDATES = [
    {"BLOCK_N": block, "TILES": tiles, "CACHE": cache, "num_warps": warps}
    for block, tiles, warps in [
        (4, 1, 1), (8, 1, 1), (4, 1, 2), (8, 1, 2), (16, 1, 2), (4, 1, 4), (8, 1, 4), (16, 1, 4), (32, 1, 4),
        (16, 1, 8), (32, 1, 8),
        (4, 4, 2), (4, 4, 4), (8, 2, 4), (8, 4, 4), (8, 8, 4), (16, 4, 4), (16, 8, 4), (16, 16, 4),
    ]
    for cache in (".cg", "")
]  # fmt: skip
GATE_UP_CANDIDATES = [
    {"BLOCK_I": block, "CACHE": ".cg", "num_warps": warps}
    for block, warps in [(2, 1), (4, 1), (2, 2), (4, 2), (8, 2), (2, 4), (4, 4), (8, 4), (16, 4), (16, 8)]
]
DOWN_CANDIDATES = [
    {"BLOCK_D": block, "CACHE": ".cg", "num_warps": warps}
    for block, warps in [(2, 2), (4, 2), (8, 2), (2, 4), (4, 4), (8, 4), (16, 4), (8, 8), (16, 8), (32, 8)]
]
GEMM_CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in [
        (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4),
        (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 4), (128, 128, 32, 8, 4), (256, 64, 64, 8, 3),
    ]
]  # fmt: skip
PREFILL_CANDIDATES = [
    {
        "block_m": m,
        "gate_up": {"BLOCK_N": n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages},
        "down": {"BLOCK_N": down_n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages},
        "shared_m": 64,
    }
    for m, n, down_n, warps, stages in [
        (32, 64, 128, 4, 3), (16, 64, 128, 4, 3), (16, 64, 64, 4, 4), (32, 64, 64, 4, 3), (32, 128, 128, 8, 3),
        (64, 64, 128, 4, 3), (64, 64, 64, 4, 3), (32, 64, 128, 4, 4), (16, 128, 128, 8, 3), (32, 32, 64, 2, 4),
    ]
]  # fmt: skip


def microseconds(call, copies: list, *, replays: int = 5) -> float:
    """Time of one `call(copy)` under graph replay, every copy once a replay. Minimum over the replays."""
    call(copies[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(copies))
    return min(times)


def clones(tensors: dict, *, at_most: int = 64) -> list[dict]:
    size = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, torch.Tensor))
    count = max(2, min(at_most, -(-COLD_BYTES // size)))
    return [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()} for _ in range(count)]


def report(name: str, config, us: float, bytes_read: int, *, mark: bool) -> None:
    print(f"{'*' if mark else ' '} {name:28s} {us:8.2f} us {bytes_read / us * 1e-3:7.0f} GB/s  {config}", flush=True)


def attempt(name, config, call, copies, bytes_read, *, mark):
    """One row; a candidate that does not fit the GPU is a row too, not the end of the sweep."""
    try:
        report(name, config, microseconds(call, copies), bytes_read, mark=mark)
    except Exception as error:
        print(f"  {name:28s} failed: {type(error).__name__} {str(error)[:80]}  {config}", flush=True)


def bench_gemv() -> None:
    for out, features in GEMV_SHAPES:
        weight, scales = quantised(out, features, bits=4, group=128, seed=1, dtype=torch.bfloat16)
        copies = clones({"weight": weight, "scales": scales})
        norm = randn(features, seed=2) if features == 2048 else None
        x = randn(1, features, seed=3, dtype=torch.bfloat16)
        residual = randn(1, out, seed=4, dtype=torch.bfloat16) if norm is None else None
        y = torch.empty(1, out, dtype=torch.bfloat16, device="cuda")
        size = weight.numel() + scales.numel() * 2
        for config in GEMV_CANDIDATES:
            if out == 248320 and config["TILES"] * config["BLOCK_N"] < 16:
                continue

            def call(copy, config=config, x=x, norm=norm, residual=residual, y=y):
                launch_gemv(
                    x=x, norm_weight=norm, eps=1e-6, residual=residual, out=y, bits=4, group=128, config=config, **copy
                )

            attempt(
                f"gemv {out}x{features}", config, call, copies, size,
                mark=config == gemv_config(bits=4, rows=out, in_features=features),
            )  # fmt: skip
        del copies
    assert set(TUNED_GEMV) == {(4, *shape) for shape in GEMV_SHAPES}, "TUNED_GEMV and this benchmark list other shapes"


def bench_router() -> None:
    weight = randn(256, 2048, seed=1, dtype=torch.bfloat16)
    copies = clones({"weight": weight}, at_most=256)
    norm = randn(2048, seed=2)
    trace = torch.zeros(1, 1024, 8, dtype=torch.int32, device="cuda")
    positions = torch.tensor([3], device="cuda")
    for tokens in (1, 512):
        x = randn(1, tokens, 2048, seed=3, dtype=torch.bfloat16)

        def call(copy, x=x):
            router(x=x, norm_weight=norm, eps=1e-6, top_k=8, positions=positions, expert_ids=trace, **copy)

        report(f"router T={tokens}", "", microseconds(call, copies), weight.numel() * 2, mark=True)


def bench_decode() -> None:
    """Both kernels together; each candidate of one with the table's choice of the other."""
    arguments = experts(D=2048, E=256, width=512, shared=512, bits=4, group=128, dtype=torch.bfloat16)
    x = randn(1, 1, 2048, seed=3, dtype=torch.bfloat16)
    # All experts lie in memory once; every call of the graph picks eight others.
    copies = [choices(1, 1, k=8, E=256, seed=seed) for seed in range(31)]
    up, down = TUNED_DECODE[4]
    size = 9 * (1024 * 2048 + 2048 * 512) // 2 * 33 // 32
    pairs = [(first, down) for first in GATE_UP_CANDIDATES] + [(up, second) for second in DOWN_CANDIDATES]
    for configs in pairs:

        def call(copy, configs=configs):
            decode_with(x=x, configs=configs, **arguments, **copy)

        attempt("moe decode", configs, call, copies, size, mark=configs == (up, down))


def bench_gemm(tokens: int = 512) -> None:
    weight, scales = quantised(12352, 2048, bits=4, group=128, seed=1, dtype=torch.bfloat16)
    copies = clones({"weight": weight, "scales": scales})
    x, norm = randn(1, tokens, 2048, seed=3, dtype=torch.bfloat16), randn(2048, seed=2)
    before = TUNED_GEMM[4, 2]
    for config in GEMM_CANDIDATES:
        TUNED_GEMM[4, 2] = config

        def call(copy):
            linear(x=x, norm_weight=norm, eps=1e-6, residual=None, **copy)

        attempt(f"gemm {tokens}x12352x2048", config, call, copies, weight.numel(), mark=config == before)
    TUNED_GEMM[4, 2] = before


def bench_prefill() -> None:
    arguments = experts(D=2048, E=256, width=512, shared=512, bits=4, group=128, dtype=torch.bfloat16)
    size = 257 * (1024 * 2048 + 2048 * 512) // 2 * 33 // 32
    for tokens in (512, 2048):
        x = randn(1, tokens, 2048, seed=3, dtype=torch.bfloat16)
        copies = [choices(1, tokens, k=8, E=256, seed=seed) for seed in range(4)]
        for config in PREFILL_CANDIDATES:

            def call(copy, config=config, x=x):
                prefill_with(x=x, config=config, **arguments, **copy)

            attempt(f"moe prefill T={tokens}", config, call, copies, size, mark=config == TUNED_PREFILL[2])


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["linear", "moe", "prefill"]
    if "linear" in wanted:
        bench_gemv()
    if "moe" in wanted:
        bench_router()
        bench_decode()
    if "prefill" in wanted:
        bench_gemm()
        bench_prefill()
