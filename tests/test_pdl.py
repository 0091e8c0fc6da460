"""Which kernels know PDL: the list and the sources must agree. And what a kernel may call."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from types import FunctionType, SimpleNamespace

import kernels_common  # noqa: F401  before triton
import moeexp_kernels
import moeexp_kernels.ops
import torch
import triton.language as tl
from moeexp_kernels.parts.pdl import EARLY, PDL_KERNELS, WITHIN_AN_OP, has_pdl

SOURCES = sorted(Path(moeexp_kernels.__path__[0]).rglob("*.py"))


def kernels() -> dict[str, str]:
    """Name -> text of every function under @triton.jit."""
    found = {}
    for path in SOURCES:
        for part in re.split(r"^@triton\.jit\n", path.read_text(), flags=re.M)[1:]:
            name = re.match(r"def (\w+)\(", part)
            assert name is not None, path
            found[name[1]] = re.split(r"^(?=[^\s)#])", part, flags=re.M)[1]
    return found


def named(kernel, found: dict) -> list[str]:
    """Names for which the functions that `kernel` calls, and theirs, stand for different things; `found`: what each is."""
    differing = []
    for name in kernel.fn.__code__.co_names:
        symbol = kernel.fn.__globals__.get(name)
        if not (hasattr(symbol, "fn") or isinstance(symbol, tl.constexpr)):
            continue
        if found.setdefault(name, symbol) is not symbol:
            differing.append(name)
        elif hasattr(symbol, "fn") and symbol.fn not in found:
            found[symbol.fn] = symbol
            differing += named(symbol, found)
    return differing


def test_a_name_is_one_thing_in_all_that_a_kernel_calls():
    """Inductor copies them into one scope by their names: of two helpers with one name the second would be the first."""
    modules = [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(moeexp_kernels.ops.__path__, "moeexp_kernels.ops.")
    ]
    jitted = {name: value for module in modules for name, value in vars(module).items() if hasattr(value, "fn")}
    assert set(PDL_KERNELS) <= set(jitted)
    assert {name: bad for name, kernel in jitted.items() if (bad := named(kernel, {}))} == {}

    def of(text: str, **seen: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(fn=FunctionType(compile(text, "a kernel", "eval"), seen))

    namesakes = of("first, second", first=of("load", load=of("1")), second=of("load", load=of("2")))
    assert named(namesakes, {}) == ["load"]


def test_the_list_names_the_kernels_that_wait_and_no_other():
    waiting = {name for name, text in kernels().items() if "= after_previous(" in text}
    assert waiting == set(PDL_KERNELS)


# Kernels whose programs do one of several things.
BRANCHES = {"_qk_norm_rope_kernel": 2, "gate_up_packed_kernel": 2, "gate_up_routed_kernel": 2, "logits_packed_kernel": 3}


def test_each_program_waits_exactly_once_and_uses_what_it_waited_for():
    for name in PDL_KERNELS:
        text, branches = kernels()[name], BRANCHES.get(name, 1)
        assert text.count("after_previous(") == text.count("ready = after_previous(PDL)") == branches, name
        assert text.count("ready") >= 3 * branches, name


def test_the_kernels_that_start_the_next_one_early_are_listed_with_whom_they_may_start():
    early = {name for name, text in kernels().items() if name in PDL_KERNELS and "start_next(" in text}
    assert early == set(EARLY)
    assert {later for laters in EARLY.values() for later in laters} <= set(PDL_KERNELS)


def test_pairs_within_an_op_are_kernels_that_wait():
    """Of two calls of an op the last kernel of the one and the first of the other are no such pair."""
    assert all({earlier, later} <= set(PDL_KERNELS) for earlier, later in WITHIN_AN_OP)
    assert [earlier for earlier, later in WITHIN_AN_OP if earlier == later] == ["_narrow_kernel"], "no op's first, no op's last"


def test_a_cpu_tensor_asks_no_gpu():
    assert has_pdl(torch.zeros(1)) is False
