"""Loads AOTInductor packages and binds weights and state into them.

The loader itself checks next to nothing: a wrong shape, dtype or stride is accepted, missing state only warns, and a run
before binding is a segfault. So everything is compared here, and either all is bound or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """What a compiled method expects of one tensor; `dtype` as in `str(torch.dtype)`."""

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), str(tensor.dtype), tuple(tensor.stride()))

    @staticmethod
    def from_json(data: dict[str, Any]) -> TensorSpec:
        return TensorSpec(tuple(data["shape"]), data["dtype"], tuple(data["stride"]))


class CompiledMethod:
    """One AOTInductor package, callable once `bind` has succeeded. Tensors bound are shared, never copied."""

    def __init__(self, package: Path, constants: dict[str, TensorSpec], *, device: torch.device):
        from torch._inductor import aoti_load_package

        self.constants, self.device = constants, device
        # The default runner keeps a pool of threads and streams, which CUDA-graph capture refuses.
        self._runner: Any = aoti_load_package(str(package), run_single_threaded=True)
        self.bound: dict[str, Tensor] = {}
        in_package = set(self._runner.get_constant_fqns())
        if in_package != set(constants):
            raise RuntimeError(
                f"{package} and its manifest disagree on constants: {_difference(in_package, set(constants))}; "
                "delete the artifact and compile again"
            )

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Binds `tensors` by name (a superset is an error too). `ValueError` with every mismatch; nothing bound then."""
        problems = list(mismatches(self.constants, tensors, device=self.device))
        if problems:
            raise ValueError(
                f"constants do not fit the compiled method ({len(problems)} mismatches), nothing bound: " + "; ".join(problems)
            )
        self._runner.load_constants(dict(tensors), check_full_update=True, user_managed=True)
        self.bound = dict(tensors)  # another object each time, by which a graph knows what it was captured with

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.bound:
            raise RuntimeError("the method has no constants bound; call bind() first")
        return self._runner(*inputs)

    def close(self) -> None:
        self._runner, self.bound = None, {}


def package_in(method: Any) -> CompiledMethod | None:
    """The package that a session's method runs: itself, or what an adapter around it holds as its `method`."""
    while method is not None and not isinstance(method, CompiledMethod):
        method = getattr(method, "method", None)
    return method


def mismatches(expected: dict[str, TensorSpec], tensors: dict[str, Tensor], *, device: torch.device):
    """One line per constant that is missing, unexpected, or of the wrong shape, dtype, stride or device."""
    for name in sorted(set(expected) - set(tensors)):
        yield f"{name} is missing"
    for name in sorted(set(tensors) - set(expected)):
        yield f"{name} is not a constant of this method"
    for name in sorted(set(expected) & set(tensors)):
        spec, tensor = expected[name], tensors[name]
        found = TensorSpec.of(tensor)
        for field in ("shape", "dtype", "stride"):
            if getattr(found, field) != getattr(spec, field):
                yield f"{name} has {field} {getattr(found, field)}, expected {getattr(spec, field)}"
        if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index):
            yield f"{name} is on {tensor.device}, expected {device}"


def assert_shared(methods: dict[str, CompiledMethod]) -> None:
    """Our own bug if two methods hold different tensors under one name: they would not see each other's state."""
    seen: dict[str, tuple[str, int]] = {}
    for method, compiled in methods.items():
        for name, tensor in compiled.bound.items():
            owner, address = seen.setdefault(name, (method, tensor.data_ptr()))
            assert address == tensor.data_ptr(), f"{name} differs between {owner} and {method}"


def _difference(left: set[str], right: set[str]) -> str:
    return f"only in the package: {sorted(left - right)[:5]}, only in the manifest: {sorted(right - left)[:5]}"
