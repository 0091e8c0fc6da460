"""The manifest of an artifact: what it holds, what it runs on, whether it is whole."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeexp.record import cpus
from moeexp.stack.source_files import file_digest

if TYPE_CHECKING:
    from moeexp.record.phases import Phases

VERSION = 3  # 2: without `threads` in the config and the identity of what it was made from; 1: without l2_prefetch
MANIFEST = "manifest.json"
# Instruction sets: Inductor compiles for the very CPU that it runs on.
CPU_FLAGS = re.compile(r"^(sse|ssse|avx|fma|bmi|f16c|amx|vaes|vpclmul|pclmul|gfni|adx|sha_ni|movbe|popcnt|aes|abm)")


def here(device: str) -> dict[str, Any]:
    """What compiled code asks of the machine that runs it; `device` is `cpu` or `cuda`."""
    import torch

    flags = sorted(filter(CPU_FLAGS.match, cpus.flags()))
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "cpu_flags": flags}
    if device == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        found |= {"cuda": torch.version.cuda, "gpu_arch": "sm_{}{}".format(*capability) if capability else None}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own digest fits. `ValueError` for a folder that is no artifact of this version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"artifact={folder} holds no {MANIFEST}: give a folder that `python -m moeexp.export` wrote")
    try:
        manifest = json.loads(path.read_text())
        sealed, version = manifest.pop("sha256"), manifest["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} cannot be read; export it again") from error
    if sealed != seal(manifest):
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} does not fit its own digest; export it again")
    if version != VERSION:
        raise ValueError(f"artifact={folder} has version {version}, this moeexp reads {VERSION}; export it again")
    return manifest | {"sha256": sealed}


def check_runnable(folder: Path, manifest: dict[str, Any]) -> None:
    """`ValueError` if this machine, torch or a user's op is not what the methods were compiled for."""
    from moeexp_kernels import registry

    device = manifest["config"]["device"]
    made, now = manifest["runs_on"], here(device)
    for key, value in made.items():
        if key == "cpu_flags":
            lacking = sorted(set(value) - set(now[key]))
            if lacking:
                flags = ", ".join(lacking[:4])
                raise ValueError(f"artifact={folder} was made for a CPU with {flags}, which this one lacks; export here")
        elif now[key] != value:
            raise ValueError(f"artifact={folder} was made for {key} {value}, and this is {now[key]}: export it again here")
    settings = manifest["config"]["ops"]
    chosen = {op: name for op, name in settings.items() if op != "default"}
    names = registry.identities(registry.resolve(default=settings["default"], chosen=chosen, device=device))
    other = sorted(op for op, name in manifest["ops"].items() if names.get(op) != name)
    if other:
        raise ValueError(f"artifact={folder} holds another source of ops.{other[0]} than is here now: export it again")


def check_integrity(folder: Path, manifest: dict[str, Any], phases: Phases) -> None:
    """Reads every file once. `ValueError` names what is missing, altered, or not the artifact's."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    expected = manifest["files"]
    problems = [f"{name} is missing" for name in sorted(set(expected) - found)]
    problems += [f"{name} does not belong to it" for name in sorted(found - set(expected))]
    with phases.progress("verify artifact", total=len(expected)) as advance:
        for name in sorted(found & set(expected)):
            if file_digest(folder / name) != expected[name]["sha256"]:
                problems.append(f"{name} is not the file that was written")
            advance(1)
    if problems:
        raise ValueError(f"artifact={folder} is damaged: {'; '.join(problems[:5])}; export it again or copy it anew")


def seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
