"""The wheel: what is in it, and that it works away from the checkout."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_packages_the_configs_and_the_checkpoint(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"moeexp/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    for package in (ROOT / "moeexp", ROOT / "kernels" / "moeexp_kernels", ROOT / "runner" / "moeexp_runner"):
        expected |= {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
    tables = list((ROOT / "kernels" / "moeexp_kernels" / "tuned").glob("*.json"))
    assert tables
    expected |= {f"moeexp_kernels/tuned/{path.name}" for path in tables}
    checkpoint = ROOT / "moeexp" / "checkpoints" / "tiny"
    files = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".json", ".txt")]
    expected |= {str(path.relative_to(ROOT)) for path in files}
    pages = ROOT / "moeexp" / "report" / "html"
    expected |= {str(path.relative_to(ROOT)) for name in ("assets", "templates") for path in (pages / name).iterdir()}
    assert expected <= names


def test_wheel_has_no_top_level_but_ours(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    ours = {"moeexp", "moeexp_kernels", "moeexp_runner"}
    assert {top for top in tops if not top.endswith(".dist-info")} == ours


def test_unpacked_wheel_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    imports = "from moeexp.config.compose import compose; from moeexp.config.schema import conf_dir; "
    code = f"{imports}print(conf_dir()); print(compose(['model=nano']).model.name)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "moeexp" / "conf"), "nano"]


def name_of(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = set(map(name_of, wanted))
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert names <= pinned
    assert not [line for line in lines if "+" in line], "a local version exists on one index only"


# Peers that the benchmarks time where they are installed, what draws the checkpoint's card, and what Hydra's grammar and
# torch's shapes are made of.
OPTIONAL = {"fla", "gemlite", "humming", "matplotlib"}
PARTS = {"antlr4", "sympy"}


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name_of(one) for one in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]}
    known = metadata.packages_distributions()
    lacking = {}
    for folder in ("moeexp", "kernels", "runner"):
        for path in (ROOT / folder).rglob("*.py"):
            for module in imported(path) - set(sys.stdlib_module_names) - OPTIONAL - PARTS:
                names = {name.lower() for name in known.get(module, [module.replace("_", "-")])}
                if not module.startswith("moeexp") and not names & declared:
                    lacking.setdefault(module, str(path.relative_to(ROOT)))
    assert lacking == {}


def imported(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


def test_license_is_apache_2():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
