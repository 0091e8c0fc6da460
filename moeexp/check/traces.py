"""What the check judges, run through a session: traces of whole generations, and a few steps twice, eagerly and by replay."""

from __future__ import annotations

import contextlib

import torch
from moeexp_runner.pieces import piece_sizes
from torch import Tensor

from moeexp.check.bits_per_byte import position_slices
from moeexp.check.check import Trace
from moeexp.check.tolerances import Part, make_part, measured
from moeexp.config.memory_need import on_host
from moeexp.record import free_memory
from moeexp.stack.factory import Stack

# A slice of logits on a GPU has at most one part in so many of the free memory: a prefill holds other tensors beside it.
SHARE = 4
# Kernels may count a tensor's elements with 32 bits.
MOST_ELEMENTS = 2**31 - 1


@torch.no_grad()
def record_trace(
    stack: Stack, prompt: Tensor, new_tokens: int, *, forced: Tensor | None = None, together: int = 1, prompt_logits: int = 0
) -> Trace:  # fmt: skip
    """Decodes `new_tokens` from prompt [B, T] through the session, keeping the final state and every logit, or of the prompt
    those of its last `prompt_logits` positions. `forced`
    [B, >= new_tokens - 1] is fed instead of what the sampler chooses, and the prompt is not prefilled once more for its first
    choice; `together`: so many of its tokens by one step of the session's `verify`, and those that are left over by decode
    steps."""
    session, (batch, count) = stack.session, prompt.shape
    length = count + new_tokens - 1
    first = max(0, count - prompt_logits) if prompt_logits else 0
    vocab, dtype = session.vocab_size, stack.model.embed_tokens.weight.dtype
    where = "cpu" if on_host(batch * (length - first) * vocab * dtype.itemsize) else stack.device
    kept = torch.empty(batch, length - first, vocab, dtype=dtype, device=where)
    _keep_prompt(stack, prompt, kept, first)
    last = slice(count - 1 - first, count - first)
    fed, logits = [prompt], kept[:, last]
    if forced is None:
        # As a generation asks for them: of one position the head is another kernel, and at a tie it may choose another token.
        session.reset()
        logits = session.prefill(prompt).clone()
        kept[:, last] = logits
    while session.length < length:
        step = session.length - count
        if together > 1 and session.length + together <= length:
            assert forced is not None, "tokens that are fed together are known before"
            tokens = forced[:, step : step + together].contiguous()
            logits = session.verify(tokens).clone()
        else:
            tokens = session.sample(logits) if forced is None else forced[:, step : step + 1]
            logits = session.decode(tokens).clone()
        fed.append(tokens)
        kept[:, count + step - first : session.length - first] = logits
    state = stack.arena.snapshot()
    ids = [state.pop(f"layers.{i}.expert_ids")[:, :length] for i in range(stack.arch.num_hidden_layers)]
    return Trace(
        token_ids=torch.cat(fed, dim=1),
        prompt_len=prompt.shape[1],
        logits=kept,
        expert_ids=torch.stack(ids).long(),
        states=state,
        next_token=session.sample(logits)[:, 0] if forced is None else None,
        first=first,
    )


def _keep_prompt(stack: Stack, prompt: Tensor, kept: Tensor, first: int) -> None:
    """Logits of the positions from `first` on of prompt [B, T] into kept [B, >= T - first, V], by as many prefills as there are
    slices of a piece: in each the session is given the prompt piece by piece, as it cuts it itself, and makes logits of one slice
    of each."""
    session = stack.session
    sizes = piece_sizes(prompt.shape[1], session.prefill_chunk)
    step = _positions_at_once(stack, max(sizes), kept.dtype)
    for index in range(-(-min(max(sizes), prompt.shape[1] - first) // step)):
        session.reset()
        for piece in prompt.split(sizes, dim=1):
            # A copy, as the session makes of its pieces: for views torch.compile compiles anew.
            tokens, before = piece.clone(memory_format=torch.contiguous_format), session.length
            starts = range(max(0, first - before), piece.shape[1], step)
            if not starts:  # none of its logits are kept
                session.prefill(tokens)
                continue
            start = starts[min(index, len(starts) - 1)]  # a shorter piece may have a slice less: its last one again
            stop = min(start + step, piece.shape[1])
            positions = torch.arange(start, stop, device=session.device)
            # The logits have no name here: they are gone before the next piece's are made.
            _copy_rows(kept[:, before + start - first : before + stop - first], session.prefill(tokens, positions))


def _copy_rows(kept: Tensor, logits: Tensor) -> None:
    """Both [B, n, V]. One sequence at a time: its slice of `kept` is contiguous, so that nothing lies between it and a GPU."""
    for into, row in zip(kept, logits, strict=True):
        into.copy_(row)


def _positions_at_once(stack: Stack, count: int, dtype: torch.dtype) -> int:
    """Of how many of a piece's `count` positions logits of `dtype` are made at a time: a slice of `position_slices`, and on a
    GPU more where they fit its free memory `SHARE` times."""
    session = stack.session
    least = len(position_slices(session, count)[0])
    free = free_memory.for_tensors() if stack.device.type == "cuda" else None
    if free is None:
        return least
    return max(least, min(free // SHARE // dtype.itemsize, MOST_ELEMENTS) // (session.batch * session.vocab_size))


@torch.no_grad()
def check_replay(stack: Stack, trace: Trace) -> Part:
    """The prompt and two decode steps, by the methods run eagerly and by graph replay: bitwise equal."""
    eager, eager_state = _prompt_and_steps(stack, trace, replay=False)
    replayed, replayed_state = _prompt_and_steps(stack, trace, replay=True)
    tolerances = [measured("replay.bitwise", _differing(eager[name], replayed[name]), name) for name in eager]
    for name, tensor in eager_state.items():
        differing = _differing(tensor, replayed_state[name])
        if differing:
            tolerances.append(measured("replay.bitwise", differing, name))
    return make_part("replay", tolerances, {"outputs": len(eager), "state_tensors": len(eager_state)})


def _prompt_and_steps(stack: Stack, trace: Trace, *, replay: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name, and the state at the end: of what is captured, or of the same calls made eagerly."""
    session, prompt = stack.session, trace.token_ids[:, : trace.prompt_len].contiguous()
    session.reset()
    last = torch.tensor([trace.prompt_len - 1], device=session.device)
    logits = session.prefill(prompt, None if replay else last).clone()
    outputs = {"logits of the prompt": logits}
    steps = range(min(2, session.max_seq_len - trace.prompt_len))
    token = session.sample(logits)
    if replay and session.loop is not None:
        session.loop.start(token, trace.prompt_len)
        for step in steps:
            outputs[f"logits of decode step {step}"] = session.loop.step().clone()
            outputs[f"token of decode step {step}"] = session.loop.token.clone()
        return outputs, stack.arena.snapshot()
    with contextlib.nullcontext() if replay else session.eager():
        for step in steps:
            outputs[f"logits of decode step {step}"] = logits = session.decode(token).clone()
            outputs[f"token of decode step {step}"] = token = session.sample(logits).clone()
    return outputs, stack.arena.snapshot()


def _differing(a: Tensor, b: Tensor) -> int:
    """Elements that are not the same bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.view(bits) != b.view(bits)).sum())
