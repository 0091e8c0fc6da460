"""Every kernel's smallest shapes, and one decode of `nano` under a graph, under compute-sanitizer: `make sanitize`.

Once without it first, which compiles the kernels and says whether any of them is left out; then under memcheck, initcheck and
racecheck. For the shapes torch's caching allocator is off: within a block that it keeps, an access beyond a tensor's end is
none to memcheck. A graph can only be captured with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

TOOLS, FOUND = ("memcheck", "initcheck", "racecheck"), 9
HERE = Path(__file__).resolve()


def main() -> int:
    if sys.argv[1:] in (["calls"], ["decode"]):
        return run(sys.argv[1])
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        print("compute-sanitizer is not installed: it comes with the CUDA toolkit; put its folder on PATH", file=sys.stderr)
        return 2
    failed = False
    for what, uncached in (("calls", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), ("decode", {})):
        itself, environment = [sys.executable, str(HERE), what], os.environ | uncached
        if code := subprocess.run(itself, env=environment).returncode:
            return code
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *itself]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            said = " ".join(line for line in ran.stdout.splitlines() if "SUMMARY" in line)
            print(f"{what:8} {tool:10} {f'exit code {ran.returncode}' if ran.returncode else 'clean'}  {said}", flush=True)
            if ran.returncode:
                failed = True
                print(*[line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()][:60], sep="\n")
    return 1 if failed else 0


def run(what: str) -> int:
    sys.path[:0] = [str(HERE.parents[1]), *(str(HERE.parents[2] / room) for room in ("", "kernels", "runner"))]
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: compute-sanitizer checks kernels on a GPU", file=sys.stderr)
        return 2
    if what == "decode":
        print(f"a captured decode, which chose {decode_of_nano()}", flush=True)
        return 0
    return calls()


def calls() -> int:
    import test_kernels_faults as faults
    import torch
    from triton.runtime.jit import JITFunction

    launched, launch = set(), JITFunction.run

    def watched(kernel, *arguments, **options):
        launched.add(kernel.fn.__name__)
        return launch(kernel, *arguments, **options)

    JITFunction.run = watched
    for name, make in faults.CALLS.items():
        try:
            result = make()()
            torch.cuda.synchronize()
        except Exception as error:
            raise RuntimeError(f"the call {name!r}") from error
        del result
    left_out = kernels() - launched
    print(f"{len(launched)} kernels in {len(faults.CALLS)} calls", flush=True)
    if left_out:
        print(
            f"never launched: {', '.join(sorted(left_out))}: a call in tests/test_kernels_faults.py is missing", file=sys.stderr
        )
    return 1 if left_out else 0


def kernels() -> set[str]:
    """The names of all kernels of the package's ops and of hqq's: a kernel is what is launched, by its name's end."""
    import importlib
    import pkgutil

    from moeexp_kernels import hqq, ops
    from triton.runtime.jit import JITFunction

    found = set()
    names = [module.name for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}.")]
    for loaded in (hqq, *map(importlib.import_module, names)):
        found |= {name for name, value in vars(loaded).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
    return found


def decode_of_nano() -> list[list[int]]:
    import torch
    from rich.console import Console

    from moeexp.config.compose import compose
    from moeexp.config.resolve import resolve
    from moeexp.record.phases import Phases
    from moeexp.record.record import Record
    from moeexp.stack.factory import build_model, build_stack

    cfg = resolve(compose(["model=nano", "quant=int4", "export=eager", "cuda_graph=loop"]), cuda_available=True)
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder) / "record.json", id="sanitize", config=cfg, command=[])
        phases = Phases(record, Console(file=StringIO()))
        stack = build_stack(cfg, build_model(cfg, phases), phases)
        ids = stack.session.generate(torch.arange(1, 6, device="cuda")[None], 4)
        stack.close()
    return ids


if __name__ == "__main__":
    raise SystemExit(main())
