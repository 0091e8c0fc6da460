"""Whole runs on the GPU through the command line's entry: checks passed, replay bitwise equal to eager."""

import json
from pathlib import Path

import pytest

from moeexp import cli

pytestmark = pytest.mark.gpu

RUN = ["tracker=jsonl", "new_tokens=12", "repeats=2", "eval_bytes=2048"]
CELLS = [
    "model=tiny quant=int4 cuda_graph=true export=eager ops=reference",
    "model=tiny quant=none cuda_graph=true export=eager",
    "model=tiny quant=int8 cuda_graph=true export=eager",
    "model=tiny quant=int4 cuda_graph=true export=eager",
    "model=tiny quant=int4 cuda_graph=false export=eager",
    "model=tiny quant=int4 cuda_graph=true export=eager dtype=float32",
    "model=tiny quant=int4 cuda_graph=true export=eager ops.gdn_decode=einsum",
    "model=tiny quant=int4 cuda_graph=true export=eager ops.gdn_decode=chunked",
    "model=tiny quant=int4 cuda_graph=true export=eager ops.sdpa_decode=tiled",
    "model=tiny quant=int4 cuda_graph=true export=aoti",
    "model=nano quant=int4 cuda_graph=true export=aoti ops=reference prompt_len=70",
    "model=nano quant=int4 cuda_graph=true export=eager batch=2 prompt_len=33",
    "model=small quant=int4 cuda_graph=true export=eager prompt_len=100",
]


@pytest.mark.parametrize("cell", CELLS)
def test_run_is_correct(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = cli.main([*cell.split(), *RUN])
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    assert (code, record["status"]) == (0, "ok"), (record["error"], (record["check"] or {}).get("failures"))
    names = {part["name"] for part in record["check"]["parts"]}
    assert {"trace", "float32", "tokens"} <= names
    assert ("replay" in names) == ("cuda_graph=true" in cell)
    assert record["decode_tok_s"] > 0


def test_transformers_own_decode_is_timed_and_split(tmp_path, monkeypatch):
    """Rung 0 of the ladder."""
    monkeypatch.chdir(tmp_path)
    code = cli.main(["model=tiny", "engine=transformers", "quant=none", "cuda_graph=false", "check=separate", *RUN])
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    assert (code, record["status"]) == (0, "ok"), (record["error"], (record["check"] or {}).get("failures"))
    assert "tokens" in {part["name"] for part in record["check"]["parts"]}
    split = record["time_split"]
    assert record["kernels_per_token"] > 0 and 0 < split["kernels_us"] < split["wall_us"]
    assert split["wall_us"] == pytest.approx(1e6 / record["decode_tok_s"], rel=1e-3), "the step that is published"
