"""Times the gated delta net at the shapes of Qwen3.5-35B-A3B, with cold weights and state, inside CUDA graphs.

    PYTHONPATH=kernels:tests python tests/gpu/bench_gated_delta.py [decode] [prefill]

Every call of a graph uses another copy of state, weights and activations, > 200 MB in all, so that none is found in L2. One
row per candidate; `*` marks what the tables hold. For prefill one part of the table varies at a time.
"""

from __future__ import annotations

import sys

import kernels_common as common
import torch
from moeexp_kernels import gated_delta, gated_delta_prefill
from moeexp_kernels.gated_delta import gdn_decode
from moeexp_kernels.gated_delta_prefill import gdn_prefill
from test_kernels_gated_delta import BF16, make_case

HEADS, DIMS = (16, 32), (128, 128)
COLD_BYTES = 256 << 20
DECODE_CANDIDATES = [
    {"split": split, "step": step, "num_warps": warps}
    for split, step, warps in [
        (0, 2, 16), (0, 2, 8), (0, 1, 16), (0, 1, 8), (0, 1, 4),
        (1, 1, 16), (1, 1, 8), (2, 1, 8), (2, 1, 4), (4, 1, 8), (4, 1, 4), (4, 1, 2), (8, 1, 4), (8, 1, 2), (8, 1, 1),
        (16, 1, 2), (16, 1, 1),
    ]
]  # fmt: skip
LOCAL_CANDIDATES = [
    {"chunk": chunk, "solve": solve, "local": {"num_warps": warps, "num_stages": 1}}
    for chunk, solve, warps in [(64, "tf32", 4), (64, "tf32", 8), (64, "tf32x3", 8), (32, "tf32", 4), (32, "tf32x3", 4)]
]
SCAN_CANDIDATES = [  # pipelined ones last: an illegal access would end the sweep (see TUNED's comment on Triton 3.6)
    {"block_v": block, "scan": {"num_warps": warps, "num_stages": stages}}
    for block, warps, stages in [
        (32, 4, 1), (16, 4, 1), (64, 4, 1), (64, 8, 1), (32, 8, 1), (32, 4, 2), (32, 4, 3), (16, 4, 2), (64, 4, 2), (64, 8, 2),
    ]
]  # fmt: skip
NORM_CANDIDATES = [
    {"norm_tokens": tokens, "norm": {"num_warps": warps}}
    for tokens, warps in [(4, 4), (8, 4), (16, 4), (32, 4), (32, 8)]
]


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


def copies_of(batch: int, tokens: int) -> tuple[list[dict], int]:
    """Cold copies of one call's tensors, and the bytes of one call: everything once, both states twice."""
    case = make_case(batch, tokens, HEADS, DIMS, BF16)
    sizes = {k: v.numel() * v.element_size() for k, v in case.items() if torch.is_tensor(v)}
    output = batch * tokens * HEADS[1] * DIMS[1] * 2
    count = max(2, -(-COLD_BYTES // sum(sizes.values())))
    copies = [{k: v.clone() if torch.is_tensor(v) else v for k, v in case.items()} for _ in range(count)]
    return copies, sum(sizes.values()) + sizes["conv_state"] + sizes["recurrent_state"] + output


def attempt(name, config, call, copies, moved, *, mark):
    """One row; a candidate that does not fit the GPU is a row too, not the end of the sweep."""
    try:
        us = microseconds(call, copies)
        print(f"{'*' if mark else ' '} {name:24s} {us:8.2f} us {moved / us * 1e-3:7.0f} GB/s  {config}", flush=True)
    except Exception as error:
        print(f"  {name:24s} failed: {type(error).__name__} {str(error)[:80]}  {config}", flush=True)


def bench_decode() -> None:
    for batch in (1, 8):
        copies, moved = copies_of(batch, 1)
        key = (*DIMS, batch * HEADS[0] <= gated_delta.FEW_PROGRAMS)
        chosen = gated_delta.TUNED[key]
        for config in DECODE_CANDIDATES:
            gated_delta.TUNED[key] = config
            attempt(f"decode B={batch}", config, lambda c: gdn_decode(**c), copies, moved, mark=config == chosen)
        gated_delta.TUNED[key] = chosen


def bench_prefill() -> None:
    chosen = gated_delta_prefill.TUNED[BF16]
    for tokens in (1, 512, 2048):
        copies, moved = copies_of(1, tokens)
        copies = copies[:16]
        parts = [("local", LOCAL_CANDIDATES), ("scan", SCAN_CANDIDATES), ("norm", NORM_CANDIDATES)]
        for part, candidates in parts if tokens > 1 else [("chunked", [chosen])]:
            for config in candidates:
                gated_delta_prefill.TUNED[BF16] = {**chosen, **config}
                mark = gated_delta_prefill.TUNED[BF16] == chosen
                attempt(f"prefill T={tokens} {part}", config, lambda c: gdn_prefill(**c), copies, moved, mark=mark)
        gated_delta_prefill.TUNED[BF16] = chosen
        split_by_kernel(copies, tokens)


def split_by_kernel(copies: list[dict], tokens: int) -> None:
    """Where the time of the table's choice goes: the three kernels' shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for copy in copies:
            gdn_prefill(**copy)
        torch.cuda.synchronize()
    for event in profile.key_averages():
        if event.key.startswith("_"):
            print(f"    T={tokens} {event.key:22s} {event.device_time_total / event.count:8.2f} us", flush=True)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["decode", "prefill"]
    unknown = set(wanted) - {"decode", "prefill"}
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; allowed: decode, prefill")
    if common.DEVICE != "cuda":
        raise SystemExit("this benchmark needs a CUDA device")
    for name in wanted:
        {"decode": bench_decode, "prefill": bench_prefill}[name]()
