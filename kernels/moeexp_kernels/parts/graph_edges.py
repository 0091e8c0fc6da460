"""PDL in a captured graph: edges become programmatic, so that a kernel starts while the one before it still runs.

Works on the graph and not on launches, because it then serves every way to make a method: neither AOTInductor nor eager
code needs to know. Only kernels that wait by themselves may have such an edge: `pdl.PDL_KERNELS`.
Source: CUDA driver API, graph management, `CUgraphEdgeData` (CUDA 12.3 and later; kernels of sm_90 and later).
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from moeexp_kernels.parts.pdl import EARLY, PDL_KERNELS

KERNEL_NODE = 0
# Memory that the graph allocates and frees itself, as captures do under cudaMallocAsync. The driver lets no edge of such a
# graph be removed.
MEMORY_NODES = (10, 11)
PROGRAMMATIC_PORT, PROGRAMMATIC_TYPE = 1, 1


class _EdgeData(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ubyte) for name in ("from_port", "to_port", "type")] + [("reserved", ctypes.c_ubyte * 5)]


class _KernelNodeParams(ctypes.Structure):
    _fields_ = [
        ("func", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("kernel_params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    ]


def add_pdl_edges(graph: int, *, pairs: Collection[tuple[str, str]] | None = None) -> int:
    """Makes every full edge between two of the kernels `PDL_KERNELS` programmatic, or only those between the named `pairs`
    (earlier, later). Both kernels must wait: the earlier one is to let go only when all before it is complete, on which the
    later one may rely. graph: a `cudaGraph_t` that is not yet instantiated. Returns how many edges were changed, 0 for a
    graph that allocates memory itself; `RuntimeError` where the driver fails."""
    cuda = ctypes.CDLL("libcuda.so.1")
    handle = ctypes.c_void_p(graph)
    count = ctypes.c_size_t()
    _call(cuda, "cuGraphGetEdges_v2", handle, None, None, None, ctypes.byref(count))
    if not count.value:
        return 0
    Nodes = ctypes.c_void_p * count.value
    sources, targets, data = Nodes(), Nodes(), (_EdgeData * count.value)()
    _call(cuda, "cuGraphGetEdges_v2", handle, sources, targets, data, ctypes.byref(count))
    if any(_kind(cuda, node) in MEMORY_NODES for node in {*sources, *targets}):
        return 0
    changed = 0
    for source, target, edge in zip(sources, targets, data, strict=True):
        names = _kernel_name(cuda, source), _kernel_name(cuda, target)
        wanted = set(names) <= set(PDL_KERNELS) and (pairs is None or names in pairs)
        wanted = wanted and names[1] in EARLY.get(names[0] or "", PDL_KERNELS)
        if edge.type == PROGRAMMATIC_TYPE or not wanted:
            continue
        one = ((ctypes.c_void_p * 1)(source), (ctypes.c_void_p * 1)(target))
        _call(cuda, "cuGraphRemoveDependencies_v2", handle, *one, (_EdgeData * 1)(edge), ctypes.c_size_t(1))
        programmatic = _EdgeData(from_port=PROGRAMMATIC_PORT, type=PROGRAMMATIC_TYPE)
        _call(cuda, "cuGraphAddDependencies_v2", handle, *one, (_EdgeData * 1)(programmatic), ctypes.c_size_t(1))
        changed += 1
    return changed


def _kind(cuda: ctypes.CDLL, node: int) -> int:
    kind = ctypes.c_int()
    _call(cuda, "cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    return kind.value


def _kernel_name(cuda: ctypes.CDLL, node: int) -> str | None:
    """None for a node that is no kernel."""
    if _kind(cuda, node) != KERNEL_NODE:
        return None
    params, name = _KernelNodeParams(), ctypes.c_char_p()
    _call(cuda, "cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
    if params.func:
        _call(cuda, "cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(params.func))
    else:
        _call(cuda, "cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(params.kern))
    return (name.value or b"").decode()


def _call(cuda: ctypes.CDLL, function: str, *arguments) -> None:
    status = getattr(cuda, function)(*arguments)
    if status != 0:
        raise RuntimeError(f"{function} failed with CUDA driver error {status}: use pdl=false")
