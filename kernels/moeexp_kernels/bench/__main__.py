"""python -m moeexp_kernels.bench [op ...]       time the ops and their peers
python -m moeexp_kernels.bench layers         time four layers of a decode step as one chain
python -m moeexp_kernels.bench tune [op ...]  measure launch parameters and write the table of this GPU's architecture
python -m moeexp_kernels.bench instructions   count what the chain's kernels are made of; needs no GPU"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pynvml
import torch
import triton

from moeexp_kernels.bench.cases import BUILDERS, Spec, build, specs
from moeexp_kernels.bench.instructions import print_instructions
from moeexp_kernels.bench.layers import Layers
from moeexp_kernels.bench.measure import OpTiming, measure, measure_peers, unavailable_sources
from moeexp_kernels.bench.peers import SOURCES
from moeexp_kernels.bench.shapes import FULL, MODELS, Shapes
from moeexp_kernels.bench.table import markdown, write_json
from moeexp_kernels.bench.timing import Reader, cold_bytes
from moeexp_kernels.bench.tune import tune
from moeexp_kernels.bench.warm import CompileTask, warm
from moeexp_kernels.parts import tuning

TOKENS = "1,2,3,4,6,8,16,32"
WRONG, REFUSED = 1, 2  # exit codes beside 0: an op is wrong; bad input or no GPU


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moeexp_kernels.bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to do (default: all); `tune` first: tune them")
    parser.add_argument("--tokens", help=f"sequences of a decode step (default {TOKENS}; of tune --layers 1)")
    parser.add_argument(
        "--model", default="qwen3_5_35b_a3b", help="whose shapes `layers`, `instructions` and `tune --layers` take"
    )
    parser.add_argument("--arch", help="for which `instructions` compiles (default sm_90)")
    parser.add_argument("--json", type=Path, help="write every number here, raw samples included")
    parser.add_argument("--quick", action="store_true", help="one token count, one prompt length, int4 only")
    parser.add_argument("--no-peers", action="store_true", help="our ops only")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="compiling processes")
    parser.add_argument("--layers", action="store_true", help="tune by the time of the chain: only the rows that it asks for")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds that tune may take (default 150)")
    return parser.parse_args(arguments)


def refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return REFUSED


def token_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > 64:
        raise ValueError(f"--tokens={text} is not a list of numbers from 1 to 64, such as 1,2,4,8")
    return counts


def environment(command: str, arch: str, read_bandwidth: float) -> dict:
    return {
        "gpu": torch.cuda.get_device_name(), "architecture": arch, "driver": driver_version(), "torch": torch.__version__,
        "triton": triton.__version__, "table": arch if tuning.table(arch) else tuning.DEFAULT,
        "read_tb_s": read_bandwidth * 1e-12, "command": command,
    }  # fmt: skip


def driver_version() -> str:
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return "unknown"


def measure_or_say(spec: Spec, cold: int, reader: Reader, arch: str) -> OpTiming:
    """An op that raises is a row that says so, and exit code 1 in the end: the other ops' numbers must not be lost."""
    try:
        return measure(build(spec, FULL, "cuda", cold), reader, arch)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return OpTiming(spec.op, spec.variant, spec.phase, spec.tokens, moved=0, flops=0, check=[], problem=problem)


def bench(options: argparse.Namespace, ops: list[str], command: str) -> int:
    start = time.monotonic()
    wanted = specs(FULL, ops, token_counts(options.tokens), options.quick)
    absent = unavailable_sources() if not options.no_peers else {}
    here = [] if options.no_peers else [name for name in SOURCES if name not in absent]
    # Peers first, whose own tuning compiles most; more sequences than two make them no other kernels.
    few = token_counts(options.tokens)[:2]
    jobs = [
        CompileTask(spec, peer)
        for peer in reversed(here)
        for spec in wanted
        if SOURCES[peer].COMPILES and spec.op in SOURCES[peer].OPS and (spec.phase == "prefill" or spec.tokens in few)
    ]
    jobs += [CompileTask(spec) for spec in wanted]
    done = warm(jobs, options.jobs, seconds=70)
    print(f"compiled {done} of {len(jobs)} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    device, arch = torch.device("cuda"), tuning.current_architecture()
    reader, cold = Reader(device), cold_bytes(device)
    facts = environment(command, arch, reader.bandwidth)
    rows: list[OpTiming] = []
    for spec in wanted:  # ours first: a peer that breaks the device cannot take our numbers with it
        rows.append(measure_or_say(spec, cold, reader, arch))
        print(f"{time.monotonic() - start:5.0f} s {spec}: {rows[-1].us or rows[-1].problem}", file=sys.stderr, flush=True)
    if options.json:
        write_json(options.json, rows, facts, absent)
    for spec, row in zip(wanted, rows, strict=True):
        if here and row.us is not None and any(spec.op in SOURCES[name].OPS for name in here):
            row.peers = measure_peers(build(spec, FULL, "cuda", cold), absent)
            print(f"{time.monotonic() - start:5.0f} s {spec}: {len(row.peers)} peers", file=sys.stderr, flush=True)
    if options.json:
        write_json(options.json, rows, facts, absent)
    print(markdown(rows, facts, absent), flush=True)
    return WRONG if any(row.problem for row in rows) else 0


def time_layers(counts: list[int], shapes: Shapes) -> int:
    """Prints the chain's time a layer by sequences, with PDL and without."""
    print(f"{torch.cuda.get_device_name()}: microseconds of a layer, the mean of three delta nets and one attention")
    for count in counts:
        chain = Layers(shapes, "cuda", count)
        pdl, plain = (chain.microseconds(pdl=on) for on in (True, False))
        print(f"{count:3d} sequences {pdl:7.2f} with PDL, {plain:7.2f} without", flush=True)
    return 0


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    tuning_run, layers_run = options.ops[:1] == ["tune"], options.ops == ["layers"]
    counting = options.ops == ["instructions"]
    ops = options.ops[1:] if tuning_run else [] if layers_run or counting else options.ops
    unknown = [op for op in ops if op not in BUILDERS]
    if unknown:
        return refuse(f"{unknown[0]!r} is not an op of the bench; the ops are {', '.join(BUILDERS)}")
    options.tokens = options.tokens or ("1" if options.layers else TOKENS)
    try:
        counts = token_counts(options.tokens)
    except ValueError as error:
        return refuse(str(error))
    if options.layers and not tuning_run:
        return refuse("--layers belongs to tune; `layers` alone times the chain")
    if options.model not in MODELS:
        return refuse(f"--model={options.model} has no shapes here; the models are {', '.join(MODELS)}")
    shapes = MODELS[options.model]
    if shapes is not FULL and not (options.layers or layers_run or counting):
        message = "--model belongs to `layers`, `instructions` and `tune --layers`; all else is measured at the shapes of "
        return refuse(message + "qwen3_5_35b_a3b")
    if options.jobs < 1 or options.budget <= 0:
        return refuse(f"--jobs={options.jobs} and --budget={options.budget}: both must be above 0")

    if options.arch and not counting:
        return refuse("--arch belongs to `instructions`; all else runs on the GPU at hand")
    if counting:
        arch = options.arch or "sm_90"
        if not re.fullmatch(r"sm_(8|9)\d", arch):
            return refuse(f"--arch={arch} is not sm_80 to sm_99, such as sm_90 of an H100 or H200")
        if os.environ.get("TRITON_INTERPRET") == "1":
            return refuse("TRITON_INTERPRET=1 compiles nothing to count; unset it")
        print_instructions(shapes, counts=counts, arch=arch)
        return 0
    if not torch.cuda.is_available():
        return refuse("the bench measures a CUDA device and torch sees none here; run it on a machine with one")
    command = shlex.join(["python", "-m", "moeexp_kernels.bench", *arguments])
    with torch.no_grad():
        if tuning_run:
            return tune(
                ops or list(BUILDERS), processes=options.jobs, budget=options.budget, command=command,
                chains=counts if options.layers else (), shapes=shapes,
            )  # fmt: skip
        if layers_run:
            return time_layers(counts, shapes)
        return bench(options, ops or list(BUILDERS), command)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
