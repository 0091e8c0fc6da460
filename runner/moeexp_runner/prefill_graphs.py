"""Prefill as CUDA graphs, one per length; a shorter prompt is padded on the right and its `valid_len` goes in.

Shape letters: B batch, T tokens of a prompt, L a captured length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moeexp_runner.step_graph import State, StepGraph

PADDING = 0  # any token will do: nothing reads what it leads to


class PrefillGraphs:
    """`method(tokens [B, L], positions [B], logit_positions [1], valid_len [B])` -> logits [B, 1, V], with ops that leave every
    state as if only the first `valid_len` tokens had been there. A prompt takes the shortest length that holds it."""

    def __init__(self, method: Callable[..., Tensor], state: State, *, lengths: Iterable[int], batch: int, device: torch.device):
        def static(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.lengths = sorted(set(lengths))
        if not self.lengths:
            raise ValueError("prefill graphs need at least one length")
        self.positions, self.last, self.valid_len = static(batch), static(1), static(batch)
        self.tokens = {length: static(batch, length) for length in self.lengths}
        self.graphs = {
            length: StepGraph(method, (tokens, self.positions, self.last, self.valid_len), state, swap=False)
            for length, tokens in self.tokens.items()
        }

    @property
    def state(self) -> str:
        """As `StepGraph.state`: of all, since they are captured together."""
        return self.graphs[self.lengths[0]].state

    def capture(self) -> None:
        """As `StepGraph.capture`, in memory that they share: they run one at a time. Longest first: the others then find
        room in what it needs."""
        self.valid_len.fill_(1)
        self.positions.zero_()
        self.last.zero_()  # of a prompt before, both may lie beyond the shortest length
        pool = torch.cuda.graph_pool_handle() if self.valid_len.is_cuda else None
        try:
            for length in reversed(self.lengths):
                self.graphs[length].capture(pool=pool)
        except BaseException:
            self.invalidate()
            raise

    def invalidate(self) -> None:
        for graph in self.graphs.values():
            graph.invalidate()

    def fitting(self, count: int) -> int | None:
        """The shortest captured length for a prompt of `count` tokens; None if it is longer than all."""
        return next((length for length in self.lengths if length >= count), None)

    def load(self, tokens: Tensor, position: int) -> tuple[Tensor, ...]:
        """The static inputs, filled with tokens [B, T], T at most the longest length, the first at `position`."""
        count = tokens.shape[1]
        length = self.fitting(count)
        assert length is not None, f"no graph holds {count} tokens"
        static = self.tokens[length]
        static[:, :count].copy_(tokens)
        static[:, count:].fill_(PADDING)
        self.positions.fill_(position)
        self.last.fill_(count - 1)
        self.valid_len.fill_(count)
        return static, self.positions, self.last, self.valid_len

    def replay(self, *inputs: Tensor) -> Tensor:
        """On what `load` returned. Logits of the last token, [B, 1, V], which hold until the next prefill."""
        return self.graphs[inputs[0].shape[1]].replay(*inputs)

    def close(self) -> None:
        for graph in self.graphs.values():
            graph.close()
