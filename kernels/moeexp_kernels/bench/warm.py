"""Compiles what a run will need, several processes at a time, into Triton's cache on disk.

A process does a job by running it once. Whether that went well does not matter here: the run itself does the same and
meets the same error.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from moeexp_kernels.bench.cases import Spec, build
from moeexp_kernels.bench.peers import SOURCES
from moeexp_kernels.bench.shapes import FULL, Shapes
from moeexp_kernels.parts import tuning

OWN = ""  # the job is our op, not a peer


@dataclass(frozen=True)
class CompileTask:
    spec: Spec
    peer: str = OWN
    row: tuple[str, str, str] | None = None  # op, key and (as JSON) row of the tuning table to run with
    shapes: Shapes = FULL


def do(job: CompileTask) -> None:
    with torch.no_grad(), ExitStack() as stack:
        if job.row is not None:
            op, key, row = job.row
            stack.enter_context(tuning.override(op, key, json.loads(row)))
        case = build(job.spec, job.shapes, "cuda", cold=0)
        if job.peer == OWN:
            case.call(**case.copies[0])
        else:
            for make in SOURCES[job.peer].OPS.get(case.op, []):
                peer = make(case)
                if peer is not None:
                    peer.call(peer.copies[0])
        torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the processes share one GPU's memory


def warm(jobs: list[CompileTask], processes: int, seconds: float) -> int:
    """Does jobs for at most `seconds`; returns how many ended. The processes share the GPU and end with this call."""
    processes = min(processes, len(jobs))
    if processes < 2:
        return 0
    # What a job prints (autotuners, warnings) would be interleaved with the run's lines.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_be_quiet) as pool:
        done, late = wait([pool.submit(do, job) for job in jobs], timeout=seconds)
        if late:
            workers = list(pool._processes.values())  # a running job cannot be cancelled otherwise
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
    return len(done)


def _be_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
