"""The table of faults names tests that are there."""

import ast
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

TESTS = Path(__file__).resolve().parents[1]
README = (TESTS / "faults" / "README.md").read_text()
ROWS = [row.strip("| ").split(" | ") for row in README.splitlines() if row.startswith("| ")][2:]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
NOT_BUILT = "not built yet"


@functools.cache
def names_in(file):
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_every_row_has_tests_that_are_there(row):
    fault, happens, tests = row
    assert fault and happens
    named = NAMED.findall(tests)
    assert named or tests == NOT_BUILT, f"no test beside {fault}"
    assert tests.count("::") == len(named), f"a name that cannot be read: {tests}"
    for file, name in named:
        assert name.startswith("test_") and name in names_in(file), f"{file}::{name} is not there"


def test_every_file_of_faults_is_in_the_table():
    here = {f"faults/{path.name}" for path in (TESTS / "faults").glob("test_*.py")}
    assert here == {file for file, _ in NAMED.findall(README) if file.startswith("faults/")}
    assert len(ROWS) >= 26 and [row[0] for row in ROWS if row[2] == NOT_BUILT], "and what is not built says so"


def skipped(nodeid, reason):
    report = SimpleNamespace(skipped=True, nodeid=nodeid, longrepr=("file", 1, f"Skipped: {reason}"), outcome="skipped")
    conftest.refuse_unlisted_skip(report)
    return report.outcome


def test_a_skip_that_is_not_listed_fails():
    assert skipped("tests/gpu/test_gpu_axes.py::test_x", conftest.NO_GPU) == "skipped"
    assert skipped("tests/test_session.py::test_x", conftest.NO_GPU) == "failed"
    assert skipped("tests/gpu/test_gpu_axes.py::test_x", "not today") == "failed"
