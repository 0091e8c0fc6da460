"""Wall-clock timing of a session and the read bandwidth that its figures are held against.

A token's latency is what its reader waits for: from the previous token's arrival on the host to its own. A throughput is
tokens over time, in every mode: never a median's inverse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeexp_runner.session import Session


@dataclass
class Samples:
    """Raw samples of one benchmark, in seconds. `lengths`: how many of `token_s` each generation has. `tokens`: how many
    tokens of answers came with each of `token_s`: one of every sequence that had not ended before."""

    ttft_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def throughput(tokens: int, seconds: Sequence[float]) -> float:
    """Tokens per second where all of `seconds` made `tokens`: one definition, of prefill and of decoding."""
    return tokens / math.fsum(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_generation(
    session: Session, tokens: Tensor, new_tokens: int, samples: Samples, *, stop_ids: set[int] | None = None
) -> list[list[int]]:
    """One generation; appends its time to first token and the latency of each further token, also if it is interrupted.
    Ends early once every row has produced one of `stop_ids`: a step is one of all rows, and those that have ended run along.
    Returns the new ids [B][<= n], each row up to its own end."""
    synchronize(session.device)
    arrivals: list[float] = []
    ended = [False] * session.batch
    running = [session.batch]  # rows that had not ended before each token, and before the next

    def on_token(ids: list[int], index: int) -> bool:
        arrivals.append(time.perf_counter())
        if stop_ids is not None:
            ended[:] = [before or token in stop_ids for before, token in zip(ended, ids, strict=True)]
        running.append(ended.count(False))
        return running[-1] == 0

    start = time.perf_counter()
    try:
        return [cut(row, stop_ids) for row in session.generate(tokens, new_tokens, on_token=on_token)]
    finally:
        samples.ttft_s.extend(arrival - start for arrival in arrivals[:1])
        samples.lengths.extend(len(arrivals) - 1 for _ in arrivals[:1])
        samples.token_s.extend(after - before for before, after in zip(arrivals, arrivals[1:], strict=False))
        samples.tokens.extend(running[1 : len(arrivals)])


def cut(row: list[int], stop_ids: set[int] | None) -> list[int]:
    """A row up to the first of `stop_ids`, which is kept, as transformers keeps it."""
    if stop_ids is None:
        return row
    return row[: next((index for index, token in enumerate(row) if token in stop_ids), len(row)) + 1]


def time_prefill(session: Session, tokens: Tensor, samples: Samples) -> None:
    """One prefill of tokens [B, T] on reset state, logits of the last position only."""
    session.reset()
    synchronize(session.device)
    start = time.perf_counter()
    session.prefill(tokens)
    synchronize(session.device)
    samples.prefill_s.append(time.perf_counter() - start)


def time_verify(session: Session, prompt: Tensor, steps: Sequence[Tensor]) -> float:
    """Seconds that the steps [B, T] behind prompt [B, n] take together, none of them waited for by itself. Resets first."""
    session.reset()
    session.prefill(prompt)
    synchronize(session.device)
    start = time.perf_counter()
    for tokens in steps:
        session.verify(tokens)
    synchronize(session.device)
    return time.perf_counter() - start


def read_bandwidth(device: torch.device, *, megabytes: int | None = None, rounds: int = 5) -> float:
    """Bytes per second of a large streaming read (the maximum of random int32), best of `rounds`, beyond any cache."""
    megabytes = megabytes or (2048 if device.type == "cuda" else 256)
    data = torch.randint(-(2**31), 2**31 - 1, (megabytes * 2**18,), dtype=torch.int32, device=device)
    best = float("inf")
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        torch.amax(data)  # a sum would be widened to int64, which a CPU does at a thirtieth of its bandwidth
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best
