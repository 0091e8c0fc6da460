"""One model being decoded: its methods over one set of weights and one set of state tensors.

Shape letters: B batch, T tokens of a prompt, n positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moeexp_runner import inputs, token_by_token
from moeexp_runner.loop import Loop, OnToken
from moeexp_runner.pieces import piece_sizes
from moeexp_runner.prefill_graphs import PrefillGraphs
from moeexp_runner.sampler import Sampler
from moeexp_runner.step_graph import State, StepGraph
from moeexp_runner.streams import MethodStream


class Session:
    """Methods, state and sampler are handed in and stay the caller's. Inputs are checked before any launch: `ValueError`
    leaves the state unchanged. Logits of a graph (`decode`, and `prefill` with `cuda_graph="all"`) hold until its next call.

    prefill     (tokens, positions, logit_positions) -> logits; None: prompts go through `decode`, token by token
    decode      (token, positions) -> logits
    verify      (tokens [B, verify_tokens], positions) -> logits of them all: a step of several tokens of each sequence, or None
    arena       an `Arena`, or an `ExplicitState`: then both methods take and return the state tensors as well
    cuda_graph  False, "decode" (or True), "loop" (sampling and feedback inside), "all" (and prefill, at given lengths)
    padded      prefill has one more input, valid_len [B]: how many of its tokens count
    prefill_chunk   tokens of a prompt that one call of prefill takes at most, see `piece_sizes`; 0: all
    ahead       steps that "loop" runs beyond the token that the host has read
    pdl         makes edges of a captured decode step programmatic, as in `GraphedMethod`
    """

    def __init__(
        self,
        *,
        prefill: Callable[..., Tensor] | None,
        decode: Callable[..., Tensor],
        verify: Callable[..., Tensor] | None = None,
        verify_tokens: int = 0,
        sample: Sampler,
        arena: State,
        batch: int,
        max_seq_len: int,
        vocab_size: int,
        device: torch.device,
        cuda_graph: bool | str = False,
        copy_outputs: bool = False,
        shared_stream: bool = True,
        padded: bool = False,
        prefill_graph_lengths: Sequence[int] = (),
        prefill_chunk: int = 0,
        ahead: int = 8,
        pdl: Callable[[int], int] | None = None,
    ):
        assert not (copy_outputs and cuda_graph in ("loop", "all")), "sampling inside a graph reads no host copy"
        self.arena, self.batch, self.max_seq_len, self.vocab_size = arena, batch, max_seq_len, vocab_size
        self.limits = inputs.Limits(batch, max_seq_len, vocab_size, device)
        self.device, self.copy_outputs, self.padded, self.prefill_chunk = device, copy_outputs, padded, prefill_chunk
        self._prefill, self._decode, self._verify, self._sample = prefill, decode, verify, sample
        self._on_prefill, self._on_decode = (MethodStream(device, own=not shared_stream) for _ in range(2))
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch, verify_tokens, dtype=torch.int64, device=device)
        self.length = 0
        self.overrun = 0  # steps that ran beyond the last token that was wanted; the state has seen them
        self.closed = self._eager = False
        self.graph: StepGraph | None = None
        self.loop: Loop | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self.verify_graph: StepGraph | None = None
        if cuda_graph in (True, "decode"):
            self.graph = StepGraph(decode, (self._token, self._positions), arena, pdl=pdl)
        elif cuda_graph:
            self.loop = Loop(
                decode=decode, sample=sample, state=arena, token=self._token, positions=self._positions,
                max_seq_len=max_seq_len, ahead=ahead, pdl=pdl,
            )  # fmt: skip
        if cuda_graph == "all" and prefill is not None:
            self.prefill_graphs = PrefillGraphs(prefill, arena, lengths=prefill_graph_lengths, batch=batch, device=device)
        if cuda_graph and verify is not None:
            self.verify_graph = StepGraph(verify, (self._tokens, self._positions), arena, swap=False, pdl=pdl)
        self.capture()

    def capture(self) -> None:
        """Captures every graph that is eager; forgets everything before and after, also where that fails."""
        self._forget()
        try:
            with torch.no_grad():
                for graph in self._graphs():
                    if graph.state == "eager":
                        graph.capture()
        finally:
            self._forget()

    def reset(self) -> None:
        """Forgets everything: the next prompt starts at position 0 on zeroed state, the sampler with its first draw. A graph
        that is eager, after a rebinding or a failed capture, is captured here: a session runs as asked or not at all."""
        self._forget()
        if any(graph.state == "eager" for graph in self._graphs()):
            self.capture()

    def _forget(self) -> None:
        self._require_open()
        self.arena.reset()
        self._sample.reset()
        self.length = self.overrun = 0

    def prefill(self, tokens: Tensor, logit_positions: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64 continue what the session has seen, in pieces of at most `prefill_chunk`; logit_positions [n] int64
        within 0..T-1, by default the last. Returns logits [B, n, V], and no piece makes others."""
        self._require_ready()
        inputs.check_tokens(self.limits, tokens, tokens.shape[-1] if tokens.ndim == 2 else 1, start=self.length)
        self.arena.check_addresses()
        inputs.check_logit_positions(self.limits, logit_positions, tokens.shape[1])
        with torch.no_grad():
            if self._prefill is None:
                return token_by_token.feed(self.decode, tokens, logit_positions)
            with self._on_prefill():
                return self._prefill_pieces(tokens, logit_positions)

    def decode(self, token: Tensor) -> Tensor:
        """token [B, 1] int64, on the device. Returns logits [B, 1, V]."""
        self._require_ready()
        inputs.check_tokens(self.limits, token, 1, start=self.length, ids=False)
        if token.shape[1] != 1:
            raise ValueError(f"decode takes one token per row, [{self.batch}, 1], got {list(token.shape)}")
        return self._step(self._decode, self.graph, self._token, token)

    def verify(self, tokens: Tensor) -> Tensor:
        """tokens [B, verify_tokens] int64, on the device: a decode step of as many tokens of each sequence, of which the state
        has seen all afterwards. Returns logits [B, verify_tokens, V]."""
        self._require_ready()
        if self._verify is None:
            raise RuntimeError("the session has no step of several tokens: it was made without a method `verify`")
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"verify takes {list(self._tokens.shape)} tokens, got {list(tokens.shape)}")
        inputs.check_tokens(self.limits, tokens, tokens.shape[1], start=self.length, ids=False)
        return self._step(self._verify, self.verify_graph, self._tokens, tokens)

    def _step(self, method: Callable[..., Tensor], graph: StepGraph | None, held: Tensor, tokens: Tensor) -> Tensor:
        """One call on checked tokens [B, T], by the graph where there is one. held [B, T]: where it reads them."""
        self.arena.check_identity()
        with torch.no_grad(), self._on_decode():
            held.copy_(tokens)
            self._positions.fill_(self.length)
            if graph is None or self._eager:
                logits = self.arena.call(method, held, self._positions)
            else:
                logits = graph.replay(held, self._positions)
        self.length += tokens.shape[1]
        return logits

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside it `decode` and `verify` run the methods themselves; what is captured stays, and goes on from the same state
        afterwards."""
        before, self._eager = self._eager, True
        try:
            yield
        finally:
            self._eager = before

    def sample(self, logits: Tensor) -> Tensor:
        """Next token [B, 1] int64 on the device; with `copy_outputs` from a host copy of the logits."""
        if not self.copy_outputs:
            return self._sample(logits=logits)
        return self._sample(logits=logits.to("cpu")).to(self.device)

    def generate(self, tokens: Tensor, new_tokens: int, *, on_token: OnToken | None = None) -> list[list[int]]:
        """Resets, prefills tokens [B, T], decodes. `on_token(ids of the batch, index)` is called as soon as the host has
        a token; True from it stops. Returns the new tokens as [B][<= new_tokens] ids."""
        inputs.check_generation(self.limits, tokens, new_tokens)
        self.reset()
        return self.decode_tokens(self.sample(self.prefill(tokens)), new_tokens, on_token=on_token)

    def decode_tokens(self, token: Tensor, new_tokens: int, *, on_token: OnToken | None = None) -> list[list[int]]:
        """The part of `generate` after the prompt: token [B, 1], chosen and not yet fed, is the first of the result."""
        self._require_ready()
        inputs.check_tokens(self.limits, token, new_tokens - 1, start=self.length, ids=False)
        if self.loop is not None:
            return self._decode_in_loop(self.loop, token, new_tokens, on_token)
        steps = []
        for index in range(new_tokens):
            steps.append(token[:, 0].tolist())
            if (on_token is not None and on_token(steps[-1], index)) or index + 1 == new_tokens:
                break
            token = self.sample(self.decode(token))
        return [list(row) for row in zip(*steps, strict=True)]

    def close(self) -> None:
        """Frees the graphs; the session cannot be used afterwards."""
        for graph in self._graphs():
            graph.close()
        self.closed = True

    def _graphs(self) -> list[StepGraph | Loop | PrefillGraphs]:
        return [graph for graph in (self.prefill_graphs, self.graph, self.loop, self.verify_graph) if graph is not None]

    def _prefill_pieces(self, tokens: Tensor, logit_positions: Tensor | None) -> Tensor:
        """Each piece from the position that the one before it reached. It makes logits of the wanted positions in it; where
        there are none of its last one, since a method makes some, and they are dropped."""
        first, found, pieces = self.length, None, [tokens]
        sizes = piece_sizes(tokens.shape[1], self.prefill_chunk)
        if len(sizes) > 1:  # copies: for views torch.compile compiles anew, and a package copies what is not aligned
            pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in tokens.split(sizes, 1)]
        for size, piece in zip(sizes, pieces, strict=True):
            if logit_positions is None or len(sizes) == 1:
                found = self._run_prefill(piece, logit_positions)
            else:
                here = logit_positions - (self.length - first)
                inside = ((here >= 0) & (here < size)).nonzero()[:, 0]
                logits = self._run_prefill(piece, here[inside] if len(inside) else here.new_tensor([size - 1]))
                if found is None:
                    found = logits.new_empty(self.batch, len(logit_positions), logits.shape[2])
                found[:, inside] = logits[:, : len(inside)]
            self.length += size
        assert found is not None, "no prompt is empty"
        return found

    def _run_prefill(self, tokens: Tensor, logit_positions: Tensor | None) -> Tensor:
        """A prompt that a graph holds is padded, whether the graph runs or, for other logits than the last, the method."""
        assert self._prefill is not None
        graphs, count = self.prefill_graphs, tokens.shape[1]
        if graphs is not None and graphs.fitting(count) is not None:
            loaded = graphs.load(tokens, self.length)
            if logit_positions is None:
                return graphs.replay(*loaded)
            return self.arena.call(self._prefill, *loaded[:2], logit_positions, *loaded[3:])
        if logit_positions is None:
            logit_positions = torch.tensor([count - 1], device=self.device)
        row = torch.full((self.batch,), self.length, dtype=torch.int64, device=self.device)
        valid_len = (torch.full_like(row, count),) if self.padded else ()
        return self.arena.call(self._prefill, tokens, row, logit_positions, *valid_len)

    def _decode_in_loop(self, loop: Loop, token: Tensor, new_tokens: int, on_token: OnToken | None):
        self.arena.check_identity()
        try:
            with torch.no_grad(), self._on_decode():
                steps = loop.run(token, self.length, new_tokens, on_token)
        finally:
            self.length += loop.fed
            self.overrun = loop.overrun
        return [list(row) for row in zip(*steps, strict=True)]

    def _require_ready(self) -> None:
        self._require_open()
        if self.overrun:
            raise RuntimeError(
                f"the state holds {self.overrun} tokens beyond the one that the last generation stopped at, and "
                "recurrent state cannot be rolled back: call reset() first"
            )

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("the session is closed")
