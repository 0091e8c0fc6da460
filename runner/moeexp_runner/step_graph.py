"""One call of a method as CUDA graphs, with what follows it and with either kind of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeexp_runner.arena import Arena
from moeexp_runner.binding import package_in
from moeexp_runner.explicit import ExplicitState
from moeexp_runner.graph import GraphedMethod

State = Arena | ExplicitState


def can_capture(tensor: Tensor) -> bool:
    return tensor.is_cuda


def memory_comes_with_a_launch() -> bool:
    """Whether what a graph allocates is there from its first launch on. Before, it can be neither read, as the warm-up of a
    second graph does with the outputs of the first, nor freed: torch then aborts."""
    return torch.cuda.is_available() and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


class StepGraph:
    """`replay(*inputs)` runs `method(*inputs)` and then `after(logits)`; returns the logits, which hold until the next
    replay. `inputs` are static tensors, as for `GraphedMethod`.

    Under explicit state a graph reads and writes the same addresses each time, and so the state is double-buffered and two
    are captured that swap: one reads the front set and leaves its outputs (the back set), the other reads those and copies its
    outputs to the front. With `swap=False` one graph does both, for a method that is rarely called twice in a row.

    On a CPU there is nothing to capture: the same calls are made eagerly, so that the logic around graphs can be tested."""

    def __init__(
        self,
        method: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        state: State,
        *,
        after: Callable[[Tensor], None] | None = None,
        swap: bool = True,
        pdl: Callable[[int], int] | None = None,
    ):
        self.method, self.inputs, self._state, self._after = method, inputs, state, after
        self._package = package_in(method)
        self._bound = self._package and self._package.bound  # at the capture
        self._back_set: dict[str, Tensor] | None = None
        self._graphs: list[GraphedMethod] = []
        if not can_capture(inputs[0]):
            return
        runs: list[Callable[..., Any]] = [self._in_place]
        if isinstance(state, ExplicitState):
            runs = [self._to_back, self._from_back] if swap else [self._in_front]
        self._graphs = [GraphedMethod(run, inputs, pdl=pdl) for run in runs]

    @property
    def state(self) -> str:
        """`eager`, `warm`, `captured` or `closed`: of the last graph, which is captured last. `eager` again once the
        method's constants are bound anew or let go of: the graphs hold their addresses."""
        if not self._graphs:
            return "eager"
        state = self._graphs[-1].state
        return "eager" if state == "captured" and self._is_bound_anew() else state

    @property
    def pdl_edges(self) -> int:
        """Programmatic edges of one step."""
        return self._graphs[0].pdl_edges if self._graphs else 0

    def capture(self, *, pool: tuple[int, int] | None = None) -> None:
        """Warms up and captures, `pool` as in `GraphedMethod`. Advances the state and all that `after` mutates: the caller
        resets them. On failure everything is eager again."""
        if self._is_bound_anew():
            self.invalidate()
        self._bound = self._package and self._package.bound
        for graph in self._graphs:
            graph.pool = pool
            try:
                graph.warm()
                graph.capture()
                if memory_comes_with_a_launch():
                    graph.replay(*self.inputs)
            except BaseException:
                self.invalidate()
                raise
            if self._back_set is None and isinstance(self._state, ExplicitState) and len(self._graphs) == 2:
                self._back_set = dict(zip(self._state.front, graph.output[1], strict=True))

    def replay(self, *inputs: Tensor) -> Tensor:
        """`RuntimeError` before any launch where nothing is captured: an eager step would be another experiment's."""
        if not self._graphs:
            logits = self._state.call(self.method, *inputs)
            self._finish(logits)
            return logits
        if self.state != "captured":
            raise RuntimeError(
                f"the graph of this method is {self.state}: its capture failed, or constants were bound anew since; a "
                "session's reset() captures it, and with cuda_graph=false it is not needed"
            )
        if not isinstance(self._state, ExplicitState):
            return self._graphs[0].replay(*inputs)
        if self._back_set is not None and self._state.tensors is self._back_set:
            logits, _ = self._graphs[1].replay(*inputs)
            self._state.tensors = dict(self._state.front)
            return logits
        self._state.to_front()
        logits, _ = self._graphs[0].replay(*inputs)
        if self._back_set is not None:
            self._state.tensors = self._back_set
        return logits

    def _is_bound_anew(self) -> bool:
        return self._package is not None and self._package.bound is not self._bound

    def invalidate(self) -> None:
        """Back to `eager`."""
        self._forget(GraphedMethod.invalidate)

    def close(self) -> None:
        self._forget(GraphedMethod.close)

    def _forget(self, how: Callable[[GraphedMethod], None]) -> None:
        if self._back_set is not None and isinstance(self._state, ExplicitState) and self._state.tensors is self._back_set:
            self._state.to_front()  # the back set is the graph's memory
        self._back_set = None
        for graph in self._graphs:
            how(graph)

    def _finish(self, logits: Tensor) -> None:
        if self._after is not None:
            self._after(logits)

    def _in_place(self, *inputs: Tensor) -> Tensor:
        logits = self.method(*inputs)
        self._finish(logits)
        return logits

    def _to_back(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._explicit(inputs, self._front())

    def _from_back(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        assert self._back_set is not None, "the first graph is captured first"
        return self._to_front(*self._explicit(inputs, list(self._back_set.values())))

    def _in_front(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._to_front(*self._explicit(inputs, self._front()))

    def _front(self) -> list[Tensor]:
        return list(self._state.front.values())  # type: ignore[union-attr]

    def _explicit(self, inputs: tuple[Tensor, ...], tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, *new = self.method(*inputs, *tensors)
        self._finish(logits)
        return logits, new

    def _to_front(self, logits: Tensor, new: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        torch._foreach_copy_(self._front(), new)
        return logits, []
