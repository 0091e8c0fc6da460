"""Steps captured with either kind of state. The graph is a fake here: it runs what was captured into the same outputs."""

import pytest
import torch
from common import EVEN, build_session, load_model, random_tokens, reference_ops
from moeexp_runner import step_graph
from moeexp_runner.arena import Arena
from moeexp_runner.explicit import ExplicitState
from moeexp_runner.session import Session

from moeexp.methods import MODULES
from moeexp.model import state_shapes
from moeexp.weights import Random


class FakeGraphed:
    """`GraphedMethod` in which a capture runs the method once and keeps what it returns, as graph memory."""

    fail = None

    def __init__(self, method, inputs, **options):
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


def build(*, explicit=False, **options):
    model, ops = load_model(Random(EVEN, 0)), reference_ops()
    arena = Arena(state_shapes(EVEN, batch=1, max_seq_len=96, dtype=torch.float32), device="cpu")
    how = {"state_names": tuple(arena.tensors)} if explicit else {"held": arena.tensors}
    live = options.get("cuda_graph") == "all"
    return Session(
        prefill=MODULES["prefill"](model, ops, takes_live=live, **how),
        decode=MODULES["decode"](model, ops, **how),
        sample=ops["sample"],
        arena=ExplicitState(arena) if explicit else arena,
        batch=1,
        max_seq_len=96,
        vocab_size=EVEN.vocab_size,
        device=torch.device("cpu"),
        takes_live=live,
        **options,
    )


PROMPT = random_tokens(1, 13)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cuda_graph", ["decode", "loop", "all"])
def test_replays_decode_what_the_methods_do(captured, explicit, cuda_graph):
    expected = build_session(seed=0).generate(PROMPT, 9)
    session = build(explicit=explicit, cuda_graph=cuda_graph, prefill_graph_lengths=[4, 16])
    step = session.graph or session.loop.graph
    assert [graph.state for graph in step._graphs] == ["captured"] * (2 if explicit else 1)
    for count in (9, 4, 9):  # an odd and an even number of steps before the next prompt
        assert session.generate(PROMPT, count)[0] == expected[0][:count]
    if session.prefill_graphs is not None:
        assert [sum(g.replays for g in each._graphs) for each in session.prefill_graphs.graphs.values()] == [0, 3]
    if explicit:
        away, home = (graph.replays for graph in step._graphs)
        assert away + home == 8 + 3 + 8 and away - home == 1, "steps alternate between the two sets"


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
    assert (session.arena.tensors is session.graph._away) == (stop == 1)
    session.graph.invalidate()
    for name, tensor in plain.arena.tensors.items():
        torch.testing.assert_close(session.arena.tensors[name], tensor, rtol=0, atol=1e-6)
        assert session.arena.tensors[name] is session.arena.home[name]


def test_eager_calls_between_replays_continue_the_same_state(captured):
    session, plain = build(explicit=True, cuda_graph="decode"), build_session(seed=0)
    graph = session.graph
    for each in (session, plain):
        each.prefill(PROMPT)
    for step in range(5):
        session.graph = graph if step in (0, 1, 4) else None
        token = PROMPT[:, step : step + 1].contiguous()
        torch.testing.assert_close(session.decode(token), plain.decode(token), rtol=0, atol=1e-6)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_failed_capture_leaves_everything_eager(captured, monkeypatch, explicit):
    session = build(explicit=explicit, cuda_graph="decode")
    session.graph.invalidate()
    monkeypatch.setattr(FakeGraphed, "fail", "no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        session.capture()
    assert [graph.state for graph in session.graph._graphs] == ["eager"] * (1 + explicit)
    monkeypatch.setattr(FakeGraphed, "fail", None)
    session.capture()
    assert session.graph.state == "captured"
    assert session.generate(PROMPT, 5) == build_session(seed=0).generate(PROMPT, 5)
    session.close()
    assert session.graph.state == "closed"
