"""On a GPU: an artifact exported, captured and checked without compiling again; a user's own op in a graph."""

import json
import sys
from pathlib import Path

import pytest

from moeexp import cli, export
from moeexp.stack import artifact_manifest, factory, packages

NANO = ["model=nano", "max_seq_len=96", "new_tokens=6"]
RUN = ["new_tokens=6", "repeats=1", "tracker=jsonl", "prompt_len=9", "cuda_graph=true"]
OWN_OP = """
from moeexp_kernels.ops.attention_splits import sdpa_decode_splitk

def own(*, q, qkv, k_cache, v_cache, positions):
    return sdpa_decode_splitk(q=q, qkv=qkv, k_cache=k_cache, v_cache=v_cache, positions=positions)

def off(**inputs):
    return own(**inputs) * 1.01
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last_record():
    records = sorted(Path("outputs").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(records[-1].read_text())


def test_an_artifact_is_captured_and_checked(monkeypatch, capsys):
    assert export.main([*NANO, "quant=int4", "out=made"]) == 0, capsys.readouterr().err
    made = artifact_manifest.read_manifest(Path("made"))
    assert made["runs_on"]["gpu_arch"].startswith("sm_") and made["config"]["device"] == "cuda"
    for module, name in ((packages, "get_or_compile"), (factory, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("an artifact needs no such work"))
    assert cli.main(["artifact=made", *RUN]) == 0, capsys.readouterr().err
    record = last_record()
    assert record["status"] == "ok" and record["check"]["passed"] and record["decode_tok_s"] > 0
    here = artifact_manifest.here
    monkeypatch.setattr(artifact_manifest, "here", lambda device: here(device) | {"gpu_arch": "sm_10"})
    capsys.readouterr()
    assert cli.main(["artifact=made", *RUN]) == 2
    assert "this is sm_10" in capsys.readouterr().err


@pytest.mark.parametrize(("function", "status"), [("own", "ok"), ("off", "incorrect")])
def test_a_users_op_is_judged(function, status):
    Path("own_sdpa_gpu.py").write_text(OWN_OP)
    sys.modules.pop("own_sdpa_gpu", None)
    overrides = [*NANO, *RUN, "export=eager", f"ops.sdpa_decode=own_sdpa_gpu:{function}"]
    assert cli.main(overrides) == (0 if status == "ok" else 1)
    assert last_record()["status"] == status
