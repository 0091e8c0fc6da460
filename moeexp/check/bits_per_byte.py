"""Bits per byte of held-out text, through the methods that are timed."""

from __future__ import annotations

import math
from typing import Any

import torch
from moeexp_runner.session import Session
from torch import Tensor

from moeexp.config.schema import Config
from moeexp.config.sources import heldout_file, heldout_text
from moeexp.model.prompt import Text
from moeexp.record.phases import Phases
from moeexp.record.record import Record

# Non-overlapping windows, each from reset state; the first token of a window has no context and is not scored.
WINDOW = 1024
# Logits held at once: the prefill of a window is repeated for further slices of its positions.
SLICE_ELEMENTS = 1 << 28


def record_quality(cfg: Config, session: Session, text: Text, record: Record, phases: Phases) -> None:
    """Bits per byte of a model with weights of its own on held-out text, into the record, unless its check failed."""
    heldout = heldout_file(cfg.model)
    if not cfg.eval_bytes or heldout is None or cfg.model.weights == "random":
        return
    if text.encode is None:
        record.note("no bits per byte: the snapshot brings no tokenizer, so held-out text has no tokens")
        return
    if text.measure is None:
        record.note("no bits per byte: the snapshot's tokenizer does not tell which characters a token stands for")
        return
    if (record.data["check"] or {}).get("passed") is False:
        return
    piece = heldout_text(heldout, cfg.eval_bytes)
    with phases("bits per byte"):
        quality: dict[str, Any] = bits_per_byte(session, *text.measure(piece))
    quality |= {"file": heldout.name, "eval_bytes": len(piece.encode())}
    record.set(bits_per_byte=quality["bits_per_byte"], evaluation=quality)


def bits_per_byte(session: Session, tokens: list[int], sizes: list[int]) -> dict[str, float | int]:
    """tokens of the text in order; sizes: how many of its bytes each stands for. Returns bits_per_byte, scored bytes, windows.

    Rows of a batch take consecutive windows; the last batch may repeat a window, which is not scored twice."""
    width = min(WINDOW, session.max_seq_len)
    starts = [i for i in range(0, len(tokens), width) if i + 1 < len(tokens)]
    scored = sum(sum(sizes[i + 1 : i + width]) for i in starts)
    if not scored:
        raise ValueError(f"{len(tokens)} tokens of held-out text are too few to score: raise eval_bytes, or set it to 0")
    nats = 0.0
    for rows in _batches([tokens[i : i + width] for i in starts], session.batch):
        padded = rows + [rows[-1]] * (session.batch - len(rows))
        losses = window_losses(session, torch.tensor(padded, device=session.device))
        nats += float(losses[: len(rows)].double().sum())
    return {
        "bits_per_byte": nats / math.log(2) / scored,
        "scored_bytes": scored,
        "windows": len(starts),
        "window": width,
    }


def window_losses(session: Session, window: Tensor) -> Tensor:
    """Negative log-likelihood in nats of tokens 1.. of window [B, T] int64: [B, T-1] float32."""
    fed, losses = window[:, :-1].contiguous(), []
    for positions in position_slices(session, fed.shape[1]):
        session.reset()
        logits = session.prefill(fed, positions).float()
        target = window[:, 1:].index_select(1, positions)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
        losses[-1] = losses[-1].view(target.shape)
    return torch.cat(losses, dim=1)


def position_slices(session: Session, count: int) -> list[Tensor]:
    """Positions 0..count-1 in slices whose logits stay small."""
    step = max(1, SLICE_ELEMENTS // (session.batch * session.vocab_size))
    return list(torch.arange(count, device=session.device).split(step))


def _batches(windows: list[list[int]], batch: int) -> list[list[list[int]]]:
    """Groups of at most `batch` windows of one length (only the text's last window may be shorter)."""
    full = [window for window in windows if len(window) == len(windows[0])]
    short = windows[len(full) :]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    return groups + ([short] if short else [])
