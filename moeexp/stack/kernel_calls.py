"""Two shortcuts where torch traces a call of a Triton kernel: a prefill method of 40 layers has 782 of them.

torch first makes such a call functional: it returns what the kernel would have written, as copies. Then, where nothing needs the
copies, it is made to write in place again. What a copy costs when only its shape matters, and what it costs to find out by
tracing that a call without copies is the call, was a third of the time from an exported program to Inductor's own work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def shorten() -> None:
    """From now on, in this process. Twice is as good as once."""
    from torch._inductor.fx_passes import post_grad

    for module, name, shortcut in (
        (triton_kernel_wrap, "clone_preserve_strides", of_shapes),
        (post_grad, "decompose_triton_kernel_wrapper_functional", written_in_place),
    ):
        function = getattr(module, name, None)  # what a torch lacks it may have no need of
        if function is not None and not hasattr(function, "shortened"):
            setattr(module, name, shortcut(function))


def of_shapes(clone: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`clone`, which torch composes of views of a tensor's whole storage; where neither values nor a trace of it are wanted one
    empty tensor is the same."""

    @functools.wraps(clone)
    def cloned(x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor) or get_proxy_mode() is not None or not _is_zero(x.storage_offset()):
            return clone(x)
        return x.new_empty_strided(x.size(), x.stride())

    cloned.shortened = True  # type: ignore[attr-defined]
    return cloned


def _is_zero(offset: int | torch.SymInt) -> bool:
    return isinstance(offset, int) and offset == 0


def written_in_place(decompose: Callable[[torch.fx.Graph], None]) -> Callable[[torch.fx.Graph], None]:
    """`decompose(graph)`, which makes kernels write in place again, with clones of what must not be written, after the pass that
    finds out what that is. Where that is nothing the call stays, under another name."""
    from torch._inductor import pattern_matcher

    transfer = getattr(pattern_matcher, "_transfer_meta", None)  # what torch itself copies from a call to what replaces it

    @functools.wraps(decompose)
    def decomposed(graph: torch.fx.Graph) -> None:
        functional, mutation = (
            getattr(torch.ops.higher_order, f"triton_kernel_wrapper_{kind}") for kind in ("functional", "mutation")
        )
        for node in graph.find_nodes(op="call_function", target=functional):
            if transfer is None or node.args or node.users or node.kwargs["tensors_to_clone"]:
                continue
            with graph.inserting_before(node):
                call = graph.call_function(mutation, kwargs=_without_clones(node.kwargs))
            transfer(call.meta, node)
            if "eager_input_vals" in node.meta:
                arguments, keywords = node.meta["eager_input_vals"]
                call.meta["eager_input_vals"] = arguments, _without_clones(keywords)
            graph.erase_node(node)
        decompose(graph)

    decomposed.shortened = True  # type: ignore[attr-defined]
    return decomposed


def _without_clones(keywords: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keywords.items() if key != "tensors_to_clone"}
