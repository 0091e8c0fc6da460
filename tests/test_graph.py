"""The state machine of a captured method. torch.cuda is a fake here: `replay` runs the method into the same output."""

import contextlib
import gc
import weakref

import pytest
import torch
from moeexp_runner import graph as module
from moeexp_runner.graph import WARM_UPS, GraphedMethod


class FakeCuda:
    """Records what was asked of it; a fake graph replays by calling the method that was captured."""

    def __init__(self):
        self.log, self.capturing, self.method, self.fail = [], False, None, None
        self.output = None  # what the capture returned, which a replay writes into
        self.graphs = weakref.WeakSet()

    def alive(self):
        gc.collect()
        return len(self.graphs)

    def install(self, patch):
        class Graph:
            def __init__(graph, **options):
                self.graphs.add(graph)

            def replay(graph):
                self.log.append("replay")
                self.output.copy_(self.method())

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph):
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False

        cuda = module.torch.cuda
        patch.setattr(cuda, "CUDAGraph", Graph)
        patch.setattr(cuda, "graph", capture)
        patch.setattr(cuda, "Stream", Stream)
        patch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(cuda, "current_stream", Stream)
        patch.setattr(cuda, "synchronize", lambda: self.log.append("synchronize"))


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def graphed(cuda):
    token, positions = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def method(token, positions):
        cuda.log.append("capture" if cuda.capturing else "eager")
        if cuda.fail is not None and cuda.capturing:
            raise cuda.fail
        output = (10 * token + positions).float()
        if cuda.capturing:
            cuda.output = output
        return output

    cuda.method = lambda: (10 * token + positions).float()
    return GraphedMethod(method, (token, positions))


def warm_and_capture(graphed):
    graphed.warm()
    graphed.capture()


def test_eager_warm_captured_closed(graphed, cuda):
    assert graphed.state == "eager"
    graphed.warm()
    assert graphed.state == "warm" and cuda.log == ["eager"] * WARM_UPS + ["synchronize"]
    graphed.capture()
    assert graphed.state == "captured" and cuda.log[-1] == "capture"
    graphed.inputs[0].fill_(4)
    graphed.inputs[1].fill_(2)
    first = graphed.replay(*graphed.inputs)
    assert first.tolist() == [[42.0]] and cuda.log[-1] == "replay"
    graphed.inputs[1].fill_(3)
    assert graphed.replay(*graphed.inputs) is first, "the output of a replay aliases the graph's memory"
    graphed.close()
    assert graphed.state == "closed"


@pytest.mark.parametrize(
    ("state", "forbidden"),
    [
        ("eager", ["capture", "replay"]),
        ("warm", ["replay"]),
        ("captured", ["warm", "capture"]),
        ("closed", ["warm", "capture", "replay"]),
    ],
)
def test_what_a_state_forbids(graphed, cuda, state, forbidden):
    if state in ("warm", "captured"):
        graphed.warm()
    if state == "captured":
        graphed.capture()
    if state == "closed":
        graphed.close()
    before = list(cuda.log)
    for name in forbidden:
        with pytest.raises(RuntimeError, match=f"the method is {state}"):
            getattr(graphed, name)(*(graphed.inputs if name == "replay" else ()))
        assert graphed.state == state and cuda.log == before


def test_replay_refuses_any_tensor_but_its_own_before_launch(graphed, cuda):
    warm_and_capture(graphed)
    token, positions = graphed.inputs
    wrong = [
        ((token.clone(), positions), "input 0"),
        ((token, positions.clone()), "input 1"),
        ((token.view(1), positions), r"input 0.*got \(1,\)"),
        ((token.view(torch.float64), positions), "input 0.*got .*float64"),
        ((token,), "zip"),
        ((token, positions, positions), "zip"),
    ]
    for inputs, message in wrong:
        with pytest.raises(ValueError, match=message):
            graphed.replay(*inputs)
    assert "replay" not in cuda.log and graphed.state == "captured"


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("no memory"), ValueError("broken op")])
def test_a_failed_capture_is_eager_again_and_can_be_tried_anew(graphed, cuda, fault):
    graphed.warm()
    cuda.fail = fault
    with pytest.raises(RuntimeError, match=f"capture failed, the method is eager again: {fault}") as caught:
        graphed.capture()
    assert caught.value.__cause__ is fault
    assert graphed.state == "eager" and graphed.output is None
    del caught  # its frames
    assert cuda.alive() == 0
    assert graphed.method(*graphed.inputs).tolist() == [[0.0]]
    with pytest.raises(RuntimeError, match="the method is eager"):
        graphed.capture()
    cuda.fail = None
    warm_and_capture(graphed)
    assert graphed.replay(*graphed.inputs).tolist() == [[0.0]]


def test_invalidate_drops_the_graph_and_close_is_final(graphed, cuda):
    warm_and_capture(graphed)
    assert cuda.alive() == 1 and graphed.output is cuda.output
    graphed.invalidate()
    assert graphed.state == "eager" and cuda.alive() == 0 and graphed.output is None
    warm_and_capture(graphed)
    graphed.close()
    assert cuda.alive() == 0 and graphed.output is None
    graphed.invalidate()
    graphed.close()
    assert graphed.state == "closed"
