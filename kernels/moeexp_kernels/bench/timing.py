"""Time of a call inside a CUDA graph with cold memory, and what a plain read of as many bytes costs on the same GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import cycle, islice

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeexp_kernels.parts.graph_edges import add_pdl_edges
from moeexp_kernels.parts.pdl import WITHIN_AN_OP

DECODE_CALLS = 64  # calls in a graph, so that one event's resolution does not show
REPLAYS = 15
READ_BLOCK = 4096  # int32 words a program
LARGE_READ = 1 << 30  # bytes; far beyond L2


def cold_bytes(device: torch.device) -> int:
    """Bytes to pass between two uses of the same memory: twice the L2 cache."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size


# Which edges of a graph are made programmatic.
PDL = {"within": WITHIN_AN_OP, "all": None, "none": ()}


def graph_samples(
    call: Callable[[dict], object], copies: list[dict], *, calls: int, replays: int = REPLAYS, pdl: str = "within"
) -> list[float]:
    """Microseconds of one `call(copy)`, one sample per replay of a graph of `calls` calls that go round the copies.

    pdl: "within": programmatic edges between the kernels of one op, as in a decode step, none between calls; "all": wherever
    both kernels know PDL; "none".

    The first call compiles; the one before the capture is for what an op does only once (cuBLAS handles, workspaces)."""
    for _ in range(2):
        call(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for copy in islice(cycle(copies), calls):
            call(copy)
    if torch.cuda.get_device_capability() >= (9, 0):  # elsewhere the kernels do not wait by themselves
        add_pdl_edges(graph.raw_cuda_graph(), pairs=PDL[pdl])
    graph.instantiate()
    samples = []
    for replay in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 2:
            samples.append(start.elapsed_time(end) * 1e3 / calls)
    return samples


def calls_for(phase: str, copies: int) -> int:
    return max(copies, DECODE_CALLS) if phase == "decode" else copies


@triton.jit
def read_kernel(x_ptr, out_ptr, words, BLOCK: tl.constexpr):
    """Reads `words` int32; the sum is stored so that the reads are not optimised away."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < words, other=0, cache_modifier=".cg")
    tl.store(out_ptr + program, tl.sum(x, axis=0))


def read(buffer: Tensor, out: Tensor) -> None:
    words = buffer.numel()
    read_kernel[(triton.cdiv(words, READ_BLOCK),)](buffer, out, words, BLOCK=READ_BLOCK, num_warps=8)


class Reader:
    """Plain reads of any size, each of other memory than the one before."""

    def __init__(self, device: torch.device):
        self._buffer = torch.zeros(LARGE_READ // 4, dtype=torch.int32, device=device)
        self._out = torch.empty(LARGE_READ // 4 // READ_BLOCK + 1, dtype=torch.int32, device=device)
        self._cold = cold_bytes(device)
        self._times: dict[int, float] = {}
        self.bandwidth = LARGE_READ / self.microseconds(LARGE_READ) * 1e6  # bytes per second

    def microseconds(self, size: int) -> float:
        """Median time of a read of `size` bytes (to the next 16) inside a graph."""
        words = min(max(4, -(-size // 16) * 4), self._buffer.numel())
        if words not in self._times:
            places = max(1, min(self._buffer.numel() // words, -(-self._cold // (4 * words)) + 1, 128))
            copies = [{"x": self._buffer[i * words : (i + 1) * words]} for i in range(places)]
            calls = max(places, 1 if words == self._buffer.numel() else min(DECODE_CALLS, self._buffer.numel() // words))
            samples = graph_samples(lambda copy: read(copy["x"], self._out), copies, calls=calls)
            self._times[words] = statistics.median(samples)
        return self._times[words]
