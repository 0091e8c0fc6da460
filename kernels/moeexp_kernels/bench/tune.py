"""Chooses launch parameters by measurement and writes them into the table of this GPU's architecture.

Every candidate's result is compared with the reference before its time counts, and every time is that of the bench: under
graph replay, with cold memory. For rows whose kernel takes several independent settings one is varied at a time: a
candidate that wins becomes the row that the next ones change.

With a chain of layers (`layers.py`) its time decides, for the rows that it asks for: what wins alone need not win there.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from typing import Any

import torch
import triton

from moeexp_kernels.bench.candidates import Target, chain_targets, head_target, targets
from moeexp_kernels.bench.case import Case, red
from moeexp_kernels.bench.cases import build
from moeexp_kernels.bench.layers import Layers
from moeexp_kernels.bench.shapes import FULL, Shapes
from moeexp_kernels.bench.timing import calls_for, cold_bytes, graph_samples
from moeexp_kernels.bench.warm import CompileTask, warm
from moeexp_kernels.parts import tuning

REPLAYS = 9
CHAIN_MARGIN = 0.998  # of the chain, where a row is a part of what is timed; then the difference must show once more
MARGIN = 0.99  # a challenger must be 1 % faster: less is noise, and a table that flutters makes diffs and recompiles


def jobs_of(target: Target, arch: str, shapes: Shapes = FULL) -> list[CompileTask]:
    current = current_row(target, arch)
    rows = [current] + [{**current, **change} for change in target.candidates]
    return [
        CompileTask(spec, row=(target.op, target.key, json.dumps(row)), shapes=shapes) for row in rows for spec in target.specs
    ]


def current_row(target: Target, arch: str) -> dict:
    """The row that serves the target now. A GEMV without one starts from its first candidate, which is complete."""
    return tuning.lookup(target.op, target.key, arch, rule=target.candidates[0])


def _called(case: Case, arguments: dict) -> object:
    return case.call(**arguments)


def score(cases: list[Case], chain: Layers | None) -> tuple[float, str | None]:
    """Geometric mean of the cases' median microseconds, or the chain's a layer; (inf, why) for a row that is wrong or cannot
    run."""
    times = []
    for case in cases:
        try:
            problem = red(case.check())
            if problem is not None:
                return math.inf, f"wrong at {case.shape}: {problem}"
            if chain is not None:
                continue
            samples = graph_samples(
                partial(_called, case), case.copies,
                calls=calls_for(case.phase, len(case.copies)), replays=REPLAYS,
            )  # fmt: skip
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, ValueError) as error:
            return math.inf, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        times.append(statistics.median(samples))
    return statistics.geometric_mean(times) if chain is None else chain.microseconds(), None


def choose(
    target: Target, arch: str, cold: int, deadline: float, chain: Layers | None = None, shapes: Shapes = FULL
) -> tuple[dict, list[str]]:  # fmt: skip
    """(best row, a line for each candidate tried)."""
    cases = [build(spec, shapes, "cuda", cold) for spec in target.specs]
    best = current_row(target, arch)
    with tuning.override(target.op, target.key, best):
        best_time, problem = score(cases, chain)
    lines = [f"  {best_time:9.2f} us  now  {best}" + (f"  {problem}" if problem else "")]
    for change in target.candidates:
        row = {**best, **change}
        if row == best:
            continue
        if time.monotonic() > deadline:
            lines.append("  out of time: the remaining candidates were not tried")
            break
        with tuning.override(target.op, target.key, row):
            taken, problem = score(cases, chain)
        better = taken < (MARGIN if chain is None else CHAIN_MARGIN) * best_time
        if better and chain is not None and best_time < math.inf:
            again = []
            for either in (best, row):
                with tuning.override(target.op, target.key, either):
                    again.append(chain.microseconds())
            best_time, taken = again
            better = taken < CHAIN_MARGIN * best_time
        lines.append(f"  {taken:9.2f} us  {'best' if better else '    '} {change}" + (f"  {problem}" if problem else ""))
        if better:
            best, best_time = row, taken
    if best_time == math.inf:
        raise RuntimeError(f"no candidate of {target.op} {target.key!r} gives right results:\n" + "\n".join(lines))
    return best, lines


def provenance(command: str, earlier: dict[str, Any]) -> dict[str, Any]:
    """What this run says of the table that it writes; rows that it leaves are of the runs `before`, the latest first. earlier:
    what the table said so far."""
    latest = {key: value for key, value in earlier.items() if key != "before"}
    this = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "last tuned": date.today().isoformat(), "command": command,
    }  # fmt: skip
    return this | ({"before": [latest, *earlier.get("before", [])]} if earlier else {})


def tune(
    ops: list[str], *, processes: int, budget: float, command: str, chains: Sequence[int] = (), shapes: Shapes = FULL
) -> int:  # fmt: skip
    """chains: numbers of sequences; the rows that a chain of so many asks for are chosen by its time, the head's by its own,
    and no others are tuned."""
    start = time.monotonic()
    arch, cold = tuning.current_architecture(), cold_bytes(torch.device("cuda"))
    work: list[tuple[Layers | None, list[Target]]] = []
    for count in chains:
        layers = Layers(shapes, "cuda", count)
        wanted = chain_targets(shapes, count, layers.rows())
        for by, found in ((layers, wanted), (None, [head_target(shapes, count)])):
            work.append((by, [target for target in found if target.specs[0].op in ops]))
    if not chains:
        work = [(None, targets(ops))]
    jobs = [job for _, wanted in work for target in wanted for job in jobs_of(target, arch, shapes)]
    done = warm(jobs, processes, seconds=0.5 * budget)
    print(f"compiled {done} of {len(jobs)} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    rows, earlier = copy.deepcopy(tuning.table(arch)), tuning.provenance(arch)
    deadline, path = start + budget, None
    for chain, target in [(chain, target) for chain, wanted in work for target in wanted]:
        if time.monotonic() > deadline:
            print(f"out of time before {target.op} {target.key!r}: its row stays as it is", flush=True)
            continue
        best, lines = choose(target, arch, cold, deadline, chain, shapes)
        print(f"{target.op} {target.key!r}\n" + "\n".join(lines), flush=True)
        if chains and best == tuning.lookup(target.op, target.key, arch, rule={}):
            continue  # a row that serves more than this key says the same
        rows.setdefault(target.op, {})[target.key] = best
        # Written at once: what was measured is kept if the run is stopped, and the next targets run with it.
        path = tuning.write_table(arch, rows, provenance(command, earlier))
    print(f"{path or 'nothing written'} in {time.monotonic() - start:.0f} s")
    return 0
