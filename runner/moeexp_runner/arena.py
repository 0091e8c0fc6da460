"""Every state tensor of a run, allocated once; addresses never change."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor


class Arena:
    """`tensors` maps buffer name -> tensor. Contents are undefined until the first `reset()`."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], *, device: torch.device | str):
        self.tensors: dict[str, Tensor] = {
            name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self._allocated = list(self.tensors.values())
        self._addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}

    def call(self, method: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Runs a method that mutates these tensors in place. Returns its logits."""
        return method(*inputs)

    def reset(self) -> None:
        """Overwrites all state with zeros (a multiplication would keep NaN)."""
        self.check_addresses()
        for tensor in self.tensors.values():
            tensor.zero_()

    def check_addresses(self) -> None:
        """`RuntimeError` if a state tensor was replaced: compiled methods and graphs hold the old address."""
        moved = [name for name, tensor in self.tensors.items() if tensor.data_ptr() != self._addresses[name]]
        if moved:
            raise RuntimeError(f"state tensors were re-allocated after binding: {', '.join(moved)}; build a new session")

    def check_identity(self) -> None:
        """The part of `check_addresses` that costs little enough for every decode step."""
        if not all(map(is_, self.tensors.values(), self._allocated)):
            self.check_addresses()

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all state tensors."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
