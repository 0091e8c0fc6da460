"""What a session is asked for, checked before anything runs: a wrong id reads beyond the embedding, a wrong position
writes into another slot, and on a GPU either ends the process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What a session was built for."""

    batch: int
    max_seq_len: int
    vocab_size: int
    device: torch.device


def check_tokens(limits: Limits, tokens: Tensor, count: int, *, start: int, ids: bool = True) -> None:
    """`ValueError` unless `tokens` is int64 [B, T >= 1] on the session's device, `count` more tokens fit after `start`,
    and (`ids`) each is in the vocabulary. Sampled tokens are so by construction."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] != limits.batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be int64 [{limits.batch}, T >= 1], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.device.type != limits.device.type:
        raise ValueError(f"tokens are on {tokens.device}, the session is on {limits.device}")
    if start + count > limits.max_seq_len:
        raise ValueError(
            f"{start} tokens in the session plus {count} exceed max_seq_len={limits.max_seq_len}; "
            "reset the session or build one with a larger max_seq_len"
        )
    if ids and (int(tokens.min()) < 0 or int(tokens.max()) >= limits.vocab_size):
        raise ValueError(f"token ids must lie in 0..{limits.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")


def check_logit_positions(limits: Limits, positions: Tensor | None, count: int) -> None:
    """`ValueError` unless None, or int64 [n >= 1] within 0..count-1 on the session's device."""
    if positions is None:
        return
    last = count - 1
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(f"logit_positions must be int64 [n], got {positions.dtype} {list(positions.shape)}")
    if positions.device.type != limits.device.type:
        raise ValueError(f"logit_positions are on {positions.device}, the session is on {limits.device}")
    if positions.numel() == 0 or int(positions.min()) < 0 or int(positions.max()) > last:
        raise ValueError(f"logit_positions must lie in 0..{last} and not be empty, got {positions.tolist()}")


def check_generation(limits: Limits, tokens: Tensor, new_tokens: int) -> None:
    """`ValueError` unless a generation of `new_tokens` from a prompt [B, T] fits, from reset state."""
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens} must be at least 1")
    if tokens.ndim == 2 and tokens.shape[1] + new_tokens > limits.max_seq_len:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} tokens plus new_tokens={new_tokens} exceeds max_seq_len={limits.max_seq_len}"
        )
    check_tokens(limits, tokens, 1, start=0)
