"""Whole runs through the command line's entry, on the CPU, with eager methods."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moeexp_kernels import registry
from moeexp_kernels.ops import linear

from moeexp import cli
from moeexp.config import axes
from moeexp.run import experiment

NANO = ["model=nano", "export=eager", "new_tokens=6", "tracker=jsonl", "prompt_len=21"]
NANO += ["repeats=1", "min_samples=1", "min_time_s=0"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        code = cli.main([*NANO, *overrides])
        records = sorted(Path("outputs").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
        return code, json.loads(records[-1].read_text())

    return run


def parts(record):
    return {part["name"]: part for part in record["check"]["parts"]}


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_float32_run_is_checked_and_published(run, quant):
    code, record = run(f"quant={quant}")
    assert (code, record["status"]) == (0, "ok"), record["check"]
    assert set(parts(record)) == {"trace", "float32", "tokens"}
    assert record["decode_tok_s"] > 0 and record["prefill_tok_s"] > 0 and record["ttft_s"] > 0
    assert len(record["generated_ids"][0]) == 6
    assert record["token_latencies_ms"]["n"] == 5
    assert record["random_weights"] is True and record["bits_per_byte"] is None
    floor = record["bytes_per_token"]
    assert floor["total"] > 0 and floor["counted"] and floor["counted_steps"] == 5
    assert floor["distinct_experts"] == 2, "k, of one sequence"
    assert record["prefill_latencies_ms"]["n"] >= 1 and record["ttft_latencies_ms"]["n"] == 1
    if quant != "none":
        assert record["quantised_coverage"] > 0.9
    assert record["first_token_s"] > 0


def test_bfloat16_run_passes_both_parts(run):
    code, record = run("dtype=bfloat16")
    assert (code, record["status"]) == (0, "ok"), record["check"]["failures"]
    assert {"float32", "timed", "tokens"} <= set(parts(record))


@pytest.mark.slow
@pytest.mark.parametrize("cache", [0, 2**40, None])
def test_batch_of_two(run, monkeypatch, cache):
    monkeypatch.setattr(experiment, "cache_bytes", lambda device: cache)
    code, record = run("batch=2", "new_tokens=12")
    assert (code, record["status"]) == (0, "ok"), record["check"]
    assert len(record["generated_ids"]) == 2
    floor, latencies = record["bytes_per_token"], record["token_latencies_ms"]
    assert floor["counted"] and 2 <= floor["distinct_experts"] <= 4 and floor["cache_bytes"] == cache
    step_s = latencies["mean"] / 1e3
    assert record["decode_tok_s"] == pytest.approx(2 / step_s, rel=1e-4)
    share = floor["total"] / step_s / (floor["read_bandwidth_gb_s"] * 1e9)
    assert record["bandwidth_share"] == (pytest.approx(share, rel=1e-3) if cache == 0 else None)
    assert record["stalls"]["ahead"] == 1 and record["stalls"]["pace_ms"] <= latencies["mean"] * 1.01
    assert record["energy"] is None and record["joules_per_token"] is None and record["kernels_per_token"] is None


def test_what_follows_the_timing_comes_before_what_disturbs_it(run, monkeypatch):
    """Experts are read before another prompt runs, and energy is measured before a profiler slows the host down."""
    order = []
    for name in ("chosen_experts", "token_split", "memory"):
        real = getattr(experiment, name)
        monkeypatch.setattr(experiment, name, lambda *a, real=real, name=name, **k: (order.append(name), real(*a, **k))[1])
    real = experiment.Benchmark.energy
    monkeypatch.setattr(experiment.Benchmark, "energy", lambda self: (order.append("energy"), real(self))[1])
    assert run()[0] == 0
    assert order == ["memory", "chosen_experts", "energy", "token_split"]


def test_one_token_prompt_and_one_new_token(run):
    code, record = run("prompt_len=1", "new_tokens=1")
    assert (code, record["status"]) == (0, "ok"), record["check"]
    assert len(record["generated_ids"][0]) == 1 and record["decode_tok_s"] is None


OFF = [("linear", "float32"), ("gdn_decode", "float32"), ("sdpa_decode", "float32"), ("gdn_decode", "bfloat16")]
OFF += [
    pytest.param(op, "float32", marks=pytest.mark.slow) for op in ("gdn_prefill", "sdpa_prefill", "moe_prefill", "moe_decode")
]


@pytest.mark.parametrize(("op", "dtype"), OFF)
def test_an_op_off_by_one_percent_is_incorrect(run, monkeypatch, op, dtype):
    right = registry.OPS[op]["reference"]
    monkeypatch.setitem(registry.OPS[op], "reference", lambda **inputs: right(**inputs) * 1.01)
    code, record = run(f"dtype={dtype}")
    assert (code, record["status"]) == (1, "incorrect")
    assert not parts(record)["float32"]["passed"]
    assert record["decode_tok_s"] is None and record["prefill_tok_s"] is None and record["token_latencies_ms"] is None


def test_nan_is_incorrect(run, monkeypatch):
    right = linear.reference_linear

    def poisoned(**inputs):
        out = right(**inputs)
        if out.shape[-1] == 256:  # the head
            out[..., 7] = float("nan")
        return out

    monkeypatch.setitem(registry.OPS["linear"], "reference", poisoned)
    code, record = run()
    assert (code, record["status"]) == (1, "incorrect")


def test_check_off_publishes_no_speed(run):
    code, record = run("check=off")
    assert (code, record["status"]) == (0, "ok")
    assert record["decode_tok_s"] is None and record["check"] is None
    assert record["rounds"] is None and record["time_split"] is None and record["telemetry"]["kind"] in ("cpu", "cuda")


def test_prompt_beyond_max_seq_len_is_refused_before_work(run, capsys):
    code = cli.main([*NANO, "prompt_len=60", "max_seq_len=64"])
    assert code == 2
    assert "max_seq_len" in capsys.readouterr().err


def test_cuda_graph_without_cuda_is_refused(capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*NANO, "cuda_graph=true"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and "cuda_graph=false" in err


@pytest.mark.parametrize("edges", [0, 7])
@pytest.mark.parametrize("where", ["graph", "loop"])
def test_pdl_that_no_kernel_can_make_is_not_applicable(run, monkeypatch, where, edges):
    """An experiment never claims an optimisation that did nothing: here the captured step is given, on the CPU."""
    step = SimpleNamespace(pdl_edges=edges)
    graph, loop = (step, None) if where == "graph" else (None, SimpleNamespace(graph=step))
    assert experiment.pdl_edges(SimpleNamespace(graph=graph, loop=loop)) == edges
    assert experiment.pdl_edges(SimpleNamespace(graph=None, loop=None)) is None
    monkeypatch.setattr(experiment, "pdl_edges", lambda session: edges)
    monkeypatch.setattr(axes, "not_applicable", lambda *_: [])
    _, record = run("check=off")
    assert record["ops"]["pdl_edges"] == edges
    assert record["not_applicable"] == (["pdl"] if edges == 0 else [])


def test_what_the_timing_was_is_in_the_record(run):
    code, record = run("repeats=2", "min_time_s=0.4", "min_samples=12")
    assert (code, record["status"]) == (0, "ok")
    assert len(record["rounds"]) >= 2 and sum(entry["n"] for entry in record["rounds"]) == record["token_latencies_ms"]["n"]
    assert record["token_latencies_ms"]["n"] >= 12 and sum(entry["seconds"] for entry in record["rounds"]) >= 0.4
    assert record["telemetry"]["kind"] in ("cpu", "cuda") and record["telemetry"]["n"] >= 3
    assert record["group"] is None and record["design"] is None and record["phase"] is None


def test_a_trace_lies_beside_the_record(run):
    code, record = run("profile=trace")
    assert (code, record["status"]) == (0, "ok")
    (path,) = Path("outputs").rglob("trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    assert record["trace"] == {"file": "trace.json", "tokens": 5, "bytes": path.stat().st_size}
    assert any("aten::" in event.get("name", "") for event in events)
