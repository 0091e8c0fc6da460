"""The manifest of an artifact: what it holds, what it runs on, whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from moeexp.config.files import cut
from moeexp.record import cpus
from moeexp.record.json_file import read_json
from moeexp.record.text import brief
from moeexp.stack.artifact_shape import check_shape
from moeexp.stack.digests import Digests, ShowProgress, unseen

# 4: with l2_prefetch, which is gone; 3: without the code of who made it; 2: without `threads` in the config and the identity of
# what it was made from; 1: without l2_prefetch
VERSION = 5
MANIFEST = "manifest.json"
UNSEALED = ("sha256", "made_by")


def here(device: str) -> dict[str, Any]:
    """What compiled code asks of the machine that runs it; `device` is `cpu` or `cuda`."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_flags": cpus.instruction_sets(),
    }
    if device == "cuda":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        found |= {"cuda": torch.version.cuda, "gpu_arch": "sm_{}{}".format(*capability) if capability else None}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, whose own digest fits and which names nothing outside the folder. `ValueError` for a folder that is no
    artifact of this version. Nothing of it is trusted by that: see `artifact_key`."""
    path = folder / MANIFEST
    if not os.path.isfile(path):
        raise ValueError(f"artifact={folder} holds no {MANIFEST}: give a folder that `python -m moeexp.export` wrote")
    try:
        manifest = read_json(path)
        sealed, version = {key: value for key, value in manifest.items() if key not in UNSEALED}, manifest["version"]
        fits = manifest["sha256"] == seal(sealed)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} cannot be read; export it again") from error
    if not fits:
        raise ValueError(f"artifact={folder} is damaged: {MANIFEST} does not fit its own digest; export it again")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"artifact={folder} has version {brief(version)}, this moeexp reads {VERSION}; export it again")
    try:
        check_shape(manifest)
    except ValueError as error:
        raise ValueError(f"artifact={folder} is damaged: {str(error)[:250]} in {MANIFEST}; export it again") from error
    return manifest


def check_runnable(folder: Path, manifest: dict[str, Any]) -> None:
    """`ValueError` if this machine, torch or a user's op is not what the methods were compiled for. Imports users' ops."""
    from moeexp_kernels import registry

    device = manifest["config"]["device"]
    made, now = manifest["runs_on"], here(device)
    for key, value in made.items():
        if key == "cpu_flags":
            lacking = sorted(set(value) - set(now[key]))
            if lacking:
                flags = ", ".join(cut(name, 20) for name in lacking[:4])
                raise ValueError(f"artifact={folder} was made for a CPU with {flags}, which this one lacks; export here")
        elif now.get(key) != value:
            raise ValueError(
                f"artifact={folder} was made for {key} {cut(str(value), 60)}, and this is {now.get(key)}: export it again here"
            )
    if unsaid := sorted(set(now) - set(made)):
        raise ValueError(f"artifact={folder} does not say for which {unsaid[0]} it was made: export it again here")
    settings = manifest["config"]["ops"]
    chosen = {op: name for op, name in settings.items() if op not in ("default", "sample")}
    names = registry.identities(registry.resolve(default=settings["default"], chosen=chosen, device=device))
    other = sorted(op for op, name in names.items() if op != "sample" and manifest["ops"].get(op) != name)
    if other:
        raise ValueError(f"artifact={folder} holds another source of ops.{other[0]} than is here now: export it again")


def check_integrity(folder: Path, manifest: dict[str, Any], progress: ShowProgress = unseen) -> None:
    """Compares every file's digest. `ValueError` names what is missing, altered, elsewhere, or not the artifact's."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    expected, root = manifest["files"], os.path.realpath(folder)
    problems = [f"{name} is missing" for name in sorted(set(expected) - found)]
    problems += [f"{cut(name)} does not belong to it" for name in sorted(found - set(expected))]
    inside = [name for name in sorted(found & set(expected)) if os.path.realpath(folder / name) == os.path.join(root, name)]
    problems += [f"{name} is a link" for name in sorted(found & set(expected) - set(inside))]
    for name, digest in zip(inside, Digests().of([folder / name for name in inside], progress), strict=True):
        if digest != expected[name]["sha256"]:
            problems.append(f"{name} is not the file that was written")
    if problems:
        raise ValueError(f"artifact={folder} is damaged: {'; '.join(problems)[:200]}; export it again or copy it anew")


def seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
