"""What a kernel takes: few arguments, and tuples whose places have names of their own."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import moeexp_kernels

SOURCES = sorted(Path(moeexp_kernels.__path__[0]).rglob("*.py"))
MOST = 20
# Strides of three tensors; the scratch between the prefill's kernels.
MORE = {"_attend_kernel": 21, "_scan_kernel": 23}


def test_a_kernel_takes_few_arguments():
    counts = {
        node.name: len(node.args.args) + len(node.args.kwonlyargs)
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert len(counts) > 30
    assert {name: count for name, count in counts.items() if count > MOST} == MORE


def test_constants_of_kernels_have_names_of_their_own():
    """Inductor writes those that the kernels of a method name into one file."""
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "tl.constexpr":
                places[ast.unparse(node.target)].append(path.name)
    assert len(places) > 20
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
