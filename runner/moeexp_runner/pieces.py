"""How a prompt is cut into calls of the prefill method."""

from __future__ import annotations


def pieces(tokens: int, most: int) -> int:
    """Calls that a prompt of `tokens` takes, with at most `most` in each (0: any number)."""
    return -(-tokens // most) if most else 1


def piece_sizes(tokens: int, most: int) -> list[int]:
    """Tokens of each call: as few calls as hold `tokens` with at most `most` in each (0: any number), and as even as they can be.

    Not whole pieces and a rest: a call reads every weight however short it is, and one of a single token runs other kernels, or
    under `dispatch=single` and `cond` other ops. It is legal, and only a `most` of 1 or 2 leads to it."""
    calls = pieces(tokens, most)
    least, longer = divmod(tokens, calls)
    return [least + 1] * longer + [least] * (calls - longer)
