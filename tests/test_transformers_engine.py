"""engine=transformers: the same weights, transformers' own generate, its tokens checked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import EVEN, slow_after
from moeexp_runner.timing import Samples, time_generation
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from moeexp.cli import main
from moeexp.config import sources, validate
from moeexp.config.compose import compose
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.model.dequantise import DequantisedWeights
from moeexp.model.weights import Random, load
from moeexp.record.record import read_record
from moeexp.run import transformers_baseline

QUICK = ["model=nano", "tracker=jsonl", "engine=transformers", "quant=none", "prompt_len=9", "new_tokens=5"]
QUICK += ["repeats=1", "min_samples=1", "min_time_s=0"]


def converted(dtype=torch.float32):
    ours = load(EVEN, Random(EVEN, 0), dtype=dtype, device="cpu", bits=16, group_size=0, skip=NEVER_QUANTISED)
    weights = {i: {k: t.clone() for k, t in DequantisedWeights(ours).layer(i).items()} for i in range(3)}
    return transformers_baseline.convert(ours, EVEN, dtype=dtype), weights, ours


def test_it_has_our_weights_and_takes_ours_away():
    model, weights, ours = converted()
    for index, layer in enumerate(model.model.layers):
        found = layer.state_dict()
        assert found.keys() == weights[index].keys()
        assert all(torch.equal(found[name], weights[index][name]) for name in found)
    assert all(buffer.is_meta for layer in ours.layers for buffer in layer.buffers())


def test_tokens_arrive_one_by_one():
    model, _, _ = converted()
    session, prompt = (
        transformers_baseline.TransformersSession(model, batch=2, max_seq_len=64),
        torch.tensor([[3, 5], [8, 1]]),
    )
    samples = Samples()
    ids = time_generation(session, prompt, 4, samples)
    assert len(ids) == 2 and all(len(row) == 4 for row in ids)
    assert len(samples.ttft_s) == 1 and len(samples.token_s) == 3 and min(samples.token_s) > 0
    seen = []
    assert session.generate(prompt, 4, on_token=lambda row, index: seen.append((row, index))) == ids
    assert seen == [([ids[0][i], ids[1][i]], i) for i in range(4)]
    # The same, without a cache: an argmax of the whole sequence each time.
    full = torch.cat([prompt, torch.tensor(ids)], dim=1)
    logits = model(input_ids=full[:, :-1]).logits
    assert torch.equal(logits[:, 1:].argmax(-1), torch.tensor(ids))
    torch.testing.assert_close(session.prefill(prompt)[:, 0], logits[:, 1], rtol=1e-3, atol=1e-4)
    some = session.prefill(full[:, :-1], torch.tensor([0, 2]))
    torch.testing.assert_close(some, logits[:, [0, 2]], rtol=1e-3, atol=1e-4)


def test_its_decode_steps_are_profiled_and_its_prefill_is_not():
    model, _, _ = converted()
    session, prompt = transformers_baseline.TransformersSession(model, batch=1, max_seq_len=64), torch.tensor([[3, 5, 7]])
    for steps in (1, 4):
        found = transformers_baseline.step_events(session, prompt, steps, ProfilerActivity.CPU, DeviceType.CPU)
        assert [name for name, _, _ in found].count("aten::embedding") == steps
        assert all(start <= end for _, start, end in found)


def test_a_step_that_fails_leaves_no_profiler_behind(monkeypatch):
    model, _, _ = converted()
    session, prompt = transformers_baseline.TransformersSession(model, batch=1, max_seq_len=64), torch.tensor([[3, 5, 7]])

    def fails(tokens, new_tokens, *, on_token):
        on_token([1], 0)
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no memory"):
        patched.setattr(session, "generate", fails)
        transformers_baseline.step_events(session, prompt, 2, ProfilerActivity.CPU, DeviceType.CPU)
    assert transformers_baseline.step_events(session, prompt, 2, ProfilerActivity.CPU, DeviceType.CPU)


def test_a_token_is_split_on_a_gpu_only(monkeypatch):
    kernel = [("gemm", 10.0 * i, 10.0 * i + 4.0) for i in range(6)]
    copies = [("Memcpy DtoH", 10.0 * i + 5.0, 10.0 * i + 6.0) for i in range(6)]
    monkeypatch.setattr(transformers_baseline, "step_events", lambda session, prompt, steps: kernel + copies)
    session = SimpleNamespace(device=torch.device("cuda"))
    found = transformers_baseline.profile_steps(session, torch.tensor([[1]]), 3, step_us=50.0)
    assert found["kernels_per_token"] == found["time_split"]["kernels"] == found["time_split"]["copies"] == 2
    assert found["time_split"]["wall_us"] == 50 and found["time_split"]["kernels_us"] == 8
    assert transformers_baseline.profile_steps(session, torch.tensor([[1]]), 0, step_us=50.0) == {}
    session.device = torch.device("cpu")
    assert transformers_baseline.profile_steps(session, torch.tensor([[1]]), 3, step_us=50.0) == {}


@pytest.mark.slow
def test_bits_per_byte_are_those_of_our_methods(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["model=tiny", "tracker=jsonl", "quant=none", "prompt_len=9", "new_tokens=2", "eval_bytes=600"]
    arguments += ["repeats=1", "min_samples=1", "min_time_s=0", "check=off", "export=eager"]
    for engine in ("moeexp", "transformers"):
        assert main([*arguments, f"engine={engine}"]) == 0
    ours, theirs = (record["bits_per_byte"] for record in map(read_record, sorted(Path("outputs").rglob("record.json"))))
    assert 1 < theirs < 2 and abs(ours - theirs) < 1e-3


@pytest.mark.parametrize("cache", slow_after(1, [None, 0, 2**40]))
@pytest.mark.parametrize("more", [[], ["dtype=bfloat16", "batch=2"]])
def test_a_run(tmp_path, monkeypatch, more, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers_baseline, "cache_bytes", lambda device: cache)
    assert main([*QUICK, *more]) == 0
    (record,) = map(read_record, Path("outputs").rglob("record.json"))
    assert record["check"]["passed"] and record["decode_tok_s"] > 0 and record["stalls"] is None
    floor, latencies = record["bytes_per_token"], record["token_latencies_ms"]
    assert (floor["counted"], floor["counted_steps"], floor["cache_bytes"]) == (True, 4, cache)
    assert floor["distinct_experts"] == 2 if not more else 2 <= floor["distinct_experts"] <= 4
    batch = record["config"]["batch"]
    assert record["decode_tok_s"] == pytest.approx(1e3 * batch / latencies["mean"], rel=1e-4)
    share = floor["total"] * record["decode_tok_s"] / batch / (floor["read_bandwidth_gb_s"] * 1e9)
    assert record["bandwidth_share"] == (pytest.approx(share, rel=1e-6) if cache == 0 else None)
    assert record["ops"]["implementations"]["engine"].startswith("transformers ")
    assert {"dispatch", "state", "export", "ops"} <= set(record["not_applicable"])
    assert record["kernels_per_token"] is None and record["time_split"] is None and record["memory_gib"]["weights"] > 0


def test_a_wrong_token_fails_its_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = transformers_baseline.TransformersSession.generate

    def wrong(self, tokens, new_tokens, *, on_token=None):
        ids = real(self, tokens, new_tokens, on_token=on_token)
        return [[*row[:-1], (row[-1] + 1) % 256] for row in ids]

    monkeypatch.setattr(transformers_baseline.TransformersSession, "generate", wrong)
    assert main(QUICK) == 1
    (record,) = map(read_record, Path("outputs").rglob("record.json"))
    assert record["status"] == "incorrect" and record["decode_tok_s"] is None


@pytest.mark.slow
def test_the_reference_takes_the_experts_that_were_chosen(tmp_path, monkeypatch):
    """Not those that it would choose itself: in bfloat16 a near-tie of two experts is no error of the token after it."""
    monkeypatch.chdir(tmp_path)
    real, given = transformers_baseline.run_reference, []

    def watched(*args, expert_ids=None, **kwargs):
        given.append(expert_ids)
        return real(*args, expert_ids=expert_ids, **kwargs)

    def other(router, inputs, output):
        logits, _, ids = output
        ids = (ids + 1) % 8
        scores = logits.float().softmax(-1).gather(-1, ids)
        return logits, scores / scores.sum(-1, keepdim=True), ids

    class Swapped(transformers_baseline.TransformersSession):
        def __init__(self, model, **sizes):
            super().__init__(model, **sizes)
            model.model.layers[1].mlp.gate.register_forward_hook(other)

    monkeypatch.setattr(transformers_baseline, "run_reference", watched)
    monkeypatch.setattr(transformers_baseline, "TransformersSession", Swapped)
    assert main([*QUICK, "batch=2"]) == 0
    (ids,) = given
    (record,) = map(read_record, Path("outputs").rglob("record.json"))
    assert ids.shape[1:3] == (2, 9 + 5 - 1) and record["check"]["passed"]


@pytest.mark.slow
def test_tokens_that_do_not_repeat_fail_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = transformers_baseline.choices

    def otherwise(session, prompt, new_tokens):
        ids, experts = real(session, prompt, new_tokens)
        return [[*row[:-1], (row[-1] + 1) % 256] for row in ids], experts

    monkeypatch.setattr(transformers_baseline, "choices", otherwise)
    assert main(QUICK) == 1
    (record,) = map(read_record, Path("outputs").rglob("record.json"))
    assert record["status"] == "incorrect" and "the timed generation chose other tokens" in record["check"]["failures"][0]


@pytest.mark.parametrize(
    "setting, words",
    [("quant=int4", "use quant=none"), ("eos=true", "use eos=false"), ("cuda_graph=true", "cuda_graph=false")],
)
def test_what_it_cannot_do_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        validate.validate(compose([*QUICK, setting]), cuda_available=True)


def test_weights_that_cannot_fit_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**40))
    config = compose(["model=qwen3_5_35b_a3b", "engine=transformers", "quant=none", "dtype=bfloat16", "device=cuda"])
    arch = sources.load_architecture(config.model)
    with pytest.raises(ValueError, match="needs about .* GiB"):
        transformers_baseline._check_memory(config, arch)
