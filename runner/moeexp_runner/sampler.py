"""The choice of the next token, with the random state that it may need.

Shape letters: B batch, V vocabulary, S rows of ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """`op(logits=…)` for a choice without chance, else `op(logits=…, seed_state=…, **options)`: a draw. `feed_op`, where there is
    one, takes the same and what `feed` is given, and does what that says.

    The seed state (int64 [2]: seed, number of draws) lives where the sampling runs and is advanced by the op itself, so
    that replays of one graph draw anew; `reset` starts the same draws again. Logits [B, 1, V], tokens [B, 1] int64."""

    def __init__(
        self,
        op: Callable[..., Tensor],
        *,
        feed_op: Callable[..., None] | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ):
        self._op, self._feed_op = op, feed_op
        self.start: Tensor | None = None if seed is None else torch.tensor([seed, 0], dtype=torch.int64, device=device)
        self.seed_state: Tensor | None = None if self.start is None else self.start.clone()
        self._arguments = {} if self.seed_state is None else {"seed_state": self.seed_state, **options}

    def __call__(self, *, logits: Tensor) -> Tensor:
        return self._op(logits=logits, **self._arguments)

    def feed(self, *, logits: Tensor, token: Tensor, positions: Tensor, index: Tensor, ids: Tensor) -> None:
        """Chooses the next token and makes it the next step's input, in place: `token` [B, 1] is it, `positions` [B] and `index`
        [1] are one further, and row `index` of `ids` [S, B] is the token's ids. All int64. By the one op where there is one,
        else by the choice and torch's ops."""
        if self._feed_op is not None:
            self._feed_op(logits=logits, token=token, positions=positions, index=index, ids=ids, **self._arguments)
            return
        token.copy_(self(logits=logits))
        positions.add_(1)
        index.add_(1)
        ids.index_copy_(0, index, token.view(1, -1))

    def reset(self) -> None:
        if self.seed_state is not None and self.start is not None:
            self.seed_state.copy_(self.start)
