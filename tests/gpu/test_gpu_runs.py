"""Whole runs on the GPU through the command line's entry: checks passed, replay bitwise equal to eager."""

import json
from pathlib import Path

import pytest

from moeexp import cli
from moeexp.config.compose import compose
from moeexp.config.sources import load_architecture

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
    "model=tiny quant=int4 cuda_graph=loop export=eager verify_tokens=3",
    "model=tiny quant=int4 cuda_graph=loop export=eager verify_tokens=4 ops.linear=tile ops.moe_decode=tile",
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
    assert ("replay" in names) == ("cuda_graph=false" not in cell)
    assert ({"verify trace", "verify float32", "verify timed", "verify tokens"} <= names) == ("verify_tokens" in cell)
    assert (record["verify"] is None) == ("verify_tokens" not in cell)
    floor, batch, latencies = record["bytes_per_token"], record["config"]["batch"], record["token_latencies_ms"]
    assert record["decode_tok_s"] == pytest.approx(1e3 * batch / latencies["mean"], rel=1e-4)
    assert record["kernels_per_token"] == pytest.approx(record["time_split"]["kernels"], abs=0.05)
    k = load_architecture(compose(cell.split()).model).num_experts_per_tok
    assert floor["counted"] and k <= floor["distinct_experts"] <= k * batch and floor["cache_bytes"] > 2**20
    assert (record["bandwidth_share"] is None) == (floor["total"] <= floor["cache_bytes"])


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


@pytest.mark.parametrize(
    "cell", ["cuda_graph=loop export=aoti", "cuda_graph=true export=eager batch=4", "cuda_graph=false export=eager"]
)
def test_a_budget_places_every_kernel_of_ours(cell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiment=profile", "model=tiny", "quant=int4", *cell.split(), "tracker=jsonl", "new_tokens=12"]) == 0
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    budget, layers = record["step_budget"], load_architecture(compose(["model=tiny"]).model).num_hidden_layers
    assert sum(row["bytes"] for row in budget["rows"]) == record["bytes_per_token"]["total"]
    assert sum(row["calls"] for row in budget["rows"]) == pytest.approx(record["kernels_per_token"], abs=0.5)
    assert budget["layers"] is not None and not [row for row in budget["rows"] if row["bytes"] and row["kernel"] is None]
    calls = {(row["op"], row["kernel"]): row["calls"] for row in budget["rows"]}
    assert calls["router", "choose_experts_kernel"] == calls["router", "gemv_kernel"] == layers
    adds = [sum(one["adds_us"] for one in budget[key]) for key in ("rows", "layers")]
    assert adds == pytest.approx([record["time_split"]["kernels_us"]] * 2, rel=0.05)
    assert "sum of kernels" in capsys.readouterr().out
