"""One model being decoded: two methods over one set of weights and one set of state buffers.

Shape letters: B batch, T tokens of a prompt, n positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arena import Arena
from .graph import GraphedMethod

Method = Callable[..., Tensor]


class Session:
    """Methods, arena and sampler are handed in and stay the caller's. Inputs are checked before any launch: `ValueError`
    leaves the state unchanged. Logits returned by `decode` are overwritten by the next call when a graph is used."""

    def __init__(
        self,
        *,
        prefill: Method,
        decode: Method,
        sample: Callable[..., Tensor],
        arena: Arena,
        batch: int,
        max_seq_len: int,
        vocab_size: int,
        device: torch.device,
        cuda_graph: bool = False,
        copy_outputs: bool = False,
    ):
        self.arena, self.batch, self.max_seq_len, self.vocab_size = arena, batch, max_seq_len, vocab_size
        self.device, self.copy_outputs = device, copy_outputs
        self._prefill, self._decode, self._sample = prefill, decode, sample
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = 0
        self.closed = False
        self.graph = GraphedMethod(decode, (self._token, self._positions)) if cuda_graph else None
        self.reset()
        if self.graph is not None:
            self.graph.warm()
            self.graph.capture()
            self.reset()

    def reset(self) -> None:
        """Forgets everything: the next prompt starts at position 0 on zeroed state."""
        self._require_open()
        self.arena.reset()
        self.length = 0

    def prefill(self, tokens: Tensor, logit_positions: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64 continue what the session has seen; logit_positions [n] int64 within 0..T-1, by default
        the last. Returns logits [B, n, V]."""
        self._check(tokens, tokens.shape[-1] if tokens.ndim == 2 else 1)
        self.arena.check_addresses()
        last = tokens.shape[1] - 1
        if logit_positions is None:
            logit_positions = torch.tensor([last], device=self.device)
        elif logit_positions.dtype != torch.int64 or logit_positions.ndim != 1:
            found = f"{logit_positions.dtype} {list(logit_positions.shape)}"
            raise ValueError(f"logit_positions must be int64 [n], got {found}")
        elif logit_positions.device.type != self.device.type:
            raise ValueError(f"logit_positions are on {logit_positions.device}, the session is on {self.device}")
        elif logit_positions.numel() == 0 or int(logit_positions.min()) < 0 or int(logit_positions.max()) > last:
            raise ValueError(f"logit_positions must lie in 0..{last} and not be empty, got {logit_positions.tolist()}")
        positions = torch.full((self.batch,), self.length, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            logits = self._prefill(tokens, positions, logit_positions)
        self.length += tokens.shape[1]
        return logits

    def decode(self, token: Tensor) -> Tensor:
        """token [B, 1] int64, on the device. Returns logits [B, 1, V]."""
        self._check(token, 1, ids=False)
        if token.shape[1] != 1:
            raise ValueError(f"decode takes one token per row, [{self.batch}, 1], got {list(token.shape)}")
        self.arena.check_identity()
        self._token.copy_(token)
        self._positions.fill_(self.length)
        with torch.no_grad():
            run = self._decode if self.graph is None else self.graph.replay
            logits = run(self._token, self._positions)
        self.length += 1
        return logits

    def sample(self, logits: Tensor) -> Tensor:
        """Next token [B, 1] int64 on the device; with `copy_outputs` from a host copy of the logits."""
        if not self.copy_outputs:
            return self._sample(logits=logits)
        return self._sample(logits=logits.to("cpu")).to(self.device)

    def generate(
        self, tokens: Tensor, new_tokens: int, *, on_token: Callable[[list[int], int], bool | None] | None = None
    ):
        """Resets, prefills tokens [B, T], decodes. `on_token(ids of the batch, index)` is called as soon as the host has
        a token; True from it stops. Returns the new tokens as [B][<= new_tokens] ids."""
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens} must be at least 1")
        if tokens.ndim == 2 and tokens.shape[1] + new_tokens > self.max_seq_len:
            raise ValueError(
                f"a prompt of {tokens.shape[1]} tokens plus new_tokens={new_tokens} exceeds max_seq_len={self.max_seq_len}"
            )
        self._check(tokens, 1, start=0)
        self.reset()
        token = self.sample(self.prefill(tokens))
        steps = []
        for index in range(new_tokens):
            ids = token[:, 0].tolist()
            steps.append(ids)
            if (on_token is not None and on_token(ids, index)) or index + 1 == new_tokens:
                break
            token = self.sample(self.decode(token))
        return [list(row) for row in zip(*steps, strict=True)]

    def close(self) -> None:
        """Frees the graph; the session cannot be used afterwards."""
        if self.graph is not None:
            self.graph.close()
        self.closed = True

    def _check(self, tokens: Tensor, count: int, *, start: int | None = None, ids: bool = True) -> None:
        self._require_open()
        start = self.length if start is None else start
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be int64 [{self.batch}, T >= 1], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.device.type != self.device.type:
            raise ValueError(f"tokens are on {tokens.device}, the session is on {self.device}")
        if start + count > self.max_seq_len:
            raise ValueError(
                f"{start} tokens in the session plus {count} exceed max_seq_len={self.max_seq_len}; "
                "reset the session or build one with a larger max_seq_len"
            )
        # A wrong id reads beyond the embedding (on a GPU: ends the process). Sampled tokens are right by construction.
        if ids and (int(tokens.min()) < 0 or int(tokens.max()) >= self.vocab_size):
            raise ValueError(
                f"token ids must lie in 0..{self.vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}"
            )

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("the session is closed")
