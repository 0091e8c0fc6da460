"""Edges of a captured graph, over a driver that keeps them in Python."""

import ctypes

import kernels_common  # noqa: F401  before triton
import pytest
from moeexp_kernels.parts import graph_edges
from moeexp_kernels.parts.pdl import WITHIN_AN_OP

KERNEL, MEMCPY, ALLOCATION = 0, 1, 10


class Driver:
    """`nodes`: (kind, kernel name) by handle; `edges`: [source, target, type]."""

    def __init__(self, nodes, edges):
        self.nodes, self.edges = nodes, edges

    def cuGraphGetEdges_v2(self, graph, sources, targets, data, count):
        count._obj.value = len(self.edges)
        for i, (source, target, kind) in enumerate(self.edges if sources else ()):
            sources[i], targets[i] = source, target
            data[i].type = kind
        return 0

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.nodes[node.value][0]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node, params):
        params._obj.func = node.value
        return 0

    def cuFuncGetName(self, name, function):
        name._obj.value = self.nodes[function.value][1].encode()
        return 0

    def cuGraphRemoveDependencies_v2(self, graph, source, target, data, count):
        self.edges.remove([source[0], target[0], data[0].type])
        return 0

    def cuGraphAddDependencies_v2(self, graph, source, target, data, count):
        assert (data[0].from_port, data[0].type) == (1, 1)
        self.edges.append([source[0], target[0], data[0].type])
        return 0


CHAIN = ["gemv_kernel", "_decode_kernel", "_finish_kernel", "other_kernel", "gate_up_kernel", "down_kernel"]


def chain_of(names, *, last=None):
    nodes = {handle: (KERNEL, name) for handle, name in enumerate(names, start=1)}
    if last is not None:
        nodes[len(nodes) + 1] = (last, "")
    return Driver(nodes, [[handle, handle + 1, 0] for handle in range(1, len(nodes))])


def start(monkeypatch, driver, **options):
    monkeypatch.setattr(graph_edges.ctypes, "CDLL", lambda name: driver)
    changed = graph_edges.add_pdl_edges(7, **options)
    return changed, sorted((source, target) for source, target, kind in driver.edges if kind == 1)


def test_edges_between_kernels_that_wait_become_programmatic(monkeypatch):
    driver = chain_of(CHAIN, last=MEMCPY)
    assert start(monkeypatch, driver) == (3, [(1, 2), (2, 3), (5, 6)])
    assert len(driver.edges) == len(CHAIN), "no edge is lost"
    assert start(monkeypatch, driver) == (0, [(1, 2), (2, 3), (5, 6)]), "once"


def test_only_the_pairs_that_are_asked_for(monkeypatch):
    pairs = [("_decode_kernel", "_finish_kernel"), ("other_kernel", "gate_up_kernel")]
    assert start(monkeypatch, chain_of(CHAIN), pairs=pairs) == (1, [(2, 3)])


def test_behind_a_kernel_that_starts_the_next_early_only_the_kernels_made_for_it(monkeypatch):
    driver = chain_of(
        [
            "gemv_kernel",
            "_finish_kernel",
            "gemv_kernel",
            "choose_experts_kernel",
            "down_kernel",
            "_merge_kernel",
            "_finish_kernel",
        ]
    )
    assert start(monkeypatch, driver) == (4, [(1, 2), (2, 3), (3, 4), (5, 6)]), "not 4 to 5, nor 6 to 7"


@pytest.mark.parametrize(
    "sampler",
    [
        ["_chunk_best_kernel", "_best_kernel"],
        ["_narrow_kernel"] * 2 + ["_chunk_best_kernel", "_best_kernel"],
        ["_chunk_best_kernel"] + ["_narrow_kernel"] * 2 + ["_chunk_best_kernel", "_best_kernel"],
    ],
    ids=["greedy", "top_k", "top_p"],
)
@pytest.mark.parametrize("head", ["gemv_kernel", "linear_tile_kernel", "gemm_kernel"])
def test_every_kernel_of_a_sampler_may_start_early(monkeypatch, head, sampler):
    """The first behind a head that waits, too; of many rows it does not."""
    first = 0 if head == "gemm_kernel" else 1
    found = [(handle, handle + 1) for handle in range(2 - first, len(sampler) + 1)]
    assert start(monkeypatch, chain_of([head, *sampler])) == (len(sampler) - 1 + first, found)
    assert start(monkeypatch, chain_of([head, *sampler]), pairs=WITHIN_AN_OP)[0] == len(sampler) - 1


def test_a_graph_that_allocates_is_left_as_it_is(monkeypatch):
    assert start(monkeypatch, chain_of(CHAIN, last=ALLOCATION)) == (0, [])


def test_an_empty_graph_and_a_driver_that_fails(monkeypatch):
    assert start(monkeypatch, Driver({}, [])) == (0, [])
    driver = chain_of(CHAIN)
    monkeypatch.setattr(Driver, "cuGraphAddDependencies_v2", lambda self, *arguments: 801)
    with pytest.raises(RuntimeError, match="cuGraphAddDependencies_v2 failed with CUDA driver error 801: use pdl=false"):
        start(monkeypatch, driver)


def test_the_structures_are_laid_out_as_the_drivers():
    assert ctypes.sizeof(graph_edges._EdgeData) == 8
    assert graph_edges._KernelNodeParams.kernel_params.offset == 40 and ctypes.sizeof(graph_edges._KernelNodeParams) == 72
