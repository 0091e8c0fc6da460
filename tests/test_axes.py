"""The axes that act on a CPU: every way to dispatch and to keep state decodes the same text, and what cannot be is refused.

Graphs need a GPU; here the same calls are made eagerly, so that what stands around them is tested: the loop's reading
ahead, padding to captured lengths, alternating state.
"""

import gc
import itertools
import json
import weakref
from pathlib import Path

import common
import pytest
import torch
from common import random_tokens, same_state, slow_after
from kernels_common import poison_state
from moeexp_kernels import registry
from moeexp_runner.arena import Arena
from moeexp_runner.explicit import ExplicitState

from moeexp import cli
from moeexp.check.traces import check_replay, record_trace
from moeexp.check.verify import generated_ids, verify
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.record.record import Record
from moeexp.run.experiment import Experiment, chosen_experts
from moeexp.stack import factory
from moeexp.stack.factory import build_model, build_stack, python_callbacks
from moeexp.stack.inductor import inductor_config
from moeexp.stack.methods import MODULES, compile_method, export_method, session_methods

BASE = ["model=nano", "quant=int4", "max_seq_len=96", "export=eager", "new_tokens=12", "dtype=float32"]
DISPATCH, STATE = ("dual", "single", "token_by_token", "cond"), ("shared", "explicit")
LEGAL = [pair for pair in itertools.product(DISPATCH, STATE) if pair != ("cond", "shared")]


def configured(*overrides, cuda_graph=False):
    """`cuda_graph` is set past the rules, which refuse it without CUDA."""
    cfg = resolve(compose([*BASE, *overrides]), cuda_available=False)
    cfg.cuda_graph = cuda_graph
    return cfg


@pytest.fixture(scope="module")
def model(phases):
    return build_model(configured(), phases)


@pytest.fixture
def stack(model, phases):
    def build(*overrides, cuda_graph=False):
        return build_stack(configured(*overrides, cuda_graph=cuda_graph), model, phases)

    return build


PROMPT = random_tokens(1, 21, vocab=256)


@pytest.fixture(scope="module")
def expected(model, phases):
    return build_stack(configured(), model, phases).session.generate(PROMPT, 12)


@pytest.mark.parametrize(("dispatch", "state"), LEGAL)
@pytest.mark.parametrize("cuda_graph", [False, "decode", "loop", "all"])
def test_every_combination_decodes_the_same_tokens(stack, expected, dispatch, state, cuda_graph):
    session = stack(f"dispatch={dispatch}", f"state={state}", cuda_graph=cuda_graph).session
    for _ in range(2):  # the second generation starts on used state
        assert session.generate(PROMPT, 12) == expected
    token = PROMPT[:, :1].contiguous()
    assert session.generate(token, 3) == build_alone(session, token)


def test_a_trace_chooses_its_first_token_as_a_generation_does(stack, monkeypatch):
    """Of several positions the head is another kernel than of one, and its last bits may decide: those of one are checked."""
    built = stack(cuda_graph="loop")
    session, prefill = built.session, built.session.prefill

    def of_several(tokens, positions=None):
        logits = prefill(tokens, positions)
        if positions is not None and len(positions) > 1:
            logits = logits - 2 * logits.max() * torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
        return logits

    wanted = session.generate(PROMPT, 4)
    monkeypatch.setattr(session, "prefill", of_several)
    trace = record_trace(built, PROMPT, 4)
    assert generated_ids(trace) == wanted
    session.reset()
    assert torch.equal(trace.logits[:, PROMPT.shape[1] - 1 :][:, :1], prefill(PROMPT))


@pytest.mark.parametrize(("dispatch", "state"), LEGAL)
@pytest.mark.parametrize("cuda_graph", slow_after(1, ["loop", False, "decode", "all"]))
def test_the_experts_that_steps_chose_are_read_from_the_state(stack, dispatch, state, cuda_graph):
    built = stack(f"dispatch={dispatch}", f"state={state}", "batch=2", cuda_graph=cuda_graph)
    prompt = random_tokens(2, 21, vocab=256)
    ids = built.session.generate(prompt, 12)
    chosen = chosen_experts(built, 21, ids)
    stopped = built.session.generate(prompt, 12, on_token=lambda row, index: index == 5)
    short = chosen_experts(built, 21, [stopped[0][:3], stopped[1]])  # a row that ended before the other
    trace = record_trace(built, prompt, 12, forced=torch.tensor(ids)[:, :-1])
    assert torch.equal(chosen.long(), trace.expert_ids[:, :, 21:])
    assert torch.equal(short.long(), trace.expert_ids[:, :, 21 : 21 + 5]), "not those of steps that ran in vain"
    built.session.generate(prompt, 3)
    with pytest.raises(AssertionError, match="another prompt"):
        chosen_experts(built, 21, ids)


def build_alone(session, token):
    """A prompt of one token through `prefill` and `decode`, without the loop."""
    session.reset()
    ids = [session.sample(session.prefill(token))]
    for _ in range(2):
        ids.append(session.sample(session.decode(ids[-1])))
    return torch.cat(ids, 1).tolist()


@pytest.mark.parametrize(
    "overrides", ["dispatch=single state=explicit", "dispatch=cond state=explicit", "dispatch=token_by_token"]
)
def test_combination_passes_the_whole_check(model, phases, overrides):
    cfg = configured(*overrides.split(), "batch=2")
    verdict = verify(cfg, build_stack(cfg, model, phases), PROMPT.repeat(2, 1), phases)
    assert verdict["passed"], verdict["failures"]


@pytest.mark.parametrize("cuda_graph", ["decode", "loop", "all"])
@pytest.mark.parametrize("state", STATE)
def test_the_replay_check_sees_every_output(stack, cuda_graph, state):
    built = stack(f"state={state}", cuda_graph=cuda_graph)
    trace = record_trace(built, PROMPT, 3)
    assert check_replay(built, trace).passed
    if (loop := built.session.loop) is not None:
        step = loop.step

        def last_token_off():  # which no logits and no state show
            logits = step()
            loop.token.add_(int(loop.fed == 2))
            return logits

        loop.step = last_token_off
        assert not check_replay(built, trace).passed


# --- the loop ---


@pytest.mark.parametrize("ahead", [1, 2, 8])
@pytest.mark.parametrize("stop_at", [0, 3, 11])
def test_a_stop_discards_a_bounded_overrun(stack, expected, ahead, stop_at):
    session = stack(f"loop_ahead={ahead}", cuda_graph="loop").session
    seen = []

    def stop(ids, index):
        seen.append((index, ids))
        return index == stop_at

    assert session.generate(PROMPT, 12, on_token=stop) == [expected[0][: stop_at + 1]]
    assert seen == [(i, [token]) for i, token in enumerate(expected[0][: stop_at + 1])]
    assert session.overrun == min(ahead, 11 - stop_at)
    assert session.length == 21 + stop_at + session.overrun, "the length counts what the state has seen"
    if session.overrun:
        for call in (lambda: session.decode(PROMPT[:, :1]), lambda: session.prefill(PROMPT)):
            with pytest.raises(RuntimeError, match=r"reset\(\) first"):
                call()
    session.reset()
    assert session.overrun == 0 and session.generate(PROMPT, 12) == expected


def test_an_exception_in_on_token_leaves_the_session_usable(stack, expected):
    session = stack(cuda_graph="loop").session

    def broken(ids, index):
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, 12, on_token=broken)
    assert session.overrun == 8
    assert session.generate(PROMPT, 12) == expected


def test_the_loop_fills_the_context_and_no_more(stack):
    session = stack("max_seq_len=32", cuda_graph="loop").session
    assert len(session.generate(PROMPT, 11)[0]) == 11 and session.length == 31
    with pytest.raises(ValueError, match="max_seq_len=32"):
        session.generate(PROMPT, 12)


def test_a_batch_in_the_loop(stack):
    prompt = random_tokens(2, 9, vocab=256)
    together = stack("batch=2", cuda_graph="loop").session.generate(prompt, 6)
    assert together == stack("batch=2").session.generate(prompt, 6)


# --- prefill graphs ---


@pytest.mark.parametrize("state", STATE)
def test_padding_leaves_no_trace(stack, state):
    lengths = "prefill_graph_lengths=[8,24,40]"
    session = stack(f"state={state}", lengths, cuda_graph="all").session
    assert session.prefill_graphs.lengths == [8, 24, 40]
    assert [session.prefill_graphs.fitting(n) for n in (1, 8, 9, 24, 25, 40, 41)] == [8, 8, 24, 24, 40, 40, None]
    for count in (1, 8, 9, 21, 40, 50):
        prompt = random_tokens(1, count, vocab=256, seed=count)
        session.reset()
        poison_state(session.arena.tensors)
        padded = session.prefill(prompt).clone()
        found = session.arena.snapshot()
        plain = stack(f"state={state}").session
        plain.reset()
        poison_state(plain.arena.tensors)
        torch.testing.assert_close(padded, plain.prefill(prompt), rtol=0, atol=1e-5)
        for name, tensor in plain.arena.snapshot().items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize(("length", "said"), [(16, []), (17, ["prefill_graph_lengths"])])
def test_a_text_that_no_graph_holds_is_in_the_record(model, phases, tmp_path, length, said):
    """How many tokens a snapshot's tokenizer makes of it is known after validation."""
    record = Record(tmp_path / "record.json", id="t", config=None, command=["test"])
    record.set(not_applicable=[])
    cfg = configured("prefill_graph_lengths=[16]", f"prompt_len={length}", "pdl=false", cuda_graph="all")
    run = Experiment(cfg, tmp_path, record, phases)
    run.build(model)
    run.close()
    assert record.data["not_applicable"] == said
    assert [f"the prompt has {length} tokens" in note for note in record.data["notes"]] == [True] * len(said)


def test_a_prompt_continues_another_under_padding(stack):
    session, plain = (
        stack(*axes, cuda_graph=graph).session
        for axes, graph in ((["prefill_graph_lengths=[16]"], "all"), (["state=explicit"], False))
    )
    first, second = random_tokens(1, 11, vocab=256, seed=1), random_tokens(1, 5, vocab=256, seed=2)
    for each in (session, plain):
        each.prefill(first)
    torch.testing.assert_close(session.prefill(second), plain.prefill(second), rtol=0, atol=1e-5)


# --- explicit state ---


@pytest.mark.parametrize("name", ["prefill", "decode", "forward", "cond"])
def test_a_method_leaves_the_state_that_it_is_given(model, name):
    arena = Arena(state_shapes(model.arch, batch=1, max_seq_len=32, dtype=torch.float32), device="cpu")
    arena.reset()
    names = registry.resolve(default="reference", chosen={}, device="cpu")
    from moeexp_kernels import dispatch

    ops = {op: registry.OPS[op][n] for op, n in names.items()} | (dispatch.ops(names) if name == "forward" else {})
    method = MODULES[name](model, ops, state_names=tuple(arena.tensors))
    before = arena.snapshot()
    inputs = (PROMPT[:, :1],) if name == "decode" else (PROMPT,)
    more = () if name == "decode" else (torch.tensor([0]),)
    logits, *new = method(*inputs, torch.zeros(1, dtype=torch.int64), *more, *arena.tensors.values())
    assert same_state(arena.snapshot(), before) and logits.shape[1] == 1
    assert not same_state(dict(zip(arena.tensors, new, strict=True)), before)
    addresses = {tensor.data_ptr() for tensor in arena.tensors.values()}
    assert not addresses & {tensor.data_ptr() for tensor in new}


@pytest.mark.parametrize("state", STATE)
@pytest.mark.parametrize("dispatch", ["dual", "single"])
def test_a_stack_leaves_no_state_on_a_model_that_others_share(stack, model, dispatch, state):
    names = [name for name, _ in model.named_buffers()]
    first = stack(f"dispatch={dispatch}", f"state={state}")
    kept = weakref.ref(next(iter(first.arena.tensors.values())))
    first.session.prefill(PROMPT)
    other = stack().session
    continued = first.session.decode(PROMPT[:, :1]).clone()
    other.prefill(PROMPT)
    torch.testing.assert_close(continued, other.decode(PROMPT[:, :1]), rtol=0, atol=1e-5)
    assert [name for name, _ in model.named_buffers()] == names
    first.close()
    del first
    gc.collect()
    assert kept() is None, "the model keeps the state of a stack that is gone"


def test_a_state_that_is_attached_is_not_taken_away(model):
    arena = Arena(state_shapes(model.arch, batch=1, max_seq_len=32, dtype=torch.float32), device="cpu")
    with model.attached(arena.tensors):
        with pytest.raises(AssertionError, match="another state attached"), model.attached(arena.tensors):
            pass
        assert all(model.get_buffer(name) is tensor for name, tensor in arena.tensors.items())
    assert not {name for name, _ in model.named_buffers()} & arena.tensors.keys()


def test_explicit_state_comes_home():
    arena = Arena({"a": ((2,), torch.float32), "b": ((1,), torch.int32)}, device="cpu")
    state = ExplicitState(arena)
    state.reset()
    logits = state.call(lambda x, a, b: (x, a + 1, b + 2), torch.zeros(1))
    assert logits.tolist() == [0.0] and state.tensors["a"].tolist() == [1.0, 1.0]
    assert arena.tensors["a"].tolist() == [0.0, 0.0], "the front set is as it was"
    assert state.snapshot()["b"].tolist() == [2]
    state.to_front()
    assert arena.tensors["b"].tolist() == [2] and state.tensors["b"] is arena.tensors["b"]
    state.call(lambda x, a, b: (x, a * 5, b), torch.zeros(1))
    state.reset()
    assert state.tensors["a"].tolist() == [0.0, 0.0]


# --- what is refused ---


def test_one_method_under_dual_names_single():
    def method():
        pass

    with pytest.raises(ValueError, match="decode is missing.*dispatch=single"):
        session_methods("dual", {"prefill": method})
    with pytest.raises(ValueError, match="prefill is missing.*dispatch=single"):
        session_methods("dual", {"forward": method})
    prefill, decode = session_methods("single", {"prefill": method})
    assert prefill is method and decode.method is method
    with pytest.raises(ValueError, match="needs the method decode"):
        session_methods("token_by_token", {"prefill": method})
    with pytest.raises(ValueError, match="any number of tokens"):
        session_methods("single", {"decode": method})


@pytest.mark.slow
def test_cond_with_shared_state_cannot_be_compiled(model, tmp_path):
    """Why that combination is refused: export overlooks what a branch mutates, and AOTInductor stumbles over it."""
    arena = Arena(state_shapes(model.arch, batch=1, max_seq_len=32, dtype=torch.float32), device="cpu")
    arena.reset()
    with pytest.raises(Exception, match="(?i)mutat|alias"), model.attached(arena.tensors):
        program = export_method("cond", model, common.reference_ops(), batch=1, max_seq_len=32)
        assert not program.graph_signature.buffers_to_mutate
        compile_method(program, tmp_path / "cond.pt2", inductor_config(method="cond", device="cpu"))


AXES = {
    "dispatch": DISPATCH,
    "state": STATE,
    "shared_stream": (True, False),
    "skip_output_copy": (True, False),
    "cuda_graph": (False, "decode", "loop", "all"),
    "export": ("eager", "compile", "aoti"),
}


def test_the_whole_matrix_is_valid_but_for_what_is_listed():
    """Prints the table (`pytest -s`): what each combination of the six axes is on a GPU."""
    config, lines, refused = compose(BASE), [], 0
    for cell in itertools.product(*AXES.values()):
        point = dict(zip(AXES, cell, strict=True))
        for name, value in point.items():
            setattr(config, name, value)
        wanted = []
        if point["dispatch"] == "cond" and point["state"] == "shared":
            wanted.append("dispatch=cond with state=shared")
        if point["cuda_graph"] in ("loop", "all") and not point["skip_output_copy"]:
            wanted.append(f"cuda_graph={point['cuda_graph']} samples inside the graph")
        try:
            validate(config, cuda_available=True)
            verdict = "valid"
        except ValueError as error:
            verdict = f"refused: {error}"
        assert (verdict == "valid") == (not wanted), (point, verdict)
        assert not wanted or any(reason in verdict for reason in wanted), (point, verdict)
        refused += bool(wanted)
        lines.append("  ".join(f"{name}={value}" for name, value in point.items()) + f"  {verdict}")
    print("\n".join(lines), f"\n{len(lines)} combinations, {refused} refused")
    assert len(lines) == 4 * 2 * 2 * 2 * 4 * 3


@pytest.mark.parametrize(("capability", "acts"), [((8, 9), False), ((9, 0), True)])
def test_pdl_is_built_on_no_gpu_before_hopper(monkeypatch, capability, acts):
    cfg = resolve(compose(["model=nano", "cuda_graph=true"]), cuda_available=True)
    monkeypatch.setattr(factory, "compute_capability", lambda device: capability if device == "cuda" else None)
    assert (factory.pdl_of(cfg) is not None) == acts
    cfg.pdl = False
    assert factory.pdl_of(cfg) is None


def test_the_record_lists_what_calls_back_into_python(stack):
    built = stack("dispatch=single")
    assert set(python_callbacks(built, "single")["decode"]) == {"linear", "gdn_decode", "sdpa_decode", "moe_decode"}
    dual = python_callbacks(stack(), "dual")
    assert dual == {"prefill": ["gdn_prefill", "moe_prefill", "sdpa_prefill"], "decode": []}
    assert python_callbacks(stack("dispatch=token_by_token"), "token_by_token")["prefill"] == []


# --- samplers ---

GUMBEL = ["sampler=gumbel", "sampler.seed=7"]


@pytest.mark.parametrize("filters", [[], ["sampler.top_k=5", "sampler.top_p=0.8"]])
def test_draws_repeat_with_the_seed_and_are_the_loops(stack, filters):
    session = stack(*GUMBEL, *filters).session
    first = session.generate(PROMPT, 12)
    assert session.generate(PROMPT, 12) == first, "reset starts the draws again"
    assert stack(*GUMBEL, *filters, cuda_graph="loop").session.generate(PROMPT, 12) == first
    assert stack(*GUMBEL, *filters, "sampler.seed=8").session.generate(PROMPT, 12) != first


def test_drawn_tokens_are_checked_by_their_race(model, phases):
    cfg = configured(*GUMBEL, "sampler.top_k=40")
    built = build_stack(cfg, model, phases)
    verdict = verify(cfg, built, PROMPT, phases)
    assert verdict["passed"], verdict["failures"]
    cfg.sampler.seed += 1  # which drew none of them
    verdict = verify(cfg, built, PROMPT, phases)
    failed = [part["name"] for part in verdict["parts"] if not part["passed"]]
    assert failed == ["tokens"]


OWN_SAMPLE = "ops.sample=moeexp_kernels.ops.sample:reference_greedy"  # named as a user's op is


def test_a_sampler_that_makes_no_draws_is_refused():
    with pytest.raises(ValueError, match="makes no draws.*ops.sample=reference or triton, or sampler=greedy"):
        validate(compose([*BASE, *GUMBEL, OWN_SAMPLE]), cuda_available=False)
    for override, word in (("temperature=0", "1e-06"), ("top_k=0", "at least 1"), ("top_p=1.5", "at most 1")):
        with pytest.raises(ValueError, match=word):
            validate(compose([*BASE, "sampler=gumbel", f"sampler.{override}"]), cuda_available=False)


def test_an_op_that_copied_logits_would_not_reach_is_refused():
    copied = [*BASE, "skip_output_copy=false"]
    for own in (OWN_SAMPLE, "ops.sample=triton"):
        with pytest.raises(ValueError, match=f"^{own} with skip_output_copy=false.*skip_output_copy=true"):
            validate(compose([*copied, own]), cuda_available=True)
    for fine in ([], ["ops=triton"], ["ops.sample=auto"], ["ops.sample=reference"], GUMBEL, [OWN_SAMPLE, "device=cpu"]):
        validate(compose([*copied, *fine]), cuda_available=True)
    validate(compose([*BASE, OWN_SAMPLE]), cuda_available=True)


@pytest.mark.slow
def test_padding_is_bitwise_nothing_with_the_kernels(model, phases):
    """In Triton's interpreter; on a GPU: gpu/test_gpu_axes.py."""
    results = []
    for cuda_graph in (False, "all"):
        cfg = configured("ops=triton", "prefill_graph_lengths=[24]", cuda_graph=cuda_graph)
        session = build_stack(cfg, model, phases).session
        session.reset()
        poison_state(session.arena.tensors)
        logits = session.prefill(PROMPT[:, :11].contiguous()).clone()
        results.append({"logits": logits, **session.arena.snapshot()})
    assert same_state(*results)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_a_separate_check_comes_after_the_timing_and_still_decides(tmp_path, monkeypatch, broken):
    if broken:
        right_op = registry.OPS["gdn_decode"]["reference"]
        monkeypatch.setitem(registry.OPS["gdn_decode"], "reference", lambda **inputs: right_op(**inputs) * 1.01)
    monkeypatch.chdir(tmp_path)
    arguments = ["model=nano", "export=eager", "check=separate", "new_tokens=4", "repeats=1", "tracker=jsonl"]
    code = cli.main(arguments)
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    assert (code, record["status"]) == ((1, "incorrect") if broken else (0, "ok"))
    assert (record["decode_tok_s"] is None) == broken
    phases = list(record["phases_s"])
    assert phases.index("benchmark") < phases.index("check: trace") and record["memory_gib"] is not None
