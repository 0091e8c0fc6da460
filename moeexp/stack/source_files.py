"""The packages' own source files: all of them, or those that some modules import, directly or through others."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = ("moeexp", "moeexp_kernels", "moeexp_runner")


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"package {package} is not installed beside moeexp: reinstall moeexp")
    return Path(next(iter(spec.submodule_search_locations)))


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(package: str) -> dict[str, Path]:
    """{package/relative/path: file} of every source file and tuning table, in the order of the names."""
    root = folder_of(package)
    found = sorted([*root.rglob("*.py"), *root.rglob("tuned/*.json")])
    assert found, f"no source file in {root}"
    return {f"{package}/{path.relative_to(root).as_posix()}": path for path in found}


def imported_by(modules: Iterable[str]) -> dict[str, Path]:
    """{module: file} of these modules and of all of our packages that they import, at any depth of the code."""
    found: dict[str, Path] = {}
    waiting = [name for module in modules for name in _with_parents(module)]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        path = file_of(module)
        if path is None:  # a name of a module, not a module; or a package of others
            continue
        found[module] = path
        for name in _imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            waiting += _with_parents(name)
    return dict(sorted(found.items()))


def file_of(module: str) -> Path | None:
    """The file of a module of our packages; None for anything else."""
    package, *parts = module.split(".")
    if package not in PACKAGES:
        return None
    place = folder_of(package).joinpath(*parts)
    return next((path for path in (place / "__init__.py", place.with_name(place.name + ".py")) if path.is_file()), None)


def _with_parents(module: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`: importing one runs those above it."""
    parts = module.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


@functools.cache
def _imports(source: str, module: str, is_package: bool) -> tuple[str, ...]:
    """The absolute names that a module's source imports: modules, and what may be modules of a package."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            kept = len(parents) - node.level + is_package
            base = ".".join([*(parents[:kept] if node.level else ()), *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(name for name in dict.fromkeys(names) if name.partition(".")[0] in PACKAGES)
