"""Decoding without the host: decode, sampling and token feedback in one graph, tokens read when they arrive.

Shape letters: B batch, S max_seq_len.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeexp_runner.sampler import Sampler
from moeexp_runner.step_graph import State, StepGraph

OnToken = Callable[[list[int], int], bool | None]


class Loop:
    """A step reads `token` [B, 1] and `positions` [B] (static, int64), leaves the next token and position there, and writes
    the token's ids to row `index` of `ids` [S, B]. The host enqueues steps and copies row after row into pinned memory on
    a stream of its own, so that the steps follow each other without waiting for a copy.

    At most `ahead` steps are enqueued beyond the token that the host reads: when it then stops, so many have run in vain.
    Their tokens are discarded, but the state has seen them: of all steps, `fed`, these are `overrun`."""

    def __init__(
        self,
        *,
        decode: Callable[..., Tensor],
        sample: Sampler,
        state: State,
        token: Tensor,
        positions: Tensor,
        max_seq_len: int,
        ahead: int,
        pdl: Callable[[int], int] | None = None,
    ):
        if ahead < 1:
            raise ValueError(f"ahead={ahead} must be at least 1: the step whose token is read next")
        self.token, self.positions, self.ahead, self._sample = token, positions, ahead, sample
        rows = (max_seq_len, token.shape[0])
        self.ids = torch.zeros(rows, dtype=torch.int64, device=token.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=token.device)
        self._host = torch.zeros(rows, dtype=torch.int64, pin_memory=token.is_cuda)
        self._copies = torch.cuda.Stream(token.device) if token.is_cuda else None
        self.graph = StepGraph(decode, (token, positions), state, after=self._feed, pdl=pdl)
        self.fed = self.overrun = 0

    def _feed(self, logits: Tensor) -> None:
        """What follows the logits in every step."""
        self._sample.feed(logits=logits, token=self.token, positions=self.positions, index=self.index, ids=self.ids)
        if self._copies is not None and not torch.cuda.is_current_stream_capturing():
            # A warm-up, of which there are more than the smallest max_seq_len has slots.
            self.positions.sub_(1)
            self.index.sub_(1)

    def capture(self) -> None:
        """As `StepGraph.capture`; before the first step."""
        self.positions.zero_()
        self.index.zero_()
        self.graph.capture()

    @property
    def state(self) -> str:
        return self.graph.state

    def start(self, first: Tensor, position: int) -> None:
        """first [B, 1]: the token to feed next, at `position`. It is row 0 of `ids`."""
        self.token.copy_(first)
        self.positions.fill_(position)
        self.index.zero_()
        self.ids[0].copy_(first[:, 0])
        self.fed = self.overrun = 0

    def step(self) -> Tensor:
        """Enqueues one step; returns its logits [B, 1, V], which hold until the next."""
        logits = self.graph.replay(self.token, self.positions)
        self.fed += 1
        self.overrun += 1
        return logits

    def run(self, first: Tensor, position: int, new_tokens: int, on_token: OnToken | None) -> list[list[int]]:
        """Up to `new_tokens` tokens, `first` among them, as lists of B ids. `on_token` as in `Session.generate`."""
        self.start(first, position)
        arrived = [self._send(0)]
        tokens: list[list[int]] = []
        for index in range(new_tokens):
            while len(arrived) < min(new_tokens, index + 1 + self.ahead):
                self.step()
                arrived.append(self._send(len(arrived)))
            arrived[index]()
            self.overrun = self.fed - index
            tokens.append(self._host[index].tolist())
            if on_token is not None and on_token(tokens[-1], index):
                break
        return tokens

    def _send(self, row: int) -> Callable[[], None]:
        """Starts the copy of a row to the host; calling the result waits for it."""
        if self._copies is None:
            self._host[row].copy_(self.ids[row])
            return lambda: None
        self._copies.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(self._copies):
            self._host[row].copy_(self.ids[row], non_blocking=True)
            return self._copies.record_event().synchronize

    def close(self) -> None:
        self.graph.close()
