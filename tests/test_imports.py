"""Imports go one way: moeexp_kernels <- moeexp_runner <- moeexp <- tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
APPLICATION = {"hydra", "omegaconf", "wandb", "transformers", "hqq", "rich"}
FORBIDDEN = {
    ROOT / "kernels" / "moeexp_kernels": {"moeexp_runner", "moeexp", "tests"} | APPLICATION,
    ROOT / "runner" / "moeexp_runner": {"moeexp", "tests"} | APPLICATION,
    ROOT / "moeexp": {"tests"},
}


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN, ids=lambda package: package.name)
def test_a_package_imports_nothing_above_it(package):
    files = sorted(package.rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text()) & FORBIDDEN[package] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_imported_sees_both_forms_at_any_depth():
    source = "import a.b\ndef f():\n    from c.d import e\n    from .own import x\n"
    assert imported(source) == {"a", "c"}


@pytest.mark.parametrize("folder", ["kernels", "runner"])
def test_the_outer_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_command_line_loads_no_torch_before_a_run():
    code = "import sys, moeexp.cli; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0
