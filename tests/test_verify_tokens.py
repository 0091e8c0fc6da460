"""A step of several tokens of each sequence: what it computes, that the check judges it, and what is said of its time. On a CPU,
where graphs are the same calls made eagerly."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import random_tokens
from kernels_common import assert_close_ratio
from moeexp_kernels import registry
from moeexp_runner import timing
from rich.console import Console

from moeexp import cli
from moeexp.check.traces import record_trace
from moeexp.check.verify import verify
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.report.terminal import print_run
from moeexp.run import benchmark
from moeexp.run.benchmark import Benchmark
from moeexp.stack.factory import build_model, build_stack
from moeexp.stack.packages import package_specs

BASE = ["model=nano", "quant=int4", "max_seq_len=96", "export=eager", "new_tokens=12", "dtype=float32", "verify_tokens=3"]
PROMPT = random_tokens(2, 21, vocab=256)


def configured(*overrides, cuda_graph=False):
    """`cuda_graph` is set past the rules, which refuse it without CUDA."""
    cfg = resolve(compose([*BASE, "batch=2", *overrides]), cuda_available=False)
    cfg.cuda_graph = cuda_graph
    return cfg


@pytest.fixture(scope="module")
def model(phases):
    return build_model(configured(), phases)


@pytest.fixture
def stack(model, phases):
    def build(*overrides, **more):
        return build_stack(configured(*overrides, **more), model, phases)

    return build


@pytest.mark.parametrize("state", ["shared", "explicit"])
@pytest.mark.parametrize("cuda_graph", [False, "decode", "loop", "all"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_is_as_many_decode_steps(stack, state, cuda_graph, count):
    """With some left over, which are decode steps."""
    built = stack(f"verify_tokens={count}", f"state={state}", cuda_graph=cuda_graph)
    fed = random_tokens(2, 11, seed=5, vocab=256)
    alone, together = (record_trace(built, PROMPT, 12, forced=fed, together=n) for n in (1, count))
    assert built.session.length == 21 + 11
    assert torch.equal(together.token_ids, alone.token_ids) and torch.equal(together.expert_ids, alone.expert_ids)
    assert_close_ratio(together.logits, alone.logits, 1e-5)
    for name, tensor in together.states.items():
        assert_close_ratio(tensor, alone.states[name], 1e-5, name)


def test_what_a_session_refuses_leaves_it_as_it_was(stack):
    session = stack().session
    session.prefill(PROMPT)
    before = session.arena.snapshot()
    for tokens, message in (
        (PROMPT[:, :2].contiguous(), "3. tokens, got .2, 2."),
        (PROMPT[:1, :3].contiguous(), "got .1, 3."),
        (PROMPT[:, :3].int(), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            session.verify(tokens)
    session.prefill(random_tokens(2, 73, vocab=256))
    with pytest.raises(ValueError, match="max_seq_len=96"):
        session.verify(PROMPT[:, :3].contiguous())
    assert session.length == 94 and before.keys() == session.arena.snapshot().keys()
    with pytest.raises(RuntimeError, match="no step of several tokens"):
        stack("verify_tokens=0").session.verify(PROMPT[:, :3].contiguous())
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.verify(PROMPT[:, :3].contiguous())


def names_and_verdict(cfg, model, phases):
    verdict = verify(cfg, build_stack(cfg, model, phases), PROMPT, phases)
    return [part["name"] for part in verdict["parts"] if part["name"].startswith("verify ")], verdict


def test_the_check_judges_it(model, phases):
    names, verdict = names_and_verdict(configured(), model, phases)
    assert verdict["passed"] and names == ["verify trace", "verify float32", "verify tokens"]


@pytest.mark.slow
def test_the_check_judges_it_in_bfloat16(phases):
    cfg = configured("dtype=bfloat16")
    names, verdict = names_and_verdict(cfg, build_model(cfg, phases), phases)
    assert verdict["passed"], verdict["failures"]
    assert names == ["verify trace", "verify float32", "verify timed", "verify tokens"]


@pytest.mark.parametrize("op", ["gdn_decode", "sdpa_decode"])
def test_a_fault_in_it_alone_fails_the_check(model, phases, monkeypatch, op):
    right = registry.OPS[op]["reference"]

    def wrong(**arguments):
        result = right(**arguments)
        result[:, 1:] *= 1.01  # of the tokens behind the first of a call
        return result

    monkeypatch.setitem(registry.OPS[op], "reference", wrong)
    _, verdict = names_and_verdict(configured(), model, phases)
    assert not verdict["passed"] and all(line.startswith("verify ") for line in verdict["failures"]), verdict["failures"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("verify_tokens=1", "verify_tokens=1 is a decode step: use 2 to 32, or 0"),
        ("verify_tokens=33", "at most 32"),
        ("dispatch=single", "dispatch=single has no such two: use dispatch=dual"),
        ("dispatch=token_by_token", "use dispatch=dual"),
        ("new_tokens=3", "use new_tokens=4 or more"),
        ("engine=transformers quant=none", "engine=transformers has no verify_tokens=3: use verify_tokens=0"),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(compose([*BASE, *overrides.split()]), cuda_available=False)


def test_its_method_is_one_more_and_the_others_stay_as_they_are():
    with_it, without = (package_specs(configured("export=aoti", f"verify_tokens={count}")) for count in (3, 0))
    assert with_it[:2] == without and [(spec.method, spec.count) for spec in with_it[2:]] == [("verify", 3)]
    ops = with_it[2].settings["ops"]
    assert "gdn_decode" in ops and "gdn_prefill" not in ops and "sample" not in ops


@pytest.mark.slow
@pytest.mark.parametrize("export", ["aoti", "compile"])
def test_a_compiled_one_is_the_eager_one(stack, export):
    fed = random_tokens(2, 11, seed=5, vocab=256)
    eager, compiled = (
        record_trace(stack("verify_tokens=5", f"export={how}"), PROMPT, 12, forced=fed, together=5) for how in ("eager", export)
    )
    assert_close_ratio(compiled.logits, eager.logits, 1e-5)
    assert torch.equal(compiled.expert_ids, eager.expert_ids)


# --- timing ---


class Session:
    """A prefill takes 0.5 s, a token of a generation 0.25 s, a step of several 0.4 s."""

    batch, device = 2, torch.device("cpu")

    def __init__(self, clock):
        self.clock, self.verified = clock, []

    def reset(self):
        pass

    def prefill(self, tokens):
        self.clock.now += 0.5

    def verify(self, tokens):
        self.clock.now += 0.4
        self.verified.append(tokens.tolist())

    def generate(self, tokens, new_tokens, *, on_token):
        for index in range(new_tokens):
            self.clock.now += 0.25
            on_token([index, 10 + index], index)
        return [list(range(new_tokens)), list(range(10, 10 + new_tokens))]


def benched(monkeypatch, **settings):
    clock = SimpleNamespace(now=100.0)
    for module in (timing.time, benchmark.time):
        monkeypatch.setattr(module, "perf_counter", lambda: clock.now)
    config = dataclasses.replace(compose(["model=nano", "batch=2"]), min_time_s=0.0, min_samples=1, **settings)
    record = SimpleNamespace(latencies_ms=[], prefill_ms=[], ttft_ms=[])
    bench = Benchmark(config, Session(clock), torch.zeros(2, 6, dtype=torch.int64), None, record)
    bench.warm_up()
    while not bench.enough():
        bench.round()
    return bench


def test_steps_are_over_what_the_round_before_chose(monkeypatch):
    bench = benched(monkeypatch, new_tokens=9, verify_tokens=3, repeats=3)
    # A warm-up; then in the second and third round the 8 tokens that were fed, of which 2 make no whole step.
    steps = [[[0, 1, 2], [10, 11, 12]], [[3, 4, 5], [13, 14, 15]]]
    assert bench.session.verified == [[[0] * 3] * 2, *steps, *steps]
    found = bench.values()
    assert found["verify"] == {"tokens": 3, "passes": 2, "steps": 4, "step_ms": 400.0, "decode_steps": 1.6}
    assert found["decode_tok_s"] == 2 / 0.25, "and no time of theirs is decoding's"


def test_one_round_is_not_enough(monkeypatch):
    bench = benched(monkeypatch, new_tokens=4, verify_tokens=2, repeats=1)
    assert len(bench.rounds) == 2 and bench.values()["verify"]["passes"] == 1
    assert "verify" not in benched(monkeypatch, new_tokens=4, repeats=2).values()


def test_a_run_records_and_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["model=nano", "export=eager", "new_tokens=8", "verify_tokens=2", "repeats=2", "min_samples=1", "min_time_s=0"]
    arguments += ["tracker=jsonl", "eval_bytes=0"]
    assert cli.main([*arguments, "hydra.run.dir=on"]) == 0
    assert cli.main([*arguments, "hydra.run.dir=off", "check=off"]) == 0
    on, off = (json.loads(Path(name, "record.json").read_text()) for name in ("on", "off"))
    assert on["verify"]["tokens"] == 2 and on["verify"]["step_ms"] > 0 and on["verify"]["steps"] >= 3
    assert off["verify"] is None, "without a check no time is published"
    capsys.readouterr()
    print_run(on, path=Path("on/record.json"), console=Console(width=200))
    assert "2 tokens of a sequence in" in capsys.readouterr().out
