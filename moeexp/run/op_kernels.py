"""Which op of a decode step each kernel on the GPU belongs to, told by its name and by the order in which they run.

A kernel may serve several ops (a GEMV is a projection, the router's logits or the head), so that names alone do not tell. But
a step runs its ops one after the other: a kernel of ours is that of the op under way, or of the next one that launches it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeexp_kernels.traffic import KERNELS, LAST
from moeexp_runner.profiler import Event

EMBEDDING = "embedding"  # the first op of a step; its kernel is ours, of torch or of Inductor
EMBEDDING_NAMES = ("embedding", "indexSelect", "index_select")
OURS = {name for kernels in KERNELS.values() for name in kernels}


@dataclass(frozen=True)
class OpKernel:
    """Kernels of one name at one place of a step. `at`: the place of the op among the step's; None: of no op. `own`: whether
    the op launches it, or it only runs there. Of a step: `calls`, `us` from start to end, `adds_us` without the time in which
    kernels that started earlier ran too."""

    at: int | None
    own: bool
    name: str
    calls: float
    us: float
    adds_us: float


def place(kernels: Iterable[Event], ops: Sequence[str], *, steps: int, without: Iterable[Event] = ()) -> list[OpKernel]:
    """kernels: of `steps` steps, and of what a generation `without` a step runs as well. ops: a step's without their phase,
    EMBEDDING first and sampling last. Where they do not come in the order of the ops, projection by projection, or these are of
    other kernels than ours, all are of no op."""
    found, visits = _walk(kernels, ops)
    start, _ = _walk(without, ops)
    seen = {visits[at] for at, op in enumerate(ops) if op == "linear" or visits[at]}
    if seen != {steps}:
        found, start = (_of_no_op(one) for one in (found, start))
    for key, totals in start.items():
        found[key] = [value - other for value, other in zip(found[key], totals, strict=True)]
    return [
        OpKernel(*key, *(max(0.0, round(value / steps, 3)) for value in totals))
        for key, totals in found.items()
        if round(totals[0]) > 0
    ]


Place = tuple[int | None, bool, str]


def _walk(kernels: Iterable[Event], ops: Sequence[str]) -> tuple[dict[Place, list[float]], Counter[int]]:
    """{place: [calls, us, adds]}, and how often each op was come to by a kernel of its own."""
    found: dict[Place, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    visits: Counter[int] = Counter()
    at, over, reached = len(ops) - 1, True, float("-inf")  # before a first step as after another
    for name, start, end in sorted(kernels, key=lambda event: event[1]):
        key = _next(name, ops, at, over)
        if key[1] and key[0] is not None:
            visits[key[0]] += key[0] != at or over
            at, over = key[0], name in LAST.get(ops[key[0]], ())
        for index, value in enumerate((1, end - start, max(0.0, end - max(start, reached)))):
            found[key][index] += value
        reached = max(reached, end)
    return found, visits


def _next(name: str, ops: Sequence[str], at: int, over: bool) -> Place:
    if name.startswith("memcpy"):  # a copy on a stream of its own, beside whatever runs
        return None, False, name
    count = len(ops)
    if name in OURS:
        if not over and name in KERNELS.get(ops[at], ()):
            return at, True, name
        for ahead in range(1, count + 1):
            if name in KERNELS.get(ops[(at + ahead) % count], ()):
                return (at + ahead) % count, True, name
    between = at == 0 or at >= count - 2  # after the head
    if between and any(part in name for part in EMBEDDING_NAMES):
        return 0, True, name
    return (at + over) % count, False, name


def _of_no_op(found: dict[Place, list[float]]) -> dict[Place, list[float]]:
    merged: dict[Place, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for (_, _, name), totals in found.items():
        merged[None, False, name] = [one + other for one, other in zip(merged[None, False, name], totals, strict=True)]
    return merged
