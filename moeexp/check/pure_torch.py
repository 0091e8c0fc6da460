"""Runs transformers' Qwen3.5-MoE code as a reference: its plain torch functions, in full float32 precision.

transformers binds four functions of the delta net (two convolutions, two delta rules) to flash-linear-attention,
causal_conv1d or a hub kernel where those are installed. A reference must not depend on what is installed, so the
undecorated torch functions, which the decorators keep, are put in their place for the time of a run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

KERNEL_FUNCTIONS = (
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)


def modeling() -> ModuleType:
    """transformers' own module; imported on first use because it takes seconds."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    return modeling_qwen3_5_moe


def eager(config: Any) -> Any:
    """A copy of a transformers config that asks for its plain implementations, whatever the snapshot asks for: the name of an
    attention kernel there may be a repository, which transformers would load."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def unwrap(bound: object) -> object:
    """The innermost function of `bound`: through `functools.wraps`, and through the module into which the
    `kernels` package turns a decorated function (its class's `forward` closes over the function as `func`)."""
    while True:
        if inspect.isfunction(bound) and hasattr(bound, "__wrapped__"):
            bound = bound.__wrapped__
        elif isinstance(bound, nn.Module) and "func" in type(bound).forward.__code__.co_freevars:
            bound = inspect.getclosurevars(type(bound).forward).nonlocals["func"]
        else:
            return bound


def torch_functions() -> dict[str, Callable]:
    """Plain torch function by global name, for every function of transformers' module that is bound to something
    else and for `KERNEL_FUNCTIONS` in any case. `RuntimeError` where this transformers binds them in an unknown way."""
    source = modeling()
    functions: dict[str, Callable[..., Any]] = {}
    for name, bound in vars(source).items():
        if name in KERNEL_FUNCTIONS or isinstance(bound, nn.Module) or hasattr(bound, "__wrapped__"):
            inner = unwrap(bound)
            if inspect.isfunction(inner) and inner.__code__.co_filename == source.__file__:
                functions[name] = inner
    missing = [name for name in KERNEL_FUNCTIONS if name not in functions]
    if missing:
        import transformers

        raise RuntimeError(
            f"transformers {transformers.__version__} keeps no plain torch function behind {', '.join(missing)}: "
            "use a tested version (5.17 to 5.23)"
        )
    return functions


@contextmanager
def pure_torch() -> Iterator[None]:
    """Within it, transformers' module resolves every kernel-backed function to its plain torch one."""
    source, functions = modeling(), torch_functions()
    before = {name: getattr(source, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(source, name, function)
        yield
    finally:
        for name, bound in before.items():
            setattr(source, name, bound)


def assert_pure_torch(module: nn.Module) -> None:
    """Every submodule must be torch's or transformers' own class with its class's own `forward`, and the
    module-level functions must be the plain ones (so: call it inside `pure_torch()`)."""
    source = modeling()
    for name, sub in module.named_modules():
        kind = type(sub)
        assert kind.__module__.split(".")[0] in ("torch", "transformers"), f"{name} is of {kind.__module__}"
        assert "forward" not in vars(sub), f"{name}.forward was replaced"
    for name in KERNEL_FUNCTIONS:
        bound = getattr(source, name)
        assert inspect.isfunction(bound) and not hasattr(bound, "__wrapped__"), f"{name} is not the torch function"
        assert bound.__code__.co_filename == source.__file__, f"{name} is defined in {bound.__code__.co_filename}"


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, float32 matmuls and convolutions are float32 (no TF32, no bf16 splits), cuDNN's too, which
    use TF32 unless told otherwise. Restores what was set before.

    torch has a legacy and a per-operator API for this, and reading the legacy one raises when the two disagree:
    both are set, so that code inside may read either.
    """
    backends: Any = torch.backends  # whose stubs lack the switches of each operator
    cuda = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    switches = (*cuda, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    legacy_matmul = _legacy(torch.get_float32_matmul_precision)
    legacy_cudnn = _legacy(lambda: backends.cudnn.allow_tf32)
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if legacy_matmul is not None:
            torch.set_float32_matmul_precision(legacy_matmul)
        if legacy_cudnn is not None:
            backends.cudnn.allow_tf32 = legacy_cudnn
        # Last, because each legacy setter overwrites the switches of its operators.
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _legacy(getter: Callable):
    """The legacy setting, or None where torch refuses to give one because the caller used the newer API."""
    try:
        return getter()
    except RuntimeError:
        return None
