"""Text to tokens and back: raw bytes, a snapshot's own tokenizer, given ids, or seeded random ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.config.files import short
from moeexp.config.schema import Config
from moeexp.config.sources import weights_folder
from moeexp.config.validate import check_lengths
from moeexp.model.own_tokenizer import own_tokenizer
from moeexp.model.token_bytes import token_bytes


class Text:
    """`encode` and `decode` of one model; both None where it has no text.

    `own`: by the snapshot's tokenizer, which may know more tokens than the model.
    `measure`: tokens of a text, and how many of its bytes each stands for; None where a tokenizer does not tell."""

    def __init__(self, kind: str, folder: Path | None):
        self.own = kind == "auto"
        self.encode: Callable[[str], list[int]] | None = None
        self.decode: Callable[[list[int]], str] | None = None
        self.measure: Callable[[str], tuple[list[int], list[int]]] | None = None
        if kind == "bytes":
            self.encode = lambda text: list(text.encode())
            self.decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
            self.measure = lambda text: (list(text.encode()), [1] * len(text.encode()))
        elif kind == "auto":
            assert folder is not None, "validate refuses a model.tokenizer of its own for weights without a folder"
            tokenizer = own_tokenizer(folder)
            self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
            self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
            if tokenizer.is_fast:
                self.measure = lambda text: _measure(tokenizer, text)


def _measure(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    return ids, token_bytes(text, found["offset_mapping"], tokenizer.convert_ids_to_tokens(ids))


def text_of(cfg: Config) -> Text:
    """`cfg` is resolved."""
    return Text(cfg.model.tokenizer, weights_folder(cfg.model))


def check_tokens(ids: list[int], arch: Architecture, what: str) -> None:
    """`ValueError` for a token that the tokenizer knows and the model does not, and for none at all."""
    if not ids:
        raise ValueError(f"the model's tokenizer makes no token of {what}: give another text, or prompt_ids")
    token = max(ids)
    if token >= arch.vocab_size:
        raise ValueError(
            f"the model's tokenizer makes token {token} of {what}, and vocab_size={arch.vocab_size} in config.json allows 0 to "
            f"{arch.vocab_size - 1}: leave that out, or fetch tokenizer.json and config.json of one snapshot"
        )


def prompt_tokens(cfg: Config, arch: Architecture, text: Text) -> Tensor:
    """[batch, T] int64 on the CPU. A text or given ids are repeated in every row; `prompt_len` draws each row anew.

    `ValueError` if the prompt does not fit max_seq_len together with new_tokens."""
    if cfg.prompt_len is not None:
        generator = torch.Generator().manual_seed(cfg.seed)
        tokens = torch.randint(0, arch.vocab_size, (cfg.batch, cfg.prompt_len), generator=generator)
    else:
        if cfg.prompt is not None:
            assert text.encode is not None, "validate refuses a text prompt for a model without text"
            ids = text.encode(cfg.prompt)
            if text.own:
                check_tokens(ids, arch, f"prompt={short(cfg.prompt)}")
        else:
            ids = list(cfg.prompt_ids or ())
        tokens = torch.tensor(ids, dtype=torch.int64).expand(cfg.batch, -1).contiguous()
    check_lengths(prompt=tokens.shape[1], new_tokens=cfg.new_tokens, max_seq_len=cfg.max_seq_len)
    return tokens
