"""Every legal combination of the axes on a GPU, with eager methods in full; compiled ones pairwise.

The matrix runs in float32, where near-ties are too rare to choose between combinations: their tokens must be the same.
`pytest -s -k matrix_table` prints what each cell is.
"""

import ctypes
import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from covering import AXES, BASE, COMPILED, PAIRWISE, legal_points
from kernels_common import assert_close_ratio, poison_state
from moeexp_kernels.parts.graph_edges import add_pdl_edges
from moeexp_runner.binding import package_in
from moeexp_runner.profiler import kernels_per_token, token_split
from torch._subclasses.fake_tensor import FakeTensorMode

from moeexp.check.traces import check_replay, record_trace
from moeexp.check.verify import verify
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.model.quantise import quantise
from moeexp.run.benchmark import Benchmark
from moeexp.stack import methods
from moeexp.stack.factory import build_model, build_stack
from moeexp.stack.inductor import inductor_config

pytestmark = pytest.mark.gpu

CELLS = list(itertools.product(*AXES.values()))
LEGAL = [tuple(point.values()) for point in legal_points(AXES)]


def overrides_of(cell):
    return [f"{name}={value}" for name, value in zip(AXES, cell, strict=True)]


def configured(*overrides):
    cfg = compose([*BASE, *overrides])
    validate(cfg, cuda_available=True)
    return resolve(cfg, cuda_available=True)


@pytest.fixture(scope="module")
def models(phases):
    return {dtype: build_model(configured(f"dtype={dtype}"), phases) for dtype in ("float32", "bfloat16")}


@pytest.fixture
def stack(models, phases):
    built = []

    def build(*overrides, dtype="float32"):
        built.append(build_stack(configured(*overrides, f"dtype={dtype}"), models[dtype], phases))
        return built[-1]

    yield build
    for each in built:
        each.close()


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, count), generator=generator).to("cuda")


@pytest.fixture(scope="module")
def expected(models, phases):
    return build_stack(configured("dtype=float32"), models["float32"], phases).session.generate(tokens(21), 12)


@pytest.mark.parametrize("cell", LEGAL, ids=lambda cell: "-".join(cell))
def test_every_legal_combination_decodes_the_same_tokens(stack, expected, cell):
    built = stack(*overrides_of(cell))
    for _ in range(2):
        assert built.session.generate(tokens(21), 12) == expected
    if cell[-1] != "false":
        part = check_replay(built, record_trace(built, tokens(21), 3))
        assert part.passed, list(part.failures())


def test_matrix_table():
    print()
    for cell in CELLS:
        print("  ".join(overrides_of(cell)), "valid" if cell in LEGAL else "refused", sep="  ")
    assert len(LEGAL) == 7 * 2 * (2 * 2 + 2)


@pytest.mark.parametrize("overrides", PAIRWISE)
def test_the_whole_check_passes(stack, models, phases, overrides):
    built = stack(*overrides.split(), dtype="bfloat16")
    verdict = verify(configured(*overrides.split(), "dtype=bfloat16"), built, tokens(21), phases)
    assert verdict["passed"], verdict["failures"]


@pytest.mark.parametrize("state", ["shared", "explicit"])
def test_a_prompt_in_pieces_passes_the_whole_check(stack, phases, state):
    """Three of 7 tokens, each a replay of the graph of 16."""
    overrides = [f"state={state}", "cuda_graph=all", "prefill_chunk=8", "shared_stream=false", "dtype=bfloat16"]
    built = stack(*overrides[:-1], dtype="bfloat16")
    verdict = verify(configured(*overrides), built, tokens(21), phases)
    assert verdict["passed"], verdict["failures"]


@pytest.mark.parametrize("overrides", COMPILED)
def test_compiled_methods_decode_the_same_tokens(stack, expected, overrides):
    built = stack(*overrides.split())
    assert built.session.generate(tokens(21), 12) == expected
    part = check_replay(built, record_trace(built, tokens(21), 3))
    assert part.passed, list(part.failures())
    # The loader of a package must run on the stream that is current. Without a prefill there is but one stream.
    if "shared_stream=false" in overrides and "token_by_token" not in overrides:
        assert_ordered(built.session, built.session)
    if "export=aoti" in overrides and "cuda_graph=false" not in overrides:
        bound_anew_is_captured_anew(built.session, expected)


def bound_anew_is_captured_anew(session, expected):
    step = session.graph or session.loop.graph
    session.reset()
    session.prefill(tokens(9))
    package = package_in(step.method)
    package.bind(package.bound)
    assert step.state == "eager"
    with pytest.raises(RuntimeError, match="bound anew"):
        session.decode(tokens(1)) if session.graph else session.decode_tokens(tokens(1), 3)
    assert session.generate(tokens(21), 12) == expected and step.state == "captured"


@pytest.mark.parametrize("state", ["shared", "explicit"])
@pytest.mark.parametrize("ops", [["ops.linear=tile", "ops.moe_decode=tile"], ["ops=reference"]])
def test_a_step_of_several_tokens_is_as_many_decode_steps(stack, state, ops):
    """To the bit where no kernel's rows depend on how many there are; captured, and eagerly."""
    built = stack("cuda_graph=decode", "verify_tokens=3", f"state={state}", *ops, dtype="bfloat16")
    fed = tokens(21)
    alone, together = (record_trace(built, tokens(9), 13, forced=fed, together=count) for count in (1, 3))
    with built.session.eager():
        eager = record_trace(built, tokens(9), 13, forced=fed, together=3)
    assert torch.equal(together.logits, eager.logits)
    if "ops=reference" in ops:
        assert_close_ratio(together.logits.float(), alone.logits.float(), 2e-2)
        return
    assert torch.equal(together.logits, alone.logits) and torch.equal(together.expert_ids, alone.expert_ids)
    for name, tensor in together.states.items():
        assert torch.equal(tensor, alone.states[name]), name


# --- streams ---


@contextmanager
def late_prompts(session):
    """Before a prompt's work 0.1 s of nothing, on whatever stream it runs on."""
    owner, name = (session.prefill_graphs, "replay") if session.prefill_graphs else (session.arena, "call")
    run = getattr(owner, name)

    def late(*inputs):
        if session.length == 0:  # of what goes through the arena, a step comes behind the prompt
            torch.cuda._sleep(int(2e8))
        return run(*inputs)

    setattr(owner, name, late)
    try:
        yield
    finally:
        delattr(owner, name)


def prompt_and_step(session, prompt=None):
    """A prompt and a decode step that the host enqueues at once, and the state that they leave."""
    prompt, token = tokens(21) if prompt is None else prompt, tokens(1, seed=5)
    torch.cuda.synchronize()  # the ids are there, or without ordering a stream would take whatever lies there for an id
    session.reset()
    logits = session.prefill(prompt)
    step = session.decode(token).clone()
    torch.cuda.synchronize()
    return [logits.clone(), step, *session.arena.snapshot().values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_ordered(session, serial):
    wanted = prompt_and_step(serial)
    with late_prompts(session):
        assert same(prompt_and_step(session), wanted)


@pytest.mark.parametrize("graph", ["false", "decode"])
def test_decode_waits_for_a_prefill_on_another_stream(stack, monkeypatch, graph):
    apart = stack("shared_stream=false", f"cuda_graph={graph}").session
    serial = stack(f"cuda_graph={graph}").session
    assert_ordered(apart, serial)
    # And without the ordering the same test fails: they are on streams of their own, and the delay is long enough to be seen.
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.Stream, "wait_stream", lambda self, other: None)
        with pytest.raises(AssertionError):
            assert_ordered(apart, serial)
    torch.cuda.synchronize()


def test_ordering_needs_no_synchronisation_of_the_device(stack, monkeypatch):
    session = stack("shared_stream=false", "cuda_graph=decode").session
    session.generate(tokens(21), 3)
    session.reset()
    prompt, token = tokens(21), tokens(1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: pytest.fail("the host waited for the device"))
    session.prefill(prompt)
    session.decode(token)


# --- prefill graphs ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", ["shared", "explicit"])
@pytest.mark.parametrize("count", [9, 15, 16, 17, 31, 32])
def test_padding_leaves_every_state_bitwise_unchanged(stack, dtype, state, count):
    graphed = stack("cuda_graph=all", f"state={state}", dtype=dtype).session
    plain = stack(f"state={state}", dtype=dtype).session
    results = []
    for session in (graphed, plain):
        session.reset()
        poison_state(session.arena.tensors)
        logits = session.prefill(tokens(count, seed=count)).clone()
        results.append({"logits": logits, **session.arena.snapshot()})
    assert graphed.prefill_graphs.fitting(count) is not None
    for name, tensor in results[0].items():
        assert torch.equal(tensor.view(torch.uint8), results[1][name].view(torch.uint8)), name


def test_a_prompt_longer_than_every_graph_runs_without(stack):
    prompt = tokens(40)
    assert stack("cuda_graph=all").session.generate(prompt, 4) == stack().session.generate(prompt, 4)


# --- the loop ---


@pytest.mark.parametrize("ahead", [1, 8])
def test_a_stop_discards_the_overrun(stack, expected, ahead):
    session = stack("cuda_graph=loop", f"loop_ahead={ahead}").session
    assert session.generate(tokens(21), 12, on_token=lambda ids, index: index == 3) == [expected[0][:4]]
    assert session.overrun == ahead and session.length == 21 + 3 + ahead
    with pytest.raises(RuntimeError, match=r"reset\(\) first"):
        session.decode(tokens(1))
    assert session.generate(tokens(21), 12) == expected


@pytest.mark.parametrize("overrides", ["cuda_graph=true", "cuda_graph=loop loop_ahead=1", "cuda_graph=loop loop_ahead=8"])
def test_a_stop_id_ends_a_timed_generation(stack, expected, overrides):
    stop = expected[0][3]
    end = expected[0].index(stop) + 1
    session = stack(*overrides.split()).session
    cfg = configured(*overrides.split(), "repeats=1", "min_time_s=0")
    bench = Benchmark(cfg, session, tokens(21), {stop}, SimpleNamespace(latencies_ms=[], prefill_ms=[], ttft_ms=[]))
    overrun = min(cfg.loop_ahead, 12 - end) if session.loop is not None else 0
    for _ in range(2):  # the second starts on a state that has seen the overrun
        bench.round()
        assert bench.ids == [expected[0][:end]] and session.overrun == overrun
        assert session.length == 21 + end - 1 + overrun
    assert len(bench.record.latencies_ms) == 2 * (end - 1), "what ran in vain has no latency"
    assert session.generate(tokens(21), 12) == expected


def test_draws_differ_between_replays_and_repeat_after_reset(stack):
    session = stack("cuda_graph=loop", "sampler=gumbel", "sampler.temperature=50").session
    first = session.generate(tokens(21), 60)
    assert len(set(first[0])) > 20, "the graph draws anew in every replay"
    assert session.generate(tokens(21), 60) == first
    assert stack("sampler=gumbel", "sampler.temperature=50").session.generate(tokens(21), 60) == first


# --- faults ---


@pytest.mark.parametrize("graph", ["decode", "loop"])
@pytest.mark.parametrize("state", ["shared", "explicit"])
def test_state_re_allocated_after_capture_is_refused_before_launch(stack, graph, state):
    session = stack(f"cuda_graph={graph}", f"state={state}").session
    front = session.arena.tensors if state == "shared" else session.arena.front
    session.prefill(tokens(9))
    name = next(iter(front))
    kept, front[name] = front[name], front[name].clone()
    call = session.decode if graph == "decode" else lambda token: session.decode_tokens(token, 3)
    with pytest.raises(RuntimeError, match="re-allocated"):
        call(tokens(1))
    front[name] = kept


def explode():
    raise ValueError("a broken op")


def exhaust():
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("fault", [explode, exhaust])
@pytest.mark.parametrize("graph", ["decode", "loop"])
@pytest.mark.parametrize("state", ["shared", "explicit"])
def test_a_fault_in_the_middle_of_a_capture(stack, expected, fault, graph, state):
    session = stack(f"cuda_graph={graph}", f"state={state}").session
    captured = session.graph or session.loop.graph
    captured.invalidate()
    method, before = captured.method, settled_memory()

    def broken(*inputs):
        result = method(*inputs)
        if torch.cuda.is_current_stream_capturing():
            fault()
        return result

    captured.method = broken
    with pytest.raises(RuntimeError, match="capture failed, the method is eager again"):
        session.capture()
    assert captured.state == "eager" and settled_memory() <= before
    with pytest.raises(RuntimeError, match="capture failed"):
        session.reset()  # which tries again
    assert captured.state == "eager" and settled_memory() <= before
    captured.method = method
    with torch.no_grad():
        session.arena.call(method, *captured.inputs)  # the next eager call, on the same device
    session.capture()
    assert captured.state == "captured" and session.generate(tokens(21), 12) == expected


def settled_memory():
    gc.collect()  # frames of an exception that was caught hold tensors
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("graph", ["decode", "all"])
@pytest.mark.parametrize("state", ["shared", "explicit"])
def test_resets_and_recaptures_do_not_grow(stack, graph, state):
    session = stack(f"cuda_graph={graph}", f"state={state}").session
    memory = []
    for _ in range(100):
        session.reset()
        session.prefill(tokens(9))
        session.decode(tokens(1))
        memory.append(settled_memory())
    assert max(memory[3:]) <= memory[2]
    memory = []
    for _ in range(20):
        for each in [session.graph] if session.graph else [session.loop.graph, session.prefill_graphs]:
            each.invalidate()
        session.capture()
        memory.append((settled_memory(), torch.cuda.memory_reserved()))
    assert max(memory[3:]) <= memory[2]


@pytest.mark.parametrize("overrides", ["cuda_graph=loop", "cuda_graph=all state=explicit", "cuda_graph=decode"])
def test_a_prompt_after_another_and_nan_in_the_state(stack, overrides):
    session = stack(*overrides.split(), dtype="bfloat16").session

    def run(prompt):
        ids = session.generate(prompt, 8)
        return ids, session.arena.snapshot()

    first = run(tokens(21))
    run(tokens(30, seed=3))
    second = run(tokens(21))
    assert second[0] == first[0] and same(second[1].values(), first[1].values())
    poison_state(session.arena.tensors, kinds=("",))
    third = run(tokens(21))
    assert third[0] == first[0] and same(third[1].values(), first[1].values())


def test_interleaved_sessions_do_not_bleed(stack):
    sessions = [stack("cuda_graph=decode", "state=explicit").session for _ in range(2)]
    prompts, token = (tokens(21), tokens(30, seed=3)), tokens(1, seed=5)
    alone = [prompt_and_step(session, prompt) for session, prompt in zip(sessions, prompts, strict=True)]
    for session in sessions:
        session.reset()
    logits = [session.prefill(prompt) for session, prompt in zip(sessions, prompts, strict=True)]
    steps = [session.decode(token).clone() for session in sessions]
    for session, *mixed, expected in zip(sessions, logits, steps, alone, strict=True):
        assert same([*mixed, *session.arena.snapshot().values()], expected)


def test_the_context_is_filled_to_the_last_slot(stack):
    session = stack("cuda_graph=loop").session
    assert len(session.generate(tokens(100), 28)[0]) == 28
    with pytest.raises(ValueError, match="max_seq_len=128"):
        session.generate(tokens(100), 29)


# --- memory, time, allocator ---


def held_memory():
    """Allocated and reserved, apart from workspaces of cuBLAS, of which every stream gets one for good."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.parametrize(
    "overrides",
    ["cuda_graph=true", "cuda_graph=loop", "cuda_graph=loop shared_stream=false", "cuda_graph=all state=explicit"],
)
def test_closing_gives_back_all_memory(models, phases, expected, overrides):
    model = models["float32"]

    def build_use_close():
        built = build_stack(configured(*overrides.split(), "dtype=float32"), model, phases)
        assert built.session.generate(tokens(21), 12) == expected
        in_use = held_memory()
        built.close()
        prefill = built.session.prefill_graphs
        assert prefill is None or all(graph.state == "closed" for graph in prefill.graphs.values())
        return in_use

    build_use_close()  # what is made once in a process, such as kernels, is no leak
    before = held_memory()
    for _ in range(3):
        allocated, reserved = build_use_close()
        assert allocated > before[0] and reserved > before[1], "a graph has a pool of its own"
        assert held_memory() == before


def test_quantising_needs_little_beside_the_weights():
    weight = torch.randn(64, 1024, 2048, dtype=torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stored, scales = quantise(weight, bits=4, group_size=128, name="experts")
    spare = torch.cuda.max_memory_allocated() - before - stored.nbytes - scales.nbytes
    assert spare <= 1.25 * 2**30, f"{spare / 2**30:.2f} GiB"


@pytest.mark.parametrize("graph", ["false", "decode", "loop"])
def test_a_tokens_time_is_split(stack, graph):
    session = stack(f"cuda_graph={graph}").session
    session.generate(tokens(21), 17)
    session.reset()
    token = session.sample(session.prefill(tokens(21)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    session.decode_tokens(token, 17)
    torch.cuda.synchronize()
    step_us = (time.perf_counter() - start) / 16 * 1e6
    split = token_split(session, tokens(21), 16, step_us=step_us)
    assert split["wall_us"] == pytest.approx(step_us, rel=1e-3)
    parts = sum(split[name] for name in ("kernels_us", "copies_us", "gaps_us", "host_us"))
    assert split["kernels"] > 10 and split["kernels_us"] > 0
    assert split["kernels"] == int(split["kernels"]) and split["copies"] == int(split["copies"]) >= 1
    # Equal but for rounding, and for what the profiled pass took longer.
    assert parts == pytest.approx(split["wall_us"], rel=0.25)
    assert split["by_kernel"][0]["us"] >= split["by_kernel"][-1]["us"] > 0


def nodes_of(graph):
    """Of a `cudaGraph_t`: how many nodes of each of the driver's kinds."""
    cuda, handle, count, kind = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph), ctypes.c_size_t(), ctypes.c_int()
    assert cuda.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes, found = (ctypes.c_void_p * count.value)(), Counter()
    assert cuda.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    for node in nodes:
        assert cuda.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        found[kind.value] += 1
    return found


@pytest.mark.parametrize("state", ["shared", "explicit"])
@pytest.mark.parametrize("graph", ["decode", "loop"])
def test_kernels_per_token_are_those_that_are_replayed(stack, monkeypatch, graph, state):
    """Of a loop its graph's nodes and nothing else; of a step its graph's, its inputs' and the sampler's. Kinds of the
    driver: 0 kernels, 1 copies, 2 fills. A graph can be seen where its edges may be programmatic, on Hopper and later.

    A driver may run a graph's small copies as kernels, and the profiler then calls them so (580.159 does, of explicit state):
    all of them or none."""
    nodes = []

    def watched(captured):
        nodes.append(nodes_of(captured))
        return add_pdl_edges(captured)

    monkeypatch.setattr("moeexp.stack.factory.add_pdl_edges", watched)
    session = stack(f"cuda_graph={graph}", f"state={state}", "pdl=true").session
    assert len(nodes) == (2 if state == "explicit" else 1), "two graphs that swap, of a state that goes in and out"
    kernels = sum(each[0] for each in nodes) / len(nodes)
    copies = sum(each[1] + each[2] for each in nodes) / len(nodes)
    split = token_split(session, tokens(21), 16, step_us=1000.0)
    assert kernels_per_token(split) == pytest.approx(split["kernels"], abs=0.05)
    run_as_kernels = copies if split["kernels"] >= kernels + copies > kernels else 0
    kernels, copies = kernels + run_as_kernels, copies - run_as_kernels
    if graph == "loop":
        # The row of ids goes to the host; and once in these 16 steps the state that prefill gave goes where the graphs read it.
        moved = len(session.arena.front) / 16 if state == "explicit" else 0
        assert split["kernels"] + split["copies"] == kernels + copies + 1 + moved
        assert kernels <= split["kernels"] <= kernels + moved
    else:
        assert kernels < split["kernels"] < kernels + 8 and split["copies"] > copies


@pytest.mark.alone  # the counter is the GPU's: what others draw would be in it
@pytest.mark.parametrize("graph", ["false", "loop"])
def test_energy_is_of_decoding_and_experts_are_counted(stack, graph):
    """Of more tokens the energy is more, and where the GPU decides how long a token takes each token's is about the same. Without
    a graph the host decides, and with it how long the GPU idles."""
    from moeexp_runner import energy

    if energy.counter(torch.device("cuda")) is None:
        pytest.skip("no CUDA device whose energy is told")
    room = "max_seq_len=1024"
    session, found = stack(f"cuda_graph={graph}", room).session, []
    # Many tokens: a prompt takes as much as a hundred. The first for clocks and temperature: where the host is what a step waits
    # for, they rise. In turns, of which the middle counts: of one pair each a stretch of another clock is all of one of them.
    for new_tokens in (300, *3 * (300, 900)):
        cfg = configured(f"cuda_graph={graph}", room, f"new_tokens={new_tokens}")
        record = SimpleNamespace(latencies_ms=[], prefill_ms=[], ttft_ms=[])
        found.append(Benchmark(cfg, session, tokens(21), None, record).energy())
    shorts, longs = found[1::2], found[2::2]
    short, long = (statistics.median(each["joules_per_token"] for each in half) for half in (shorts, longs))
    assert 0 < short * 299 < long * 899, found
    if graph == "loop":
        assert long == pytest.approx(short, rel=0.3), found
    first, second = (statistics.median(each["energy"]["joules_per_prefill"] for each in half) for half in (shorts, longs))
    assert first / 2 < second < first * 2, found


@pytest.mark.parametrize(
    "axes",
    [
        "cuda_graph=false", "cuda_graph=true", "cuda_graph=loop", "cuda_graph=all",
        "cuda_graph=true state=explicit", "cuda_graph=true export=compile", "cuda_graph=true export=aoti",
    ],
)  # fmt: skip
def test_the_other_allocator(tmp_path, axes):
    """In a process of its own: an allocator is chosen before torch loads."""
    command = [sys.executable, "-m", "moeexp", "model=nano", "export=eager", "allocator=cuda_malloc_async", *axes.split()]
    command += ["tracker=jsonl", "new_tokens=8", "repeats=1", "prompt_len=21", "dtype=float32"]
    result = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[:3000] + result.stderr[-1000:]


def test_compiling_allocates_no_weights(tmp_path):
    """A method is exported and compiled of tensors without storage, and torch makes none of them real; not even one at a time."""

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(8):
                self.register_buffer(f"weight{i}", torch.zeros(2**23, 1, device="cuda"))

        def forward(self, x):
            return sum((weight.sum() for weight in self.buffers()), x)

    before = settled_memory()
    torch.cuda.reset_peak_memory_stats()
    with FakeTensorMode():
        module = Weighted()
    program = torch.export.export(module, (torch.zeros(8, device="cuda"),))
    methods._use_own_fakes(program)  # as `export_method` does
    methods.compile_method(program, tmp_path / "weighted.pt2", inductor_config(method="decode", device="cuda"))
    weights = sum(weight.nbytes for weight in module.buffers())
    assert torch.cuda.max_memory_allocated() - before < weights / 2
    assert settled_memory() - before < weights / 2
