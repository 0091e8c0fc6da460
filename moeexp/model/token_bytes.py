"""How many bytes of a text each of its tokens stands for: whole numbers that sum to the bytes of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A byte that no other token covers, as tokenizers with byte fallback write it.
ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[int]:
    """`offsets`: of each token, in characters of the text as it was given; `names`: the tokens as the vocabulary has them.

    Tokens whose characters overlap (one splits a character) share their bytes in proportion to the bytes that each is:
    a byte-level vocabulary writes a byte as one character, so there the shares are the real ones. What lies between two
    tokens, because a normaliser dropped it or the offsets leave out white space, counts with one of the two."""
    if not names:
        return []  # an empty text, or one of which a normaliser leaves nothing
    starts = [0]
    for character in text:
        starts.append(starts[-1] + len(character.encode()))
    sizes: list[int] = []
    counted = 0  # bytes that `sizes` holds
    for first, after, until in _clusters(text, offsets):
        sizes += _shares(starts[until] - counted, [_length(name) for name in names[first:after]])
        counted = starts[until]
    assert len(sizes) == len(names) and sum(sizes) == starts[-1], "bytes of the text were lost or counted twice"
    return sizes


def _clusters(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first token, token after the last, end in characters) of runs of tokens that overlap; together the whole text."""
    clusters: list[tuple[int, int, int]] = []
    for index, (start, end) in enumerate(offsets):
        until = clusters[-1][2] if clusters else 0
        if clusters and start < until:
            clusters[-1] = (clusters[-1][0], index + 1, max(until, end))
            continue
        # White space belongs to the token that it leads; an accent that was merged into a letter to the letter's.
        while clusters and until < start and not text[until].isspace():
            until += 1
        if clusters:
            clusters[-1] = (*clusters[-1][:2], until)
        clusters.append((index, index + 1, max(until, end)))
    return [*clusters[:-1], (*clusters[-1][:2], len(text))]


def _length(name: str) -> int:
    return 1 if ONE_BYTE.fullmatch(name) else max(len(name), 1)


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    ends, weighed = [0], 0
    for weight in weights:
        weighed += weight
        ends.append(total * weighed // sum(weights))
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]
