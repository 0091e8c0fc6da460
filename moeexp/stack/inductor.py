"""How Inductor is set for our methods, two things that it does more often than they need, how it tells apart tensors without
storage, and a slip of one version.

Measured on an H100 with torch 2.11, compiling the decode method of the 40-layer model (int4), 203 s in all: 150 s went into
the analysis of which arguments a Triton kernel writes, repeated for each of some 300 calls of a dozen kernels, three times
over; 38 s into trying the vector instructions of the CPU, which a method for a GPU does not use (as long again at each
first load of a package in a process).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest import mock

import torch
from moeexp_runner.binding import TensorSpec

# Of torch's functions that analyse a kernel: the name up to 2.12, and after.
ANALYSES = ("identify_mutated_tensors", "identify_accessed_tensors")
# Prefixes of environment variables that change what is compiled, unless they say only where something lies.
VARIABLES = ("TORCHINDUCTOR_", "TRITON_")
PLACES = ("_DIR", "_HOME", "_PATH")


def inductor_config(*, method: str, device: str) -> dict[str, Any]:
    """All compile-time switches of Inductor for a method ("decode", "cond", …), set here alone and recorded with every
    artifact; `device` "cpu" or "cuda"."""
    config: dict[str, Any] = {
        # Weights are bound at load time, so that methods share them and a package is small.
        "aot_inductor.package_constants_in_so": False,
        # The wrapper only launches kernels: optimising it costs minutes of g++ and gains nothing.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    if device == "cuda":
        config["cpp.vec_isa_ok"] = False
    else:
        # Kernels are written for so many threads, and keep partial results in arrays of that size. Left to Inductor it would be
        # this number all the same, or, where it equals the machine's CPUs, whatever the process that loads them happens to have.
        config["cpp.threads"] = torch.get_num_threads()
    if method == "cond":
        # torch 2.11 plans the reuse of a branch's buffers with the peaks of the graph around it, and then fails
        # ("End index 18 out of bounds").
        config["allow_buffer_reuse"] = False
    return config


def compiling() -> dict[str, str]:
    """The variables of this process that change what Inductor and Triton make."""
    names = sorted(name for name in os.environ if name.startswith(VARIABLES) and not name.endswith(PLACES))
    return {name: os.environ[name] for name in names}


@contextlib.contextmanager
def loading(device: str) -> Iterator[None]:
    """For loading packages: torch describes this machine then, to log what differs from where a package was made, for which it
    tries the CPU's instructions. We know already: by the cache's key, or by the artifact's manifest."""
    from torch._inductor import codecache, config

    described: Any = mock.patch.object(codecache, "get_device_information", lambda device: {}, create=True)
    with config.patch({"cpp.vec_isa_ok": False} if device == "cuda" else {}), described:
        yield


@contextlib.contextmanager
def telling_constants_apart() -> Iterator[None]:
    """Inductor knows a constant again by the address of its storage, which a tensor without storage has not."""
    from torch._inductor import graph

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        places = [(tensor.untyped_storage()._cdata, tensor.storage_offset()) for tensor in (one, other)]
        return places[0] == places[1] and TensorSpec.of(one) == TensorSpec.of(other)

    with mock.patch.object(graph, "is_same_tensor", same):
        yield


def remember_kernel_analyses() -> None:
    """From now on torch analyses a Triton kernel once per set of argument types and constants, in this process. Twice is
    as good as once."""
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._inductor import ir

    for name in ANALYSES:
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is None or hasattr(analyse, "remembered"):
            continue
        remembering = remembered(analyse)
        for module in (triton_kernel_wrap, ir):
            if getattr(module, name, None) is analyse:
                setattr(module, name, remembering)


def remembered(analyse: Callable[..., Any]) -> Callable[..., Any]:
    """`analyse(kernel, arguments, tensor descriptors)`, which generates the kernel's code for these arguments, of which it
    sees: the dtype of a tensor, the value of a number, and that a symbol is one."""
    known: dict[Hashable, Any] = {}

    @functools.wraps(analyse)
    def look_up(kernel: Any, arguments: dict[str, Any], tma_descriptor_metadata: Any, *more: Any, **named: Any) -> Any:
        key = None
        if not (tma_descriptor_metadata or more or named):
            key = (*_function(kernel), *((name, _kind(value)) for name, value in arguments.items()))
        if key is None or not _hashable(key):
            return analyse(kernel, arguments, tma_descriptor_metadata, *more, **named)
        if key not in known:
            known[key] = analyse(kernel, arguments, tma_descriptor_metadata)
        result = known[key]
        return list(result) if isinstance(result, list) else result

    look_up.remembered = known  # type: ignore[attr-defined]
    return look_up


def declare_arrays_once_per_writer() -> None:
    """From now on Inductor's C++ wrapper knows what it has declared by who wrote it, in this process. Twice is as good as
    once. Up to torch 2.11 it goes by `id()` of a bound method, which is soon another's: a branch of torch.cond then names an
    array that only another scope declares, and does not compile, once in a while."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    declare = CppWrapperCpu.codegen_int_array_var
    if "__self__" not in declare.__code__.co_consts and not hasattr(declare, "__wrapped__"):
        CppWrapperCpu.codegen_int_array_var = by_writer(declare)  # type: ignore[method-assign]


def by_writer(declare: Callable[..., str]) -> Callable[..., str]:
    """`declare(wrapper, int_array, writeline, known_statically, graph)`, to which one method of one object is one, and which
    keeps alive what it tells apart by `id()`."""

    @functools.wraps(declare)
    def kept(self: Any, int_array: str, writeline: Callable, known_statically: bool = False, graph: Any = None) -> str:
        known = self.__dict__.setdefault("_kept_writers", {})
        function, owner = getattr(writeline, "__func__", writeline), getattr(writeline, "__self__", None)
        known.setdefault(id(graph), graph)
        return declare(self, int_array, known.setdefault((id(function), id(owner)), writeline), known_statically, graph)

    return kept


def _function(kernel: Any) -> tuple[Hashable, ...]:
    """torch wraps the kernel of each launch that says `num_warps=…` in an autotuner of its own, with one configuration."""
    if not hasattr(kernel, "configs"):
        return (kernel,)
    return kernel.fn, *(tuple(sorted(config.kwargs.items())) for config in kernel.configs[:1])


def _kind(value: Any) -> Hashable:
    import sympy
    from torch._inductor.ir import IRNode

    if isinstance(value, torch.Tensor | IRNode):
        return "tensor", str(value.dtype)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return ("symbol",)
    return type(value).__name__, value


def _hashable(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
