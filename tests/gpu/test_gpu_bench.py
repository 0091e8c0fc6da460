"""The kernel bench and the tuner on the device, on the ops that take least."""

from __future__ import annotations

import json

import kernels_common as common
import pytest
import torch
from moeexp_kernels.bench import measure, timing
from moeexp_kernels.bench.__main__ import main
from moeexp_kernels.bench.case import red
from moeexp_kernels.bench.cases import BUILDERS, Spec, build, specs
from moeexp_kernels.bench.layers import Layers
from moeexp_kernels.bench.shapes import FULL
from moeexp_kernels.parts import tuning
from moeexp_kernels.parts.graph_edges import add_pdl_edges


@pytest.mark.parametrize("spec", specs(FULL, list(BUILDERS), [8], quick=True), ids=str)
def test_every_case_agrees_with_its_reference(spec):
    with torch.no_grad():
        assert red(build(spec, FULL, "cuda", cold=0).check()) is None


@pytest.mark.parametrize(
    "spec",
    [Spec("gdn", "decode", 1), Spec("gdn", "decode", 2), Spec("gdn", "prefill", 512), Spec("sample", "decode", 2)],
    ids=str,
)
def test_the_peers_that_are_here_are_right_before_and_after_their_replays(spec):
    """Those of an op with a state, where flash-linear-attention or ExecuTorch is installed; and torch, which always is."""
    with torch.no_grad():
        case, absent = build(spec, FULL, "cuda", cold=0), measure.unavailable_sources()
        peers = [
            make(case) for name, module in measure.SOURCES.items() if name not in absent
            for make in module.OPS.get(spec.op, [])
        ]  # fmt: skip
        assert peers or spec.op == "gdn"
        for peer in filter(None, peers):
            assert red(peer.check()) is None, peer.name
            samples = timing.graph_samples(peer.call, peer.copies, calls=2 * len(peer.copies))
            assert min(samples) > 0 and red(peer.check()) is None, peer.name


@pytest.mark.parametrize("sequences, tokens", [(1, 1), (8, 1), (16, 1), (1, 3), (2, 8)])
def test_the_chain_of_layers_is_the_same_to_the_bit_with_pdl(sequences, tokens):
    with torch.no_grad():
        chain = Layers(FULL, "cuda", sequences, tokens)
        fresh = [{name: tensor.clone() for name, tensor in layer.state.items()} for layer in chain.layers]
        chain.call(chain.x)
        results, graphs = [], []
        for pdl in (False, True):
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                x = chain.x
                for _ in range(3):
                    x = chain.call(x)
            changed = add_pdl_edges(graph.raw_cuda_graph(), pairs=timing.PDL["all" if pdl else "none"])
            assert (changed > 60) if pdl else (changed == 0)
            graph.instantiate()
            graphs.append(graph)
            for _ in range(10 if pdl else 1):
                for state, layer in zip(fresh, chain.layers, strict=True):
                    for name, tensor in state.items():
                        layer.state[name].copy_(tensor)
                graph.replay()
                torch.cuda.synchronize()
                results.append([x.clone(), *(tensor.clone() for layer in chain.layers for tensor in layer.state.values())])
        assert torch.isfinite(results[0][0]).all()
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
        assert 5 < chain.microseconds() < 500 * sequences * tokens


@pytest.mark.alone
def test_a_read_of_everything_is_near_what_a_copy_shows():
    """Bandwidth cannot exceed the card's, and a plain read should come close to a copy's traffic."""
    device = torch.device("cuda")
    reader = timing.Reader(device)
    source = torch.empty(1 << 28, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # A kernel: what copies a tensor from a graph is slower on some GPUs.
    samples = timing.graph_samples(lambda copy: torch.add(copy["x"], 1, out=target), [{"x": source}], calls=4)
    copied = 2 * source.nbytes / min(samples) * 1e6
    assert 0.8 * copied < reader.bandwidth < 1.5 * copied
    assert reader.microseconds(1 << 20) < reader.microseconds(1 << 26)


def test_bench_writes_a_table_and_its_numbers(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["router", "sample", "--quick", "--json", str(path), "--jobs", "1"]) == 0
    document = json.loads(path.read_text())
    assert [row["op"] for row in document["rows"]] == ["router", "router", "sample"]
    assert [row["tables"].keys() for row in document["rows"][:2]] == [{"router_gemv"}, {"router_limbs"}]
    for row in document["rows"]:
        assert row["problem"] is None and row["us"] > 0 and 0 < row["share"] < 1.2 and len(row["samples"]) >= 10
    assert [peer["name"] for peer in document["rows"][2]["peers"]] == ["argmax"]
    out = capsys.readouterr().out
    assert document["environment"]["gpu"] in out and "| router |" in out


def test_tune_writes_the_table_of_this_architecture(tmp_path, monkeypatch):
    name = tuning.current_architecture()
    for table in (name, tuning.DEFAULT):
        source = tuning.FOLDER / f"{table}.json"
        if source.exists():
            (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    try:
        assert main(["tune", "router", "--jobs", "1", "--budget", "60"]) == 0
        written = json.loads((tmp_path / f"{name}.json").read_text())
        key = f"plain16/{FULL.experts}x{FULL.hidden}"
        assert set(written["router_gemv"][key]) == {"BLOCK_N", "TILES", "CACHE", "num_warps", "TOGETHER", "VECTOR"}
        assert written["_about"]["device"] == torch.cuda.get_device_name()
        assert tuning.source("router_gemv", key) == name
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_two_rows_of_the_table_give_the_same_result():
    """What the tuner relies on: a launch parameter changes the time, and no more than the order of sums."""
    spec = specs(FULL, ["moe"], [1], quick=True)[0]
    case = build(spec, FULL, "cuda", cold=0)
    op, key = case.tuned[0]
    first = case.call(**case.copies[0])
    with tuning.override(op, key, {**tuning.lookup(op, key), "EACH": 1}):
        second = case.call(**case.copies[0])
    common.assert_close_ratio(second.float(), first.float(), 1e-3)
