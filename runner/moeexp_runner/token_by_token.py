"""A prompt through the decode method, for sessions that have no other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def feed(decode: Callable[[Tensor], Tensor], tokens: Tensor, logit_positions: Tensor | None) -> Tensor:
    """Decodes tokens [B, T] one after another. Logits [B, n, V] of logit_positions [n], by default of the last: copies,
    since a graph overwrites its own."""
    last = tokens.shape[1] - 1
    wanted = [last] if logit_positions is None else logit_positions.tolist()
    kept = {}
    for index in range(last + 1):
        logits = decode(tokens[:, index : index + 1])
        if index in wanted:
            kept[index] = logits.clone()
    return torch.cat([kept[index] for index in wanted], dim=1)
