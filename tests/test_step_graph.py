"""Steps captured with either kind of state. The graph is a fake here: it runs what was captured into the same outputs."""

import contextlib
from operator import is_
from types import SimpleNamespace

import pytest
import torch
from common import EVEN, build_session, load_model, random_tokens, reference_ops, same_state
from moeexp_runner import step_graph
from moeexp_runner.arena import Arena
from moeexp_runner.binding import CompiledMethod
from moeexp_runner.explicit import ExplicitState
from moeexp_runner.sampler import Sampler
from moeexp_runner.session import Session

from moeexp.config.compose import compose
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.model.weights import Random
from moeexp.run.benchmark import Benchmark
from moeexp.stack.methods import MODULES


class FakeGraphed:
    """`GraphedMethod` in which a capture runs the method once and keeps what it returns, as graph memory."""

    fail = None
    made: list["FakeGraphed"] = []

    def __init__(self, method, inputs, **options):
        self.made.append(self)
        self.pool = None
        self.method, self.inputs, self.state, self.output, self.replays = method, inputs, "eager", None, 0

    def warm(self):
        assert self.state == "eager"
        for _ in range(3):
            self.method(*self.inputs)
        self.state = "warm"

    def capture(self):
        assert self.state == "warm"
        if FakeGraphed.fail is not None:
            self.state = "eager"
            raise RuntimeError(FakeGraphed.fail)
        self.output, self.state = self.method(*self.inputs), "captured"

    def replay(self, *inputs):
        assert self.state == "captured"
        assert all(given is static for given, static in zip(inputs, self.inputs, strict=True))
        self.replays += 1
        for kept, new in zip(flat(self.output), flat(self.method(*self.inputs)), strict=True):
            kept.copy_(new)
        return self.output

    def invalidate(self):
        self.state, self.output = "eager", None

    def close(self):
        self.state, self.output = "closed", None


def flat(output):
    return [output] if isinstance(output, torch.Tensor) else [tensor for part in output for tensor in flat(part)]


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(step_graph, "GraphedMethod", FakeGraphed)
    monkeypatch.setattr(step_graph, "can_capture", lambda tensor: True)
    monkeypatch.setattr(FakeGraphed, "fail", None)
    monkeypatch.setattr(FakeGraphed, "made", [])


def graphs_of(step):
    """The graphs that a step was captured in."""
    return [graph for graph in FakeGraphed.made if graph.method.__self__ is step]


def build(*, explicit=False, wrap=lambda method: method, **options):
    model, ops = load_model(Random(EVEN, 0)), reference_ops()
    arena = Arena(state_shapes(EVEN, batch=1, max_seq_len=96, dtype=torch.float32), device="cpu")
    how = {"state_names": tuple(arena.tensors)} if explicit else {"attached_state": arena.tensors}
    valid_len = options.get("cuda_graph") == "all"
    return Session(
        prefill=wrap(MODULES["prefill"](model, ops, padded=valid_len, **how)),
        decode=wrap(MODULES["decode"](model, ops, **how)),
        sample=Sampler(ops["sample"]),
        arena=ExplicitState(arena) if explicit else arena,
        batch=1,
        max_seq_len=96,
        vocab_size=EVEN.vocab_size,
        device=torch.device("cpu"),
        padded=valid_len,
        **options,
    )


PROMPT = random_tokens(1, 13)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cuda_graph", ["decode", "loop", "all"])
def test_replays_decode_what_the_methods_do(captured, explicit, cuda_graph):
    expected = build_session(seed=0).generate(PROMPT, 9)
    session = build(explicit=explicit, cuda_graph=cuda_graph, prefill_graph_lengths=[4, 16])
    step = session.graph or session.loop.graph
    assert [graph.state for graph in graphs_of(step)] == ["captured"] * (2 if explicit else 1)
    for count in (9, 4, 9):  # an odd and an even number of steps before the next prompt
        assert session.generate(PROMPT, count)[0] == expected[0][:count]
    if session.prefill_graphs is not None:
        assert [sum(g.replays for g in graphs_of(each)) for each in session.prefill_graphs.graphs.values()] == [0, 3]
    if explicit:
        to_back, from_back = (graph.replays for graph in graphs_of(step))
        assert to_back + from_back == 8 + 3 + 8 and to_back - from_back == 1, "steps swap the two sets"


@pytest.mark.parametrize("explicit", [False, True])
def test_graphs_that_own_their_memory_are_launched_once_before_anything_reads_it(captured, monkeypatch, explicit):
    monkeypatch.setattr(step_graph, "memory_comes_with_a_launch", lambda: True)
    launched = []
    warm = FakeGraphed.warm

    def check(graph):
        launched.append(graph)
        assert all(earlier.replays == 1 for earlier in launched[:-1])
        warm(graph)

    monkeypatch.setattr(FakeGraphed, "warm", check)
    session = build(explicit=explicit, cuda_graph="all", prefill_graph_lengths=[4, 16])
    assert len(launched) == (4 if explicit else 3) and launched[-1].replays == 1
    assert session.generate(PROMPT, 9) == build_session(seed=0).generate(PROMPT, 9)


@pytest.mark.parametrize("stop", [1, 2])
def test_explicit_state_outlives_the_graph_that_holds_it(captured, stop):
    session = build(explicit=True, cuda_graph="decode")
    plain = build_session(seed=0)
    for each in (session, plain):
        each.prefill(PROMPT)
        for _ in range(stop):
            each.decode(PROMPT[:, :1].contiguous())
    at_front = [tensor is session.arena.front[name] for name, tensor in session.arena.tensors.items()]
    assert at_front == [stop == 2] * len(at_front), "one step writes the back set, the next the front"
    session.graph.invalidate()
    for name, tensor in plain.arena.tensors.items():
        torch.testing.assert_close(session.arena.tensors[name], tensor, rtol=0, atol=1e-6)
        assert session.arena.tensors[name] is session.arena.front[name]


def replays(session):
    return sum(graph.replays for graph in graphs_of(session.graph))


def test_eager_calls_between_replays_continue_the_same_state(captured):
    session, plain = build(explicit=True, cuda_graph="decode"), build_session(seed=0)
    for each in (session, plain):
        each.prefill(PROMPT)
    for step, eagerly in enumerate([False, False, True, True, False]):
        before = replays(session)
        token = PROMPT[:, step : step + 1].contiguous()
        with session.eager() if eagerly else contextlib.nullcontext():
            torch.testing.assert_close(session.decode(token), plain.decode(token), rtol=0, atol=1e-6)
        assert replays(session) - before == (not eagerly)


def test_an_error_in_an_eager_call_leaves_the_graph_in_use(captured):
    session = build(cuda_graph="decode")
    with pytest.raises(KeyError), session.eager():
        raise KeyError
    session.prefill(PROMPT)
    session.decode(PROMPT[:, :1].contiguous())
    assert replays(session) == 1


def calls(session):
    """What a session does by graph, after a prompt."""
    token = PROMPT[:, :1].contiguous()
    return lambda: session.decode(token) if session.loop is None else session.decode_tokens(token, 3)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cuda_graph", ["decode", "loop"])
def test_a_failed_capture_leaves_everything_eager_and_the_session_refuses(captured, monkeypatch, cuda_graph, explicit):
    session = build(explicit=explicit, cuda_graph=cuda_graph)
    step = session.graph or session.loop.graph
    step.invalidate()
    monkeypatch.setattr(FakeGraphed, "fail", "no memory")
    for call in (session.capture, session.reset, lambda: session.generate(PROMPT, 5)):
        with pytest.raises(RuntimeError, match="no memory"):
            call()
    assert [graph.state for graph in graphs_of(step)] == ["eager"] * (1 + explicit)
    assert session.length == 0 and not any(tensor.any() for tensor in session.arena.tensors.values()), "warm-ups ran"
    session.prefill(PROMPT)  # which no graph does
    before = session.arena.snapshot()
    with pytest.raises(RuntimeError, match="its capture failed.*reset"):
        calls(session)()
    assert session.length == PROMPT.shape[1] and same_state(before, session.arena.snapshot())
    monkeypatch.setattr(FakeGraphed, "fail", None)
    assert session.generate(PROMPT, 5) == build_session(seed=0).generate(PROMPT, 5)
    assert step.state == "captured"
    session.close()
    assert step.state == "closed"


class Package(CompiledMethod):
    """Without constants: binding it changes nothing but that it was bound."""

    def __init__(self, method):
        self.method, self.constants, self.device = method, {}, torch.device("cpu")
        self._runner, self.bound = SimpleNamespace(load_constants=lambda *args, **options: None), {}
        self.bind({})

    def __call__(self, *inputs):
        return self.method(*inputs)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cuda_graph", ["decode", "loop", "all"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_method_that_is_bound_anew_is_captured_anew(captured, cuda_graph, explicit, adapted):
    packages = []

    def packaged(method):
        packages.append(Package(method))
        return Adapter(packages[-1]) if adapted else packages[-1]

    session = build(explicit=explicit, cuda_graph=cuda_graph, prefill_graph_lengths=[4, 16], wrap=packaged)
    expected = session.generate(PROMPT, 5)
    steps = [session.graph or session.loop.graph]
    if session.prefill_graphs is not None:
        steps += session.prefill_graphs.graphs.values()
    old = [graph.output for step in steps for graph in graphs_of(step)]
    session.reset()
    session.prefill(PROMPT)
    for package in packages:
        package.bind({})
    assert [step.state for step in steps] == ["eager"] * len(steps)
    before = session.arena.snapshot()
    for call in [calls(session)] + [lambda: session.prefill(PROMPT)] * (cuda_graph == "all"):
        with pytest.raises(RuntimeError, match="bound anew since.*reset"):
            call()
    assert session.length == PROMPT.shape[1] and same_state(before, session.arena.snapshot())
    for _ in range(2):
        assert session.generate(PROMPT, 5) == expected and [step.state for step in steps] == ["captured"] * len(steps)
    new = [graph.output for step in steps for graph in graphs_of(step)]
    assert not any(map(is_, old, new)), "no graph of before"
    session.reset()
    assert all(map(is_, new, [graph.output for step in steps for graph in graphs_of(step)])), "and none is captured twice"


class Adapter:
    def __init__(self, method):
        self.method = method

    def __call__(self, *inputs):
        return self.method(*inputs)


@pytest.mark.parametrize("cuda_graph", [False, "decode", "loop", "all"])
@pytest.mark.parametrize("ahead", [1, 8, 64])
def test_a_stop_id_ends_a_timed_generation(captured, cuda_graph, ahead):
    whole = build_session(seed=0).generate(PROMPT, 24)[0]
    stop = whole[5]
    end = whole.index(stop) + 1
    session = build(cuda_graph=cuda_graph, prefill_graph_lengths=[4, 16], ahead=ahead)
    cfg = compose(["new_tokens=24", "repeats=1", "min_time_s=0", f"loop_ahead={ahead}"])
    bench = Benchmark(cfg, session, PROMPT, {stop}, SimpleNamespace(latencies_ms=[], prefill_ms=[], ttft_ms=[]))
    overrun = min(ahead, 24 - end) if session.loop is not None else 0
    for _ in range(2):
        bench.round()
        assert bench.ids == [whole[:end]] and session.overrun == overrun
        assert session.length == PROMPT.shape[1] + end - 1 + overrun
    assert len(bench.record.latencies_ms) == 2 * (end - 1), "what ran in vain has no latency"
