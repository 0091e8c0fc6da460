"""The next step is fed by the sampler's own kernels: bit for bit what torch's ops make of the same logits, with PDL and without,
and of as many rows as a batch may have."""

from __future__ import annotations

from collections import Counter

import kernels_common as common
import pytest
import torch
from moeexp_kernels import registry
from moeexp_kernels.ops import sample
from moeexp_kernels.parts.graph_edges import add_pdl_edges
from moeexp_runner.sampler import Sampler
from test_gpu_axes import nodes_of

from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.stack.factory import build_model, build_stack, sampler_of

pytestmark = pytest.mark.gpu

PROMPT_LEN, STEPS, ROUNDS = 21, 24, 5
FED = ("token", "positions", "index", "ids")
GUMBEL = ["sampler=gumbel", "sampler.temperature=50"]
# What a sampler is, and how many kernels it has: a filter of bfloat16 logits takes four searches, top_p a kernel before them.
SAMPLERS = {
    "greedy": ([], 2),
    "draw": (GUMBEL, 2),
    "top_k": ([*GUMBEL, "sampler.top_k=20"], 6),
    "top_p": ([*GUMBEL, "sampler.top_p=0.9"], 7),
    "both": ([*GUMBEL, "sampler.top_k=20", "sampler.top_p=0.9"], 11),
}


def configured(*overrides):
    base = ["model=nano", "quant=int4", "export=eager", "max_seq_len=128", "cuda_graph=loop"]
    cfg = compose([*base, *overrides])
    validate(cfg, cuda_available=True)
    return resolve(cfg, cuda_available=True)


@pytest.fixture(scope="module")
def model(phases):
    return build_model(configured(), phases)


@pytest.fixture
def build(model, phases):
    built = []

    def one(*overrides):
        built.append(build_stack(configured(*overrides), model, phases))
        return built[-1].session

    yield one
    for each in built:
        each.close()


def prompt(rows=1):
    return torch.randint(0, 256, (rows, PROMPT_LEN), generator=torch.Generator().manual_seed(0)).to("cuda")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "axes", [[], ["batch=3"], ["state=explicit"], ["pdl=false"]], ids=lambda axes: "-".join(axes) or "default"
)
def test_a_captured_step_feeds_what_torchs_ops_do(build, name, axes):
    """Step by step, from the logits that the step itself made."""
    overrides = [*SAMPLERS[name][0], *axes]
    session, cfg = build(*overrides), configured(*overrides)
    loop, own = session.loop, session._sample
    op = sample.greedy if name == "greedy" else sample.sample
    assert own._feed_op is registry.feed_of(op) is not None
    twin = sampler_of(cfg.sampler, "triton", device=session.device)
    twin._feed_op = None
    session.reset()
    with torch.no_grad():
        token = session.sample(session.prefill(prompt(cfg.batch)))
        loop.start(token, PROMPT_LEN)
        if own.seed_state is not None:
            twin.seed_state.copy_(own.seed_state)
        into = {field: getattr(loop, field).clone() for field in FED}
        for step in range(STEPS):
            twin.feed(logits=loop.step().clone(), **into)
            for field in FED:
                common.assert_bitwise_equal(getattr(loop, field), into[field], f"{field} after step {step}")
            if own.seed_state is not None:
                common.assert_bitwise_equal(own.seed_state, twin.seed_state, "seed_state")
    assert loop.index.item() == STEPS and loop.positions.tolist() == [PROMPT_LEN + STEPS] * cfg.batch


@pytest.mark.parametrize("name", SAMPLERS)
def test_loops_decode_the_same_however_they_are_fed(build, monkeypatch, name):
    """Without the host between the steps: fed by the sampler, by torch's ops, and step by step without a graph."""
    overrides = SAMPLERS[name][0]
    fused = build(*overrides)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "FEEDS", ())
        plain = build(*overrides)
    assert fused._sample._feed_op is not None and plain._sample._feed_op is None
    expected = build(*overrides, "cuda_graph=false").generate(prompt(), STEPS)
    assert name == "greedy" or len(set(expected[0])) > STEPS // 3
    for _ in range(ROUNDS):
        assert fused.generate(prompt(), STEPS) == plain.generate(prompt(), STEPS) == expected
        for field in FED:
            common.assert_bitwise_equal(getattr(fused.loop, field), getattr(plain.loop, field), field)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_samplers_kernels_are_all_that_a_loop_adds_and_start_early(build, monkeypatch, name):
    """To the captured step without sampling: so many kernels, before each of them an edge of PDL, and nothing else."""
    overrides, kernels = SAMPLERS[name]
    nodes = []

    def watched(captured):
        nodes.append(nodes_of(captured))
        return add_pdl_edges(captured)

    monkeypatch.setattr("moeexp.stack.factory.add_pdl_edges", watched)
    loop, step = build(*overrides), build(*overrides, "cuda_graph=decode")
    assert nodes[0] - nodes[1] == Counter({0: kernels}) and not nodes[1] - nodes[0]
    assert loop.loop.graph.pdl_edges == step.graph.pdl_edges + kernels
    # Where torch's ops feed, they come behind the sampler and have no such edges; its own kernels keep theirs.
    monkeypatch.setattr(registry, "FEEDS", ())
    assert build(*overrides).loop.graph.pdl_edges == step.graph.pdl_edges + kernels
    assert nodes[2].total() > nodes[0].total()
    assert build(*overrides, "pdl=false").loop.graph.pdl_edges == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_pdl_changes_no_bit_of_a_loop(build, name):
    overrides = SAMPLERS[name][0]
    pdl, plain = build(*overrides, "pdl=true"), build(*overrides, "pdl=false")
    expected = plain.generate(prompt(), STEPS)
    state = plain.arena.snapshot()
    for _ in range(ROUNDS):
        assert pdl.generate(prompt(), STEPS) == expected
        left = pdl.arena.snapshot()
        assert all(torch.equal(left[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)


# --- many rows ---


def to_feed(rows, slots):
    shapes = {"token": (rows, 1), "positions": (rows,), "index": (1,), "ids": (slots, rows)}
    return {name: common.Guarded(torch.zeros(shape, dtype=torch.int64, device="cuda")) for name, shape in shapes.items()}


def unequal_logits(rows, vocabulary, dtype=torch.bfloat16):
    """[B, 1, V], and the token of each row that is far above all others."""
    winners = torch.arange(rows, device="cuda") * 7919 % vocabulary
    logits = torch.zeros(rows, 1, vocabulary, dtype=dtype, device="cuda")
    logits[torch.arange(rows, device="cuda"), 0, winners] = 80.0
    return logits, winners


@pytest.mark.parametrize("filters", [None, {"top_k": 0, "top_p": 1.0}, {"top_k": 3, "top_p": 0.9}])
def test_as_many_rows_as_a_batch_may_have(filters):
    """More than a grid's second dimension holds; of two chunks each."""
    rows, slots = 65_536, 3
    logits, winners = unequal_logits(rows, 2100)
    guarded, seed_state = to_feed(rows, slots), torch.tensor([7, 0], device="cuda")
    into = {name: each.tensor for name, each in guarded.items()}
    for step in range(1, slots + 1):
        if filters is None:
            sample.feed_greedy(logits=logits, **into)
        else:
            sample.feed_sample(logits=logits, seed_state=seed_state, temperature=1.0, **filters, **into)
        assert torch.equal(into["token"][:, 0], winners)
        assert into["index"].item() == step and into["positions"].eq(step).all()
        assert all(torch.equal(into["ids"][row], winners if 1 <= row <= step else 0 * winners) for row in range(slots))
    assert seed_state.tolist() == [7, 0 if filters is None else slots]
    assert torch.equal(sample.greedy(logits=logits)[:, 0], winners)
    for name, each in guarded.items():
        each.check(name)


@pytest.mark.parametrize("rows", [1, 2, 33, 700])
@pytest.mark.parametrize("draws", [False, True])
def test_replays_advance_the_index_once_a_step(rows, draws):
    """Steps behind one another in a graph and graphs behind one another, all edges programmatic that may be: every row's program
    reads the index that one program moved."""
    calls, replays, vocabulary = 4, 50, 5000
    logits, winners = unequal_logits(rows, vocabulary)
    into = {name: each.tensor for name, each in to_feed(rows, calls * replays + 1).items()}
    options = {"seed": 3, "device": "cuda", "temperature": 1.0, "top_k": 0, "top_p": 1.0} if draws else {}
    choice, feed = registry.FEEDS[draws]
    sampler = Sampler(choice, feed_op=feed, **options)
    sampler.feed(logits=logits, **into)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            sampler.feed(logits=logits, **into)
    assert add_pdl_edges(graph.raw_cuda_graph()) == 2 * calls - 1
    graph.instantiate()
    for tensor in into.values():
        tensor.zero_()
    sampler.reset()
    for _ in range(replays):
        graph.replay()
    steps = calls * replays
    assert into["index"].item() == steps and into["positions"].eq(steps).all()
    assert into["ids"][0].eq(0).all() and into["ids"][1:].eq(winners).all()
    if draws:
        assert sampler.seed_state.tolist() == [3, steps]
