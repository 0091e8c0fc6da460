"""CUDA-graph capture and replay of one method at one fixed shape: `eager -> warm -> captured -> closed`.

A failed capture goes back to `eager` and leaves no memory behind; any state can be closed. Outputs of a replay alias the
graph's memory: they hold until the next replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3


class GraphedMethod:
    """`inputs` are the static tensors that the graph will read; the caller copies values into them before `replay`.

    `pool`: a `torch.cuda.graph_pool_handle()` that graphs which never run at the same time may share. `pdl`: makes
    edges of a `cudaGraph_t` that is not yet instantiated programmatic (programmatic dependent launch) and returns how many,
    which `pdl_edges` says from then on."""

    def __init__(
        self,
        method: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        *,
        pool: tuple[int, int] | None = None,
        pdl: Callable[[int], int] | None = None,
    ):
        self.method, self.inputs, self.state, self.pool, self.pdl = method, inputs, "eager", pool, pdl
        self.pdl_edges = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Any = None

    @property
    def output(self) -> Any:
        """What the method returned while it was captured; None before."""
        return self._output

    def warm(self) -> None:
        """Runs the method eagerly, on the inputs as they are, so that kernels are loaded and workspaces allocated: a
        capture allows neither. Advances the state that the method mutates; the caller resets it afterwards."""
        self._require("eager", "warm")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.method(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.state = "warm"

    def capture(self) -> None:
        """Records one call. State that the method mutates stays as it is (nothing runs during capture)."""
        self._require("warm")
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self.pdl is not None else torch.cuda.CUDAGraph()
        shared: dict[str, Any] = {} if self.pool is None else {"pool": self.pool}
        try:
            with torch.cuda.graph(graph, **shared):
                output = self.method(*self.inputs)
            if self.pdl is not None:
                self.pdl_edges = self.pdl(graph.raw_cuda_graph())
                graph.instantiate()
        except Exception as error:
            del graph
            self._back_to_eager()
            raise RuntimeError(f"CUDA-graph capture failed, the method is eager again: {error}") from error
        self._graph, self._output, self.state = graph, output, "captured"

    def replay(self, *inputs: Tensor) -> Any:
        """Replays on the static inputs, which must be handed in again: `ValueError` for any other tensor, before launch."""
        self._require("captured")
        for index, (given, static) in enumerate(zip(inputs, self.inputs, strict=True)):
            if given.data_ptr() != static.data_ptr() or given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"input {index} of a captured method must be its static tensor {tuple(static.shape)} {static.dtype}, "
                    f"got {tuple(given.shape)} {given.dtype} at another address; copy into the static tensor instead"
                )
        assert self._graph is not None and self._output is not None
        self._graph.replay()
        return self._output

    def invalidate(self) -> None:
        """Back to `eager`, e.g. after constants were bound anew: the graph holds old addresses."""
        if self.state != "closed":
            self._back_to_eager()

    def close(self) -> None:
        self._back_to_eager()
        self.state = "closed"

    def _back_to_eager(self) -> None:
        self._graph, self._output, self.state = None, None, "eager"
        # Frames of a failed capture keep tensors of the graph's pool alive until collected.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require(self, *states: str) -> None:
        if self.state not in states:
            raise RuntimeError(f"the method is {self.state}, this needs it {' or '.join(states)}")
