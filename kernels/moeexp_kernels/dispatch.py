"""Ops that choose between the decode and the prefill implementation when they run, from the number of tokens they get.

They serve a single method for any T: in a traced graph T is a symbol, and a choice made while tracing would hold for every
T. So they are opaque to export and call back into Python, which costs host time on every call (the record lists them);
inside a CUDA graph, which has one T, they cost nothing. The implementations are given by name, `decode` for T = 1.

Shapes, mutation and errors are those of the implementations: `gated_delta.py`, `attention.py`, `moe.py`, `linear.py`.
`valid_len` goes to prefill implementations alone: one token always counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moeexp_kernels.ops.attention_reference import reference_sdpa_prefill
from moeexp_kernels.ops.gated_delta_reference import reference_gdn_prefill
from moeexp_kernels.ops.moe_reference import reference_moe_prefill
from moeexp_kernels.registry import implementation


def ops(names: dict[str, str]) -> dict[str, Callable]:
    """The ops of a single method, for the implementations that `names` (op -> name) chooses. A linear layer needs no second
    name: it chooses between its own kernels from the rows that it sees, which here is their number and no symbol."""
    chosen = {
        f"{kind}_single": partial(op, decode=names[f"{kind}_decode"], prefill=names[f"{kind}_prefill"])
        for kind, op in {"gdn": gdn, "sdpa": sdpa, "moe": moe}.items()
    }
    return {"linear": partial(dispatch_linear, name=names["linear"]), **chosen}


def _choosing(kind: str, tokens_of: str, like: CustomOpDef) -> CustomOpDef:
    """`moeexp::dispatch_<kind>`: the arguments, mutation and shapes of `like`, which is a prefill implementation, and two
    names. T is the second dimension of the argument `tokens_of`."""
    schema = like._opoverload._schema
    inputs, output = str(schema).partition("(")[2].rpartition(") -> ")[::2]
    names = [argument.name for argument in schema.arguments]
    mutated = tuple(argument.name for argument in schema.arguments if argument.is_write)

    def run(*arguments, decode: str, prefill: str) -> Tensor:
        given = dict(zip(names, arguments, strict=False))
        many = given[tokens_of].shape[1] > 1
        if given.get("valid_len") is None or not many:
            given.pop("valid_len", None)
        return implementation(f"{kind}_{'prefill' if many else 'decode'}", prefill if many else decode)(**given)

    made = torch.library.custom_op(
        f"moeexp::dispatch_{kind}", run, mutates_args=mutated, schema=f"({inputs}, *, str decode, str prefill) -> {output}"
    )
    made.register_fake(lambda *arguments, decode, prefill: like(*arguments))
    return made


gdn = _choosing("gdn", "proj", reference_gdn_prefill)
sdpa = _choosing("sdpa", "q", reference_sdpa_prefill)
moe = _choosing("moe", "x", reference_moe_prefill)


@torch.library.custom_op("moeexp::dispatch_linear", mutates_args=())
def dispatch_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    name: str,
) -> Tensor:
    """A linear layer that sees how many rows it has: residual + norm(x) @ weight.T, [..., N]."""
    return implementation("linear", name)(x=x, weight=weight, scales=scales, norm_weight=norm_weight, eps=eps, residual=residual)


@dispatch_linear.register_fake
def _(x, weight, scales, norm_weight, eps, residual, name):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
