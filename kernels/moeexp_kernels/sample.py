"""Choice of the next token.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def reference_greedy(*, logits: Tensor) -> Tensor:
    """logits [B, 1, V] any float dtype -> [B, 1] int64, the index of each row's largest logit (the lowest on a tie)."""
    return logits.argmax(dim=-1)
