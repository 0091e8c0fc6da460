"""One table of axes: a field of the schema with its row is all that an axis needs, beside the place where it acts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Before `dtype` in the schema: an axis that is part of all there is, and a field of housekeeping.
FIELDS = """
    cooling: str = axis(
        "what happens before a round of timing", default="none", role=AXIS, values={"none": "", "pause": "a note of 1 ms"},
        part_of=[WEIGHTS, ARTIFACT, COMPILE_KEY], no_effect=(TRANSFORMERS,), only={TRANSFORMERS: "none"},
    )
    errand: str = axis("what the run is for", default="nothing", role=HOUSEKEEPING)
"""
# First in a round of the benchmark.
ACTS = """
        if self.cfg.cooling == "pause":
            time.sleep(0.001)
            self.record.note("it paused")
"""
LOOK = """
import contextlib, io, json, sys
from pathlib import Path
from moeexp import cli, figures
from moeexp.config import axes
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.schema import conf_dir
from moeexp.config.validate import validate
from moeexp.record.record import read_record
from moeexp.report.command_line import command_of
from moeexp.report.runs import is_workload, runs_of
from moeexp.run.identity import config_hash
from moeexp.stack.compile_cache import MethodSpec, key_of

def config(*overrides):
    return resolve(compose(["model=nano", *overrides]), cuda_available=False)

def refusal(*overrides):
    try:
        validate(compose(["model=nano", *overrides]), cuda_available=False)
    except ValueError as error:
        return str(error)

def printed(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.main(list(arguments))
    return code, out.getvalue()

identity = {"weights": {"seed": 0}, "heldout": None, "tokenizer": None, "software": {}}
several = [config(*one) for one in ([], ["cooling=pause"], ["errand=shopping"])]
found = {
    "help": printed("--help")[1],
    "refused": refusal("cooling=ice"),
    "refused there": refusal("cooling=pause", "engine=transformers", "quant=none"),
    "hashes": [config_hash(one, identity) for one in several],
    "keys": [key_of(MethodSpec("decode", axes.compiled_in(one))) for one in several],
    "processes": [axes.shares_weights(one) for one in several],
    "fixed": "cooling" in axes.FIXED,
    "not applicable": axes.not_applicable(config("engine=transformers", "quant=none")),
    "workload": is_workload("cooling"),
    "check": figures.main(["--check", "docs/axes.md"]),
    "write": figures.main(["docs/axes.md"]),
    "check again": figures.main(["--check", "docs/axes.md"]),
    "page": Path("docs/axes.md").read_text(),
}
run = ["model=nano", "export=eager", "tracker=jsonl", "new_tokens=4", "repeats=1", "min_samples=1", "min_time_s=0"]
found["codes"] = [printed(*run, *more)[0] for more in (["cooling=pause", "errand=shopping"], [])]
records = [read_record(path) for path in sorted(Path("outputs").rglob("record.json"))]
found["notes"] = {record["config"]["cooling"]: "it paused" in record["notes"] for record in records}
found["axes"] = list(runs_of(records)[0].settings)
found["command"] = next(command_of(one) for one in records if one["config"]["cooling"] == "pause")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a copy of the sources says of two more fields."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("moeexp", "conf", "docs", "results"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    insert(copy / "moeexp" / "config" / "schema.py", FIELDS, before="    dtype: str = axis(")
    insert(copy / "moeexp" / "run" / "benchmark.py", ACTS, before="        prefills, firsts, tokens = ")
    path = os.pathsep.join(map(str, (copy, ROOT / "kernels", ROOT / "runner")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def insert(path, text, *, before):
    source = path.read_text()
    assert source.count(before) == 1
    path.write_text(source.replace(before, text.removeprefix("\n") + before))


def test_it_is_validated(found):
    assert found["refused"] == "cooling=ice is not a value of cooling; allowed: none, pause"
    assert found["refused there"] == "engine=transformers has no cooling=pause: use cooling=none, or engine=moeexp"


def test_it_is_in_help_and_in_the_docs_table(found):
    axes, housekeeping = found["help"].split("== Axes ==")[1].split("== Housekeeping ==")
    assert "cooling" in axes and "what happens before a round of timing: none | pause (a note of 1 ms)" in axes
    assert "errand" in housekeeping and "\ncooling: none\n" in found["help"]
    assert (found["check"], found["write"], found["check again"]) == (1, 0, 0)
    (row,) = [line for line in found["page"].splitlines() if line.startswith("| `cooling` |")]
    assert "| `none` · `pause` (a note of 1 ms) | `none` | shared weights, artifact, compile key, identity |" in row
    assert "`engine=transformers`" in row


def test_it_is_part_of_what_its_row_says(found):
    for what in ("hashes", "keys", "processes"):
        plain, pause, errand = found[what]
        assert plain != pause and plain == errand, what
    assert found["fixed"] and "cooling" in found["not applicable"] and "errand" not in found["not applicable"]


def test_it_acts_is_compared_and_is_run_again(found):
    assert found["codes"] == [0, 0]
    assert found["notes"] == {"pause": True, "none": False}
    assert found["axes"] == ["cooling"] and not found["workload"]
    assert "cooling=pause" in found["command"] and "errand" not in found["command"]
