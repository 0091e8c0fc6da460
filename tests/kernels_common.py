"""What every kernel test shares: where kernels run, how results are compared, and poison for memory nobody wrote.

Import this before anything that imports triton: without a GPU the kernels run in Triton's interpreter, and triton reads
that switch when its own module is first imported and again at each `@triton.jit`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from moeexp_kernels.parts.deviation import compare_rows
from tolerances import tolerance
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before tests/kernels_common.py, too late for its interpreter: import kernels_common "
            "first (tests/conftest.py is the place), or set TRITON_INTERPRET=1 for the whole run"
        )
    os.environ["TRITON_INTERPRET"] = "1"


def patch_the_language_once() -> None:
    """For a launch the interpreter puts functions of its own into `triton.language`, and searches it again for each call of a
    device function, which finds them in place: a quarter of the time of all kernel tests."""
    from triton.runtime import interpreter

    language, patch = interpreter.tl, getattr(interpreter, "_patch_lang", None)
    if patch is None:  # not Triton's public interface: without it the tests take longer
        return

    @functools.cache
    def seen_by(fn):
        return [module for module in (language, language.core) if any(value is module for value in fn.__globals__.values())]

    def once(fn):
        members = [member for module in seen_by(fn) for member in (module.load, module.tensor.__add__)]
        there = members and not any(map(language.core.is_builtin, members))
        return SimpleNamespace(restore=lambda: None) if there else patch(fn)

    interpreter._patch_lang = once


if DEVICE == "cpu":
    patch_the_language_once()

TOLERANCE = tolerance("one rounding")
SENTINEL = {torch.uint8: 0xA5, torch.int32: -987_654_321, torch.int64: -987_654_321}
GUARD = 64  # elements before and after a guarded tensor; keeps 16-byte alignment for every dtype


def generator(seed: int, device: str = DEVICE) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str = DEVICE) -> Tensor:
    """Normal values, drawn on the CPU so that every device sees the same ones."""
    return (torch.randn(*shape, generator=generator(seed, "cpu")) * scale).to(device=device, dtype=dtype)


def assert_close_ratio(
    actual: Tensor, reference: Tensor, tol: float, name: str = "output", worst_tol: float | None = None
) -> None:
    """Same shape, `actual` finite, RMSE ratio <= tol and worst position <= worst_tol (10 x tol unless told)."""
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, reference {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    bad = (~torch.isfinite(actual.double())).sum().item()
    assert bad == 0, f"{name}: {bad} of {actual.numel()} values are not finite"
    rows = compare_rows(actual, reference)
    ratio, worst = rows.ratio(), rows.row_ratios().max().item()
    worst_tol = 10 * tol if worst_tol is None else worst_tol
    assert ratio <= tol, f"{name}: RMSE ratio {ratio:.3e} > {tol:.1e} (worst position {worst:.3e})"
    assert worst <= worst_tol, f"{name}: worst position {worst:.3e} > {worst_tol:.1e} (RMSE ratio {ratio:.3e})"


def fill_poison(tensor: Tensor) -> Tensor:
    """Fills in place with NaN (floats), or with a value no test produces (integers)."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(SENTINEL.get(tensor.dtype, 1))


def poison_state(tensors: dict[str, Tensor], kinds: tuple[str, ...] = ("_cache", "expert_ids")) -> None:
    """Poison in the state tensors whose names end so: unless told, in those of which a session reads only what it wrote."""
    for name, tensor in tensors.items():
        if name.endswith(kinds):
            fill_poison(tensor)


def poison(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    """A tensor as hostile as uninitialised memory can be: NaN, or a sentinel for integers."""
    return fill_poison(torch.empty(*shape, dtype=dtype, device=device))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, `torch.empty` and `torch.empty_like` return poison, so that a kernel reading unwritten scratch shows."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *args, **kwargs: fill_poison(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: fill_poison(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


@contextmanager
def guarded_empty() -> Iterator[None]:
    """As `poisoned_empty`, and every such tensor lies between bands of poison that must be whole at the end: what an op
    allocates, its result included, it may write only inside."""
    empty, guards = torch.empty, []

    def guarded(*args, **kwargs) -> Tensor:
        guards.append(Guarded(fill_poison(empty(*args, **kwargs)), empty))
        return guards[-1].tensor

    def guarded_like(tensor: Tensor, **kwargs) -> Tensor:
        return guarded(tensor.shape, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})

    empty_like = torch.empty_like
    torch.empty, torch.empty_like = guarded, guarded_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
    assert guards, "the op allocated nothing with torch.empty: this guards nothing"
    for index, guard in enumerate(guards):
        guard.check(f"allocation {index} of shape {tuple(guard.tensor.shape)}")


class Guarded:
    """A contiguous copy of `tensor` with a band of poison on either side; `check()` fails if a band was written.

    `.tensor` is what the op gets. Reads outside it bring NaN, writes outside it are seen."""

    def __init__(self, tensor: Tensor, empty: Callable[..., Tensor] = torch.empty):
        self._buffer = fill_poison(empty(tensor.numel() + 2 * GUARD, dtype=tensor.dtype, device=tensor.device))
        self.tensor = self._buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)
        self._before = self._bands()

    def _bands(self) -> Tensor:
        bands = torch.cat([self._buffer[:GUARD], self._buffer[-GUARD:]])
        return bands.view(torch.uint8).clone()  # bytes: NaN compares unequal to itself

    def check(self, name: str = "tensor") -> None:
        assert torch.equal(self._bands(), self._before), f"{name}: memory outside the tensor was written"


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, f"{name}: shape or dtype differs"
    same = torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert same, f"{name}: not bitwise equal"


def assert_bitwise_stable(call: Callable[[], Tensor | tuple[Tensor, ...]], runs: int, name: str = "output") -> None:
    """`call()` sets up its own fresh inputs; all `runs` results must agree to the bit."""
    first = call()
    first = first if isinstance(first, tuple) else (first,)
    for run in range(1, runs):
        again = call()
        again = again if isinstance(again, tuple) else (again,)
        for i, (x, y) in enumerate(zip(again, first, strict=True)):
            assert_bitwise_equal(x, y, f"{name}[{i}], run {run}")


def expect_value_error(call: Callable[[], object], *words: str) -> None:
    """`call()` must raise ValueError whose one line names every word."""
    try:
        call()
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in the message: {error}"
        return
    raise AssertionError(f"no ValueError naming {words}")
