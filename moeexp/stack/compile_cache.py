"""Compiled methods on disk: compiled once per everything that determines them, found again without exporting.

An exported graph is a function of the sources that build it, the library versions and the `MethodSpec`; their digest is
the key, so a warm run pays neither for export nor for compilation. The graph's own digest stands in the manifest. Weights
are never part of it: a method is bound to them after loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moeexp_runner.binding import TensorSpec
from torch.export import ExportedProgram

from moeexp.record import cpus
from moeexp.record.locks import lock
from moeexp.stack.cache_entries import lock_of, trim_or_say
from moeexp.stack.caches import cache_dir
from moeexp.stack.inductor import compiling, inductor_config
from moeexp.stack.methods import compile_method
from moeexp.stack.source_files import file_digest, files_of, imported_by

MANIFEST_VERSION = 1
# What traces and compiles, beside this module. What they import decides what a method's graph is and what becomes of it.
TRACING = tuple(f"{__package__}.{name}" for name in ("factory", "methods", "inductor"))


@dataclass(frozen=True)
class MethodSpec:
    """What, beside the code and its libraries, decides a method's graph. `settings`: those of the table of axes that are
    part of the compile key, see `axes.compiled_in`; `ops` by their identities. count: tokens of each sequence in a call, where
    they are a fixed number."""

    method: str
    settings: dict[str, Any]
    padded: bool = False
    count: int = 1

    @property
    def device(self) -> str:
        return self.settings["device"]

    def plain(self) -> dict[str, Any]:
        return {"method": self.method, "padded": self.padded, "count": self.count} | self.settings


@dataclass(frozen=True)
class Artifact:
    """A package on disk and the constants that it expects, by name in the exported program."""

    key: str
    package: Path
    constants: dict[str, TensorSpec]
    cached: bool
    compile_s: float


def key_of(spec: MethodSpec) -> str:
    parts = {
        "spec": spec.plain(),
        "sources": source_digest(),
        "environment": compiling(),
        "inductor": inductor_config(method=spec.method, device=spec.device),
        "toolchain": toolchain(spec.device),
        "manifest": MANIFEST_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def toolchain(device: str) -> dict[str, str | None]:
    """Versions that compiled code depends on; recorded in the manifest as well."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "cxx": _compiler(),
        "machine": platform.machine(),
    }
    if device == "cuda":
        versions["gpu_arch"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
    else:
        versions["cpu"] = torch.backends.cpu.get_cpu_capability()
        versions["cpu_flags"] = " ".join(cpus.instruction_sets())  # of one capability, some CPUs have more than others
    return versions


def find(key: str, spec: MethodSpec) -> Artifact | None:
    """The artifact of `spec`, whose key it is, if the cache holds it as it should be."""
    return _read(cache_dir() / "compiled" / key, spec)


def get_or_compile(spec: MethodSpec, export: Callable[[], ExportedProgram]) -> Artifact:
    """The artifact of `spec`, from the cache or made now. Jobs that need the same one wait for the first to make it; an
    artifact whose files do not fit its manifest is made again."""
    import time

    folder = cache_dir() / "compiled" / key_of(spec)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(lock_of(folder)) as held:
        os.utime(held.lock_file)  # its last use
        found = _read(folder, spec)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        program = export()
        scratch = folder.with_name(f".{folder.name}.partial")  # the lock is held: nobody else's
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            package = scratch / f"{spec.method}.pt2"
            config = inductor_config(method=spec.method, device=spec.device)
            compile_method(program, package, config)
            manifest = {
                "version": MANIFEST_VERSION,
                "spec": spec.plain(),
                "toolchain": toolchain(spec.device),
                "inductor": config,
                "graph_sha256": hashlib.sha256(str(program.graph).encode()).hexdigest(),
                "package_sha256": file_digest(package),
                "constants": {name: asdict(constant) for name, constant in _constants(program).items()},
                "compile_s": time.perf_counter() - start,
            }
            (scratch / "manifest.json").write_text(json.dumps(manifest))
            os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        made = _read(folder, spec)
    trim_or_say()
    assert made is not None, f"the artifact just written to {folder} does not fit its manifest"
    return Artifact(made.key, made.package, made.constants, cached=False, compile_s=made.compile_s)


def _read(folder: Path, spec: MethodSpec) -> Artifact | None:
    """None if there is no artifact, or one that is damaged or of another method or toolchain (it is then made again)."""
    package = folder / f"{spec.method}.pt2"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wanted = {"version": MANIFEST_VERSION, "spec": spec.plain(), "toolchain": toolchain(spec.device)}
        if {key: manifest[key] for key in wanted} != json.loads(json.dumps(wanted)):
            return None
        if manifest["package_sha256"] != file_digest(package):
            return None
        constants = {name: TensorSpec.from_json(data) for name, data in manifest["constants"].items()}
        return Artifact(folder.name, package, constants, cached=True, compile_s=float(manifest["compile_s"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _constants(program: ExportedProgram) -> dict[str, TensorSpec]:
    """Every buffer that the compiled method will ask for. Tensor literals would be anonymous constants: our own bug."""
    signature = program.graph_signature
    assert not signature.inputs_to_parameters, "the model has buffers only"
    assert not signature.inputs_to_lifted_tensor_constants, (
        f"tensor literals in the graph: {list(signature.inputs_to_lifted_tensor_constants.values())}"
    )
    buffers = {
        name: program.state_dict[name] if name in program.state_dict else program.constants[name]
        for name in signature.inputs_to_buffers.values()
    }
    short = [name for name, buffer in buffers.items() if buffer.ndim == 1 and buffer.numel() <= 8]
    assert not short, f"Inductor would write the values of {short} into the code; give them a second dimension"
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return {target: TensorSpec.of(buffers[target]) for name, target in signature.inputs_to_buffers.items() if name in used}


def sources() -> dict[str, Path]:
    """{name: file} of all that shapes compiled code: every op with its launch parameters, which are compiled into a package
    as much as a line of source is, and what the modules that trace and compile import."""
    traced = imported_by((*TRACING, __name__))
    missing = [module for module in TRACING if module not in traced]
    assert not missing, f"{missing} are no modules: name in TRACING what traces and compiles"
    kernels = files_of("moeexp_kernels")
    return kernels | {module: path for module, path in traced.items() if path not in set(kernels.values())}


def source_digest() -> str:
    """Of all `sources`."""
    total = hashlib.sha256()
    for name, path in sources().items():
        total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _compiler() -> str:
    """First line of what the C++ compiler says of itself. `RuntimeError` where there is none."""
    command = os.environ.get("CXX", "g++")
    try:
        result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the C++ compiler {command!r} does not run ({error}); install g++ or set CXX") from error
    return f"{command}: {result.stdout.splitlines()[0]}"
