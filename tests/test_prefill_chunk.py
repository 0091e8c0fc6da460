"""A prompt longer than `prefill_chunk` goes through in pieces: the same tokens, logits and state; no call has it whole."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import build_session, random_tokens, same_state
from moeexp_runner.pieces import piece_sizes

from moeexp import cli
from moeexp.check import bits_per_byte, traces, verify
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.record import free_memory
from moeexp.stack.factory import build_model, build_stack
from moeexp.stack.methods import OF_DISPATCH

BASE = ["model=nano", "quant=int4", "max_seq_len=96", "dtype=float32", "new_tokens=6", "prompt_len=40"]
CHUNK, PIECES = 7, [7, 7, 7, 7, 6, 6]
LEGAL = [
    (dispatch, state) for dispatch in OF_DISPATCH for state in ("shared", "explicit") if (dispatch, state) != ("cond", "shared")
]
PROMPT = random_tokens(1, 40, vocab=256)


def configured(*overrides, cuda_graph=False):
    """`cuda_graph` is set past the rules, which refuse it without CUDA."""
    cfg = resolve(compose([*BASE, "export=eager", *overrides]), cuda_available=False)
    cfg.cuda_graph = cuda_graph
    return cfg


@pytest.fixture(scope="module")
def model(phases):
    return build_model(configured(), phases)


@pytest.fixture(scope="module")
def whole(model, phases):
    """The same prompt in one call: tokens, and the state behind it."""
    stack = build_stack(configured("prefill_chunk=0"), model, phases)
    return stack.session.generate(PROMPT, 6), stack.arena.snapshot()


def watched(session):
    """[(tokens, first position, logits)] of each call of the session's prefill method from now on."""
    calls, call = [], session.arena.call

    def watching(method, tokens, positions, *more):
        if more:  # a step asks for no positions of logits
            assert tokens.is_contiguous() and not tokens._is_view()
            calls.append((tokens.shape[1], int(positions[0]), len(more[0])))
        return call(method, tokens, positions, *more)

    session.arena.call = watching
    return calls


@pytest.mark.parametrize("most", range(12))
def test_pieces_are_few_and_even(most):
    for tokens in range(1, 60):
        sizes = piece_sizes(tokens, most)
        assert sum(sizes) == tokens and len(sizes) == (-(-tokens // most) if most else 1)
        assert max(sizes) - min(sizes) <= 1 and (not most or max(sizes) <= most)
        assert min(sizes) > 1 or most in (1, 2) or tokens == 1, "a token alone runs other kernels"
    assert piece_sizes(8193, 8192) == [4097, 4096] and piece_sizes(40, CHUNK) == PIECES


@pytest.mark.parametrize("wanted", [None, [39], [0], [20, 3, 39, 3, 13, 14], list(range(40))], ids=str)
def test_logits_are_made_in_the_piece_that_holds_them_alone(wanted):
    tokens, positions = random_tokens(2, 45), None if wanted is None else torch.tensor(wanted)
    session, plain = (build_session(batch=2, max_seq_len=48, prefill_chunk=chunk) for chunk in (CHUNK, 0))
    for each in (session, plain):
        each.prefill(tokens[:, 40:])  # pieces count from where the session is
    calls = watched(session)
    torch.testing.assert_close(
        session.prefill(tokens[:, :40], positions), plain.prefill(tokens[:, :40], positions), rtol=0, atol=1e-5
    )
    starts = [sum(PIECES[:i]) for i in range(len(PIECES))]
    made = [sum(start <= place < start + size for place in wanted or [39]) for start, size in zip(starts, PIECES, strict=True)]
    assert calls == [(size, 5 + start, max(1, n)) for size, start, n in zip(PIECES, starts, made, strict=True)]
    assert session.length == 45
    for name, tensor in plain.arena.tensors.items():
        torch.testing.assert_close(session.arena.tensors[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_prompt_of_a_chunk_is_one_call():
    session, plain = (build_session(max_seq_len=48, prefill_chunk=chunk) for chunk in (40, 0))
    calls = watched(session)
    assert torch.equal(session.prefill(random_tokens(1, 40)), plain.prefill(random_tokens(1, 40)))
    assert calls == [(40, 0, 1)] and same_state(session.arena.snapshot(), plain.arena.snapshot())


@pytest.mark.parametrize(("dispatch", "state"), LEGAL)
@pytest.mark.parametrize("cuda_graph", [False, "loop", "all"])
def test_every_combination_decodes_the_tokens_of_the_whole_prompt(model, phases, whole, dispatch, state, cuda_graph):
    """Under `all` each piece runs as a graph, which holds 8 tokens, and the whole prompt could not."""
    axes = [f"dispatch={dispatch}", f"state={state}", f"prefill_chunk={CHUNK}", "prefill_graph_lengths=[8]"]
    stack = build_stack(configured(*axes, cuda_graph=cuda_graph), model, phases)
    session, replayed = stack.session, []
    calls = watched(session)
    if session.prefill_graphs is not None:
        replay = session.prefill_graphs.replay
        session.prefill_graphs.replay = lambda *inputs: replayed.append(int(inputs[3][0])) or replay(*inputs)
    for _ in range(2):  # the second generation starts on used state
        assert session.generate(PROMPT, 6) == whole[0]
    for name, tensor in whole[1].items():
        torch.testing.assert_close(stack.arena.tensors[name], tensor, rtol=0, atol=1e-5, msg=name)
    expected = [] if dispatch == "token_by_token" else 2 * PIECES
    assert (replayed if cuda_graph == "all" else [size for size, *_ in calls]) == expected


@pytest.mark.parametrize("cuda_graph", [False, "all"])
def test_the_check_compares_the_pieces_with_the_whole_prompt(model, phases, monkeypatch, cuda_graph):
    """In two prefills of all positions, since a piece's logits are two slices; and a fault where pieces meet is seen."""
    cfg = configured("state=explicit", f"prefill_chunk={CHUNK}", "prefill_graph_lengths=[8]", cuda_graph=cuda_graph)
    monkeypatch.setattr(bits_per_byte, "SLICE_ELEMENTS", 4 * 256)
    sizes = []
    monkeypatch.setattr(traces, "on_host", lambda size: sizes.append(size) or True)
    stack = build_stack(cfg, model, phases)
    places, prefill = [], stack.session.prefill

    def asked(tokens, positions=None):
        if positions is not None and len(positions) > 1:
            places.append((stack.session.length + positions).tolist())
        return prefill(tokens, positions)

    with monkeypatch.context() as patch:
        patch.setattr(stack.session, "prefill", asked)
        found = verify.verify(cfg, stack, PROMPT, phases)
    assert found["passed"], found["failures"]
    pieces = [piece.tolist() for piece in torch.arange(40).split(PIECES)]
    assert places == [piece[:4] for piece in pieces] + [piece[4:] for piece in pieces]
    assert sizes == [45 * 256 * 4], "what the estimate counts of a check: the logits of all positions"
    call = stack.arena.call

    def forgetful(method, *inputs):
        if stack.session.length == CHUNK:
            for name, tensor in stack.arena.tensors.items():
                if name.endswith("conv_state"):
                    tensor.zero_()
        return call(method, *inputs)

    monkeypatch.setattr(stack.arena, "call", forgetful)
    found = verify.verify(cfg, stack, PROMPT, phases)
    assert not found["passed"] and any(line.startswith("float32: float32.position") for line in found["failures"])


@pytest.mark.parametrize("dispatch, state", [("dual", "shared"), ("dual", "explicit"), ("token_by_token", "shared")])
@pytest.mark.parametrize(
    ("step", "made"),
    [
        (7, [PIECES]),
        (6, [[6] * 6, [1, 1, 1, 1, 6, 6]]),
        pytest.param(3, [[3] * 6, [3] * 6, [1, 1, 1, 1, 3, 3]], marks=pytest.mark.slow),
    ],
)
def test_a_trace_in_slices_of_its_pieces_is_that_of_the_session_itself(model, phases, monkeypatch, dispatch, state, step, made):
    """Of two sequences. A piece of 6 has a slice less than one of 7, and makes its last one again; the logits of a piece are gone
    when the next one is run, and none makes more than a slice."""
    stack = build_stack(configured("batch=2", f"dispatch={dispatch}", f"state={state}", f"prefill_chunk={CHUNK}"), model, phases)
    session, prompt = stack.session, random_tokens(2, 40, vocab=256)
    expected = session.prefill(prompt, torch.arange(40))
    monkeypatch.setattr(bits_per_byte, "SLICE_ELEMENTS", step * 2 * 256)
    prefill, calls, living = session.prefill, [], []

    def watching(tokens, positions=None):
        assert all(storage() is None for storage in living)
        logits = prefill(tokens, positions)
        calls.append((session.length - tokens.shape[1], *logits.shape))
        living.append(weakref.ref(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(session, "prefill", watching)
    trace = traces.record_trace(stack, prompt, 6)
    starts = [sum(PIECES[:i]) for i in range(len(PIECES))]
    assert calls[:-1] == [(start, 2, n, 256) for counts in made for start, n in zip(starts, counts, strict=True)]
    assert calls[-1] == (0, 2, 1, 256), "of the last position alone, as a generation asks for it"
    torch.testing.assert_close(trace.logits[:, :40], expected, rtol=0, atol=1e-5)
    if step == 7:
        assert torch.equal(trace.logits[:, :39], expected[:, :39])
    calls.clear()
    forced = traces.record_trace(stack, prompt, 6, forced=trace.token_ids[:, 40:])
    assert len(calls) == sum(map(len, made)), "nobody asks what comes after the prompt where the tokens are given"
    torch.testing.assert_close(forced.logits, trace.logits, rtol=0, atol=1e-5)
    for name, state in forced.states.items():
        torch.testing.assert_close(state, trace.states[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 5, 7, 12, 39, 40, 99])
@pytest.mark.parametrize("dispatch", ["dual", "token_by_token"])
def test_a_trace_with_logits_of_the_prompts_last_positions_is_the_end_of_a_whole_one(model, phases, monkeypatch, dispatch, kept):
    stack = build_stack(configured("batch=2", f"dispatch={dispatch}", f"prefill_chunk={CHUNK}"), model, phases)
    session, prompt, made = stack.session, random_tokens(2, 40, vocab=256), []
    monkeypatch.setattr(bits_per_byte, "SLICE_ELEMENTS", 3 * 2 * 256)
    whole = traces.record_trace(stack, prompt, 6)
    prefill = session.prefill
    monkeypatch.setattr(session, "prefill", lambda *inputs: made.append(prefill(*inputs)) or made[-1])
    trace = traces.record_trace(stack, prompt, 6, prompt_logits=kept)
    first = max(0, 40 - kept)
    assert trace.first == first and trace.logits.shape == (2, 45 - first, 256)
    torch.testing.assert_close(trace.logits, whole.logits[:, first:], rtol=0, atol=1e-5)
    assert torch.equal(trace.token_ids, whole.token_ids) and torch.equal(trace.expert_ids, whole.expert_ids)
    for name, state in whole.states.items():
        torch.testing.assert_close(trace.states[name], state, rtol=0, atol=1e-5)
    wanted = min(7, kept)  # of a piece, and a slice has three
    assert len(made) == len(PIECES) * -(-wanted // 3) + 1 and all(logits.shape[1] <= 3 for logits in made)


def test_a_check_of_the_last_positions_logits_sees_a_fault_of_a_piece_before_them(model, phases, monkeypatch):
    """In what the earlier positions left in the state, although none of their logits is compared."""
    cfg = configured("check_logits=3")
    stack = build_stack(cfg, model, phases)
    found = verify.verify(cfg, stack, PROMPT, phases)
    assert found["passed"], found["failures"]
    assert found["parts"][0]["report"]["positions"] - found["parts"][0]["report"]["with_logits"] == PROMPT.shape[1] - 3
    keys = {"float32.logits": "logits from position 37 on"}
    rows = [row for part in found["parts"] for row in part["tolerances"] if row["tolerance"] in keys]
    assert [row["where"] for row in rows] == list(keys.values())
    call, name = stack.arena.call, next(n for n in stack.arena.tensors if n.endswith("v_cache"))

    def faulty(method, *inputs):
        output = call(method, *inputs)
        stack.arena.tensors[name][:, 0, 4] *= 1.01
        return output

    monkeypatch.setattr(stack.arena, "call", faulty)
    found = verify.verify(cfg, stack, PROMPT, phases)
    assert not found["passed"] and any("v_cache, batch 0, head 0, position 4" in line for line in found["failures"])


@pytest.mark.parametrize(
    ("device", "batch", "dtype", "free", "positions"),
    [
        ("cuda", 1, torch.float32, 110 << 30, 8648),  # all that 32 bits count; a piece of 8,192 is one slice
        ("cuda", 1, torch.float32, 24 << 30, 6486),  # 6 GiB
        ("cuda", 1, torch.bfloat16, 8 << 30, 4324),
        ("cuda", 8, torch.float32, 24 << 30, 810),
        ("cuda", 1, torch.float32, 2 << 30, 1081),  # never less than on a cpu
        ("cuda", 1, torch.float32, -1 << 30, 1081),
        ("cuda", 1, torch.float32, None, 1081),
        ("cpu", 1, torch.float32, 110 << 30, 1081),
        ("cpu", 8, torch.float32, 110 << 30, 135),
    ],
)
def test_a_gpu_makes_as_many_logits_at_a_time_as_fit_its_free_memory_four_times(
    monkeypatch, device, batch, dtype, free, positions
):
    """What torch holds counts as free in the driver's number, and part of it is in use."""
    used = 20 << 30
    monkeypatch.setattr(free_memory, "of_device", {"cuda": None if free is None else free + used}.get)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: used)
    session = SimpleNamespace(batch=batch, vocab_size=248320, device=torch.device("cpu"))
    stack = SimpleNamespace(session=session, device=torch.device(device))
    assert traces._positions_at_once(stack, 8192, dtype) == positions
    assert batch * positions * 248320 < 2**31


@pytest.mark.slow
@pytest.mark.parametrize("state", ["shared", "explicit"])
@pytest.mark.parametrize("export", ["eager", "aoti", "compile"])
def test_a_run_in_pieces_passes_its_check_under_every_export(tmp_path, monkeypatch, whole, export, state):
    monkeypatch.chdir(tmp_path)
    quick = ["tracker=jsonl", "repeats=1", "min_samples=1", "min_time_s=0", f"prompt_ids={PROMPT[0].tolist()}".replace(" ", "")]
    given = [one for one in BASE if not one.startswith("prompt_len")] + quick
    assert cli.main([*given, f"export={export}", f"state={state}", f"prefill_chunk={CHUNK}"]) == 0
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    assert record["check"]["passed"] and record["generated_ids"] == whole[0] and record["config"]["prefill_chunk"] == CHUNK
