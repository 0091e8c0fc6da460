"""Small experiments that say whether a known trap is set on this machine; `python -m moeexp.doctor` runs them all.

Each runs in a process of its own (`python -m moeexp.probes NAME`): some traps end in a segmentation fault.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

TORCH = ((2, 11), (2, 15))  # at least, below: as in pyproject.toml
LEAST_FREE = 2 << 30  # bytes that compiling and a quantised small model may take
ANSWER = "moeexp-probe: "


@dataclass(frozen=True)
class Finding:
    verdict: str  # ok, warning, broken (a run needs it)
    detail: str
    remedy: str = ""


def torch_version() -> Finding:
    """torch is one of those that this version was tried with, and sees the GPU that the machine has."""
    import pynvml
    import torch
    from moeexp_runner import nvml

    at_least, below = (".".join(map(str, version)) for version in TORCH)
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TORCH[0] <= found < TORCH[1]:
        return Finding("broken", f"torch {torch.__version__}", f"pip install 'torch>={at_least},<{below}'")
    if torch.cuda.is_available():
        return Finding("ok", f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}")
    why = ""
    try:
        count = nvml.ask(pynvml.nvmlDeviceGetCount)
    except RuntimeError as error:
        why, count = f" ({error})", not isinstance(error.__cause__, pynvml.NVMLError_LibraryNotFound)
    if not count:
        return Finding("ok", f"torch {torch.__version__}, no NVIDIA GPU here: runs are on the CPU")
    if torch.version.cuda is None:
        return Finding("warning", f"torch {torch.__version__} is a CPU build", "install torch's wheel for CUDA")
    return Finding(
        "warning",
        f"torch is built for CUDA {torch.version.cuda} and finds no GPU{why}",
        "look at CUDA_VISIBLE_DEVICES and at the driver's version in nvidia-smi",
    )


def triton_import() -> Finding:
    """Triton's kernels are what ops=triton runs, and the package imports them on a CPU too."""
    import triton
    from moeexp_kernels import registry

    return Finding("ok", f"triton {triton.__version__}, {len(registry.OPS)} ops")


def hqq_quantise() -> Finding:
    """hqq imports without a CUDA toolkit, and quantises."""
    import torch

    from moeexp.model.quantise import quantise

    weight = torch.linspace(-1, 1, 4 * 64).view(4, 64)
    stored, scales = quantise(weight, bits=4, group_size=32)
    fits = stored.shape == (4, 32) and scales.shape == (4, 2, 2)
    return Finding("ok" if fits else "broken", "a 4 x 64 matrix to int4", "" if fits else "pip install 'hqq==0.2.8.post1'")


def package_names() -> Finding:
    """No other `kernels` package hides the one that transformers looks for, and ours are of one installation."""
    import moeexp_kernels
    import moeexp_runner

    import moeexp

    root = Path(moeexp.__file__).resolve().parents[1]
    for package in (moeexp_kernels, moeexp_runner):
        path = Path(package.__file__ or "").resolve()
        if not path.is_relative_to(root):
            remedy = "remove one from PYTHONPATH, or pip uninstall moeexp"
            return Finding("broken", f"moeexp is in {root}, {package.__name__} is {path}: two installations", remedy)
    where = {name: _place(name) for name in ("kernels", "runner")}
    seen = ", ".join(f"{name}: {place}" for name, place in where.items())
    try:
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe  # noqa: F401
    except Exception as error:
        reason = f"transformers' Qwen3.5-MoE does not import ({type(error).__name__}: {_line(error)}); {seen}"
        return Finding("broken", reason, "take a package of that name off PYTHONPATH and out of the working directory")
    return Finding("ok", f"transformers' Qwen3.5-MoE imports; {seen}")


def cache_folder() -> Finding:
    """The compile cache can be written, renamed in and locked, and has room."""
    from moeexp.record.locks import lock
    from moeexp.stack.caches import cache_dir

    remedy = "set MOEEXP_CACHE_DIR to a folder of yours on a local disk"
    try:
        folder = cache_dir()
    except ValueError as error:  # no home folder
        return Finding("broken", str(error), remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            with lock(Path(scratch) / "lock"):
                pass
            os.replace(Path(scratch) / "lock", Path(scratch) / "renamed")
    except OSError as error:
        return Finding("broken", f"{folder}: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free
    verdict = "ok" if free >= LEAST_FREE else "warning"
    return Finding(verdict, f"{folder}, {free / 2**30:.0f} GiB free", "" if verdict == "ok" else remedy)


def libstdcxx() -> Finding:
    """What $CXX compiles loads, and uses the system's libstdc++: with one linked in, AOTInductor's packages crash."""
    import ctypes

    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    compiler = os.environ.get("CXX", "g++")
    remedy = "export CXX=/usr/bin/g++ CC=/usr/bin/gcc"
    source = '#include <regex>\nextern "C" int probe() { return std::regex_match("ab", std::regex("a.")); }\n'
    folder = inductor_cache_dir()
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="doctor-") as scratch:
        code, library = Path(scratch) / "probe.cpp", Path(scratch) / "probe.so"
        code.write_text(source)
        command = [*shlex.split(compiler), "-shared", "-fPIC", "-O0", str(code), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            reason = _line(getattr(error, "stderr", None) or error)
            return Finding("broken", f"{compiler} compiles no shared object: {reason}", f"install g++, or {remedy}")
        # The names of the libraries that it needs stand in it as they are.
        needed = [name for name in (b"libstdc++.so", b"libc++.") if name in library.read_bytes()]
        if not needed:
            return Finding("broken", f"{compiler} links libstdc++ statically", remedy)
        try:
            answer = ctypes.CDLL(str(library)).probe()
        except OSError as error:
            reason = f"what {compiler} compiled does not load from {folder}: {error}"
            return Finding("broken", reason, "set TORCHINDUCTOR_CACHE_DIR to a folder that is not mounted noexec")
    return Finding("ok" if answer == 1 else "broken", f"{compiler} links libstdc++ dynamically", "" if answer else remedy)


PROBES: dict[str, Callable[[], Finding]] = {
    "torch": torch_version,
    "triton": triton_import,
    "hqq": hqq_quantise,
    "package names": package_names,
    "cache folder": cache_folder,
    "static libstdc++": libstdcxx,
}


def run(name: str) -> Finding:
    """The finding, in this process. What an experiment raises means that something does not work: broken."""
    try:
        return PROBES[name]()
    except ImportError as error:
        return Finding("broken", _line(error), "install moeexp again: pip install moeexp")
    except Exception as error:
        return Finding("broken", f"{type(error).__name__}: {_line(error)}", "the traceback: python -m moeexp.probes NAME")


def _place(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return "none"
    if spec.loader is None or spec.origin is None:
        return "a folder without __init__.py"
    return str(Path(spec.origin).parent)


def _line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:199]}…"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--json"]:
        print(ANSWER + json.dumps(asdict(run(sys.argv[2]))))
    else:
        print(PROBES[sys.argv[1]]())
