"""State that goes into a method and comes out of it, instead of being mutated behind its back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moeexp_runner.arena import Arena


class ExplicitState:
    """The arena's counterpart under `state=explicit`. `method(*inputs, *state)` returns `(logits, *state)`; what comes out
    goes into the next call. `tensors` is the current set, in the arena's order; `front` is the arena's own set, where every
    prompt starts and which a graph may rely on. A method leaves the tensors that it was given as they are."""

    def __init__(self, arena: Arena):
        self._arena = arena
        self.tensors: dict[str, Tensor] = dict(arena.tensors)

    @property
    def front(self) -> dict[str, Tensor]:
        return self._arena.tensors

    def call(self, method: Callable[..., Any], *inputs: Tensor) -> Tensor:
        """Runs the method on the current state, which what comes out then is. Returns the logits."""
        logits, *new = method(*inputs, *self.tensors.values())
        self.adopt(new)
        return logits

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = dict(zip(self.tensors, tensors, strict=True))

    def to_front(self) -> None:
        """Copies the current set into `front`, for a graph that reads there."""
        for name, tensor in self.front.items():
            if tensor is not self.tensors[name]:
                tensor.copy_(self.tensors[name])
        self.tensors = dict(self.front)

    def reset(self) -> None:
        self._arena.reset()
        self.tensors = dict(self.front)

    def check_addresses(self) -> None:
        self._arena.check_addresses()

    def check_identity(self) -> None:
        self._arena.check_identity()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the current set."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def nbytes(self) -> int:
        """Of both sets: the one that goes in and the one that comes out."""
        return 2 * self._arena.nbytes()
