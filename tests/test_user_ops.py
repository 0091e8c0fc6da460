"""Users' own ops: found, refused in one line, recorded, cached by their source, and judged like any other."""

import json
import sys
from pathlib import Path

import pytest
import torch
from moeexp_kernels import registry, user_ops

from moeexp import cli

NANO = ["model=nano", "export=eager", "new_tokens=4", "repeats=1", "tracker=jsonl", "prompt_len=9"]

SDPA = """
from moeexp_kernels.ops.attention_reference import reference_sdpa
from {helper} import SCALE

def right(*, q, qkv, k_cache, v_cache, positions):
    return SCALE * reference_sdpa(q=q, qkv=qkv, k_cache=k_cache, v_cache=v_cache, positions=positions)

def off_by_one_percent(**inputs):
    return 1.01 * right(**inputs)

def breaks(**inputs):
    raise ValueError("cannot be done")

def lacks(*, q, qkv):
    return q

def asks(q, qkv, k_cache, v_cache, positions, window):
    return q

def positional(q, /, qkv, k_cache, v_cache, positions):
    return q

CONSTANT = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A module in the working directory, under a name of its own for each test, with a helper beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    Path(f"{name}_helper.py").write_text("SCALE = 1.0\ndef unused(): pass\n")
    Path(f"{name}.py").write_text(SDPA.format(helper=f"{name}_helper") + f"\nimport {name}_helper\n")
    yield name
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("own_")]:
        del sys.modules[loaded]


def last_record():
    records = sorted(Path("outputs").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(records[-1].read_text())


@pytest.mark.slow
def test_a_right_one_runs_and_is_recorded(module):
    assert cli.main([*NANO, f"ops.sdpa_decode={module}:right"]) == 0
    record = last_record()
    assert record["status"] == "ok" and record["check"]["passed"] and record["decode_tok_s"] > 0
    assert record["ops"]["implementations"]["sdpa_decode"] == f"{module}:right"
    own = record["ops"]["user"]["sdpa_decode"]
    assert own["files"] == [f"{module}.py", f"{module}_helper.py"] and len(own["sha256"]) == 64
    assert record["config"]["ops"]["sdpa_decode"] == f"{module}:right"


@pytest.mark.slow
def test_one_that_is_one_percent_off_is_incorrect(module):
    assert cli.main([*NANO, f"ops.sdpa_decode={module}:off_by_one_percent"]) == 1
    record = last_record()
    assert record["status"] == "incorrect" and record["decode_tok_s"] is None
    assert any("float32" in line for line in record["check"]["failures"])


def test_one_that_raises_fails_its_sweep(module, capsys):
    assert cli.main(["-m", *NANO, f"ops.sdpa_decode={module}:breaks", "launcher.isolation=none"]) == 1
    (record,) = (json.loads(path.read_text()) for path in Path("multirun").rglob("record.json"))
    assert record["status"] == "failed" and record["error"]["type"] == "ValueError"
    assert "error: ValueError during check: trace: cannot be done (traceback: multirun/" in capsys.readouterr().err
    assert cli.main([*NANO, f"ops.sdpa_decode={module}:breaks"]) == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("nowhere_to_be_found:f", ["no module 'nowhere_to_be_found'", "PYTHONPATH"]),
        ("{m}.sub:f", ["'{m}.sub'"]),
        ("{m}:absent", ["{m}.py", "no 'absent'"]),
        ("{m}:CONSTANT", ["is a int, not a function"]),
        ("{m}:lacks", ["lacks k_cache, positions, v_cache", "by keyword, as the reference is: k_cache, positions, q"]),
        ("{m}:asks", ["asks for window"]),
        ("{m}:positional", ["lacks q"]),
        ("{m}:", ["is not of the form module:function"]),
        (":right", ["is not of the form module:function"]),
        ("own_broken:f", ["importing own_broken failed", "ZeroDivisionError"]),
        ("own_exits:f", ["importing own_exits failed", "SystemExit"]),
        ("own_needs:f", ["No module named 'not_installed_anywhere'"]),
    ],
)
def test_what_cannot_be_an_op_is_refused_in_one_line_before_work(module, capsys, name, parts):
    Path("own_broken.py").write_text("1 / 0")
    Path("own_exits.py").write_text("import sys; sys.exit(3)")
    Path("own_needs.py").write_text("import not_installed_anywhere")
    assert cli.main([*NANO, f"ops.sdpa_decode='{name.format(m=module)}'"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ops.sdpa_decode=")
    for part in parts:
        assert part.format(m=module) in line
    assert last_record()["phases_s"] == {}


def test_an_op_of_torch_library_is_read_by_its_schema(module):
    def names(op):
        return user_ops.parameters(registry.OPS["sdpa_decode"][op])

    assert names("splitk") == {"q", "qkv", "k_cache", "v_cache", "positions"} <= names("reference")
    ours = registry.OPS["sdpa_decode"].values()
    user_ops.load("sdpa_decode", "moeexp_kernels.ops.attention_splits:sdpa_decode_splitk", ours)
    with pytest.raises(ValueError, match="lacks q; it is called|lacks q and asks for"):
        user_ops.load("sdpa_decode", "moeexp_kernels.ops.qk_norm_rope:qk_norm_rope", ours)


@pytest.mark.parametrize("changed", ["{m}.py", "{m}_helper.py"])
def test_the_identity_follows_the_sources(module, changed):
    names = {"sdpa_decode": f"{module}:right", "linear": "reference"}
    registry.resolve(default="reference", chosen=names, device="cpu")
    before = registry.identities(names)
    assert before["linear"] == "reference" and before == registry.identities(names)
    path = Path(changed.format(m=module))
    path.write_text(path.read_text() + "\n# other")
    after = registry.identities(names)
    assert after["sdpa_decode"] != before["sdpa_decode"]
    assert after["sdpa_decode"].startswith(f"{module}:right@")


def test_a_result_is_not_taken_for_that_of_another_source(module):
    from moeexp.config import compose
    from moeexp.run.identity import Identities, config_hash

    def hash_of(*overrides):
        cfg = compose.compose([*NANO, *overrides])
        return config_hash(cfg, Identities().of(cfg, gpu=None))

    plain, own = hash_of(), hash_of(f"ops.sdpa_decode={module}:right")
    assert own == hash_of(f"ops.sdpa_decode={module}:right")
    Path(f"{module}.py").write_text(Path(f"{module}.py").read_text() + "\n# other")
    assert hash_of(f"ops.sdpa_decode={module}:right") != own and hash_of() == plain


def test_sources_are_the_users_own(module):
    user_ops.load("sdpa_decode", f"{module}:right", registry.OPS["sdpa_decode"].values())
    assert [path.parent for path in user_ops.sources(f"{module}:right")] == [Path.cwd()] * 2
    assert torch.__file__ not in map(str, user_ops.sources(f"{module}:right"))
