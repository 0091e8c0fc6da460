"""The rooms and their order: a room imports only rooms that come earlier, and no files import each other in a circle.

Lazy, type-only and local imports count, and so do modules that a string names (`python -m moeexp.sweep.worker`, what a test or
a child process runs).
"""

import ast
import contextlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "moeexp_kernels": ROOT / "kernels" / "moeexp_kernels",
    "moeexp_runner": ROOT / "runner" / "moeexp_runner",
    "moeexp": ROOT / "moeexp",
}
# Bottom up; docs/architecture.md says what each is. The commands stand on top, `moeexp/__init__` is the ground floor.
ROOMS = (
    "moeexp_kernels.parts", "moeexp_kernels.ops", "moeexp_kernels", "moeexp_kernels.bench", "moeexp_runner",
    "moeexp.record", "moeexp.config", "moeexp.model", "moeexp.report", "moeexp.stack", "moeexp.check", "moeexp.run",
    "moeexp.sweep", "moeexp",
)  # fmt: skip
GROUND = "moeexp"
APPLICATION = {"hydra", "omegaconf", "wandb", "transformers", "hqq", "rich", "pydantic", "jinja2"}


def modules(packages=PACKAGES):
    """{dotted name: file} of every module; a package's name is that of its `__init__`."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, name: str, is_package: bool, known) -> set[str]:
    """The known modules that a source imports, wherever in it: also in functions, under TYPE_CHECKING, by a relative name,
    and those that a string names after `-m`, in an import statement, or as `module:function`."""
    tree = ast.parse(source)
    found = _imports(tree, name, is_package)
    for code in _strings(tree):
        found |= _imports(code, name, is_package)
    found |= _run_by_name(tree)
    # `from moeexp.record import record` names a module, `from moeexp.record.record import Record` a thing in one; the package
    # that holds a module is not imported for its own sake.
    result = found & set(known)
    return {one for one in result if not any(other.startswith(one + ".") for other in result)} - {name}


def _imports(tree: ast.AST, name: str, is_package: bool) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".") if is_package else name.split(".")[:-1]
            start = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def _strings(tree: ast.AST) -> list[ast.AST]:
    """The code in strings, as a child process or a test runs it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\b(from|import) moeexp", node.value):
            with contextlib.suppress(SyntaxError):  # prose
                found.append(ast.parse(textwrap.dedent(node.value)))
    return found


def _run_by_name(tree: ast.AST) -> set[str]:
    """The arguments after "-m"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple)):
            texts = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
            found |= {after for flag, after in zip(texts, texts[1:], strict=False) if flag == "-m" and after}
    return found


def room(module: str) -> str:
    """The longest room that a module lies in."""
    return max((one for one in ROOMS if module == one or module.startswith(one + ".")), key=len)


def edges(packages=PACKAGES) -> dict[str, set[str]]:
    known = modules(packages)
    return {name: imported(path.read_text(), name, path.name == "__init__.py", set(known)) for name, path in known.items()}


def climbing(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} ({room(name)}) imports {other} ({room(other)})"
        for name, others in graph.items()
        for other in sorted(others)
        if other != GROUND and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of one circle, in order, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            found = visit(other, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    for name in graph:
        found = visit(name, [])
        if found:
            return found
    return None


def test_a_room_imports_only_rooms_that_come_earlier():
    graph = edges()
    assert len(graph) > 100
    assert not climbing(graph)


def test_no_files_import_each_other_in_a_circle():
    assert circle(edges()) is None


def test_every_room_is_there_and_every_file_lies_in_one():
    known = modules()
    for one in ROOMS:
        assert one in known or any(name.startswith(one + ".") for name in known), one
    top = {path.name for path in (ROOT / "moeexp").glob("*.py")}
    commands = {"__init__.py", "__main__.py", "cli.py", "export.py", "compare.py", "reproduce.py", "doctor.py", "probes.py",
                "sync.py", "cache.py", "figures.py", "power.py"}  # fmt: skip
    assert top <= commands, "a file that is no command belongs into a room"


@pytest.mark.parametrize("source, others", [
    ("from moeexp.record import record", {"moeexp.record.record"}),
    ("from moeexp.record.record import Record", {"moeexp.record.record"}),
    ("def f():\n    from moeexp.run import job", {"moeexp.run.job"}),
    ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moeexp.run.job import Job", {"moeexp.run.job"}),
    ("import moeexp.run.job", {"moeexp.run.job"}),
    ("from . import job", {"moeexp.run.job"}),
    ("from .job import Job", {"moeexp.run.job"}),
    ("from ..sweep import worker", {"moeexp.sweep.worker"}),
    ('run(["python", "-m", "moeexp.sweep.worker", x])', {"moeexp.sweep.worker"}),
    ('code = "import os; from moeexp.run import job"', {"moeexp.run.job"}),
    ('say("as you import moeexp.run.job, so it is")', set()),
    ('say("see `python -m moeexp.sweep.worker`")', set()),
])  # fmt: skip
def test_imported_sees_every_form(source, others):
    known = {"moeexp", "moeexp.run", "moeexp.record.record", "moeexp.run.job", "moeexp.sweep.worker"}
    assert imported(source, "moeexp.run.other", False, known) == others


def test_a_circle_and_a_climb_are_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert climbing({"moeexp.record.record": {"moeexp.run.identity"}}) == [
        "moeexp.record.record (moeexp.record) imports moeexp.run.identity (moeexp.run)"
    ]
    assert not climbing({"moeexp.run.identity": {"moeexp.record.record", "moeexp"}, "moeexp.cli": {"moeexp.sweep.sweep"}})


@pytest.mark.parametrize("package", ["moeexp_kernels", "moeexp_runner"])
def test_kernels_and_runner_know_nothing_of_the_application(package):
    forbidden = APPLICATION | {"tests", "moeexp"} | ({"moeexp_runner"} if package == "moeexp_kernels" else set())
    for path in PACKAGES[package].rglob("*.py"):
        names = {name.split(".")[0] for name in _tops(path.read_text())}
        assert not names & forbidden, path


def test_the_runner_knows_no_op():
    for name, path in modules({"moeexp_runner": PACKAGES["moeexp_runner"]}).items():
        assert "moeexp_kernels" not in _tops(path.read_text()), name


def _tops(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_what_tests_import_is_there():
    """In strings too, which fail only when they run."""
    known = modules()
    rooms = {*known, *(one.rpartition(".")[0] for one in known)}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        whole = ast.parse(path.read_text())
        for tree in (whole, *_strings(whole)):
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                    assert node.module in rooms, f"{path.name}: {node.module}"
                    if node.module not in known or known[node.module].name == "__init__.py":
                        names = {alias.name for alias in node.names} - {"__version__", "STARTED"}
                        missing = [one for one in names if f"{node.module}.{one}" not in rooms]
                        assert not missing, f"{path.name}: {node.module} has no {missing}"


def test_nothing_imports_tests():
    for path in modules().values():
        assert "tests" not in {name.split(".")[0] for name in _tops(path.read_text())}, path


def test_packages_of_rooms_import_nothing():
    """The allocator must be chosen before torch is imported, so a room's `__init__` brings nothing in."""
    for name, path in modules().items():
        if path.name == "__init__.py" and name.startswith("moeexp."):
            assert not _tops(path.read_text()), path


@pytest.mark.parametrize("folder", ["kernels", "runner"])
def test_the_outer_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_command_line_loads_no_torch_before_a_run():
    code = "import sys, moeexp.cli; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0
