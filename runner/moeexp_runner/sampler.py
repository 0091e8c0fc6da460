"""The choice of the next token, with the random state that it may need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """`op(logits=…)` for a choice without chance, else `op(logits=…, seed_state=…, **options)`: a draw.

    The seed state (int64 [2]: seed, number of draws) lives where the sampling runs and is advanced by the op itself, so
    that replays of one graph draw anew; `reset` starts the same draws again. Logits [B, 1, V], tokens [B, 1] int64."""

    def __init__(self, op: Callable[..., Tensor], *, seed: int | None = None, device: torch.device | str = "cpu", **options: Any):
        self._op, self._options = op, options
        self.start: Tensor | None = None if seed is None else torch.tensor([seed, 0], dtype=torch.int64, device=device)
        self.seed_state: Tensor | None = None if self.start is None else self.start.clone()

    def __call__(self, *, logits: Tensor) -> Tensor:
        if self.seed_state is None:
            return self._op(logits=logits)
        return self._op(logits=logits, seed_state=self.seed_state, **self._options)

    def reset(self) -> None:
        if self.seed_state is not None and self.start is not None:
            self.seed_state.copy_(self.start)
