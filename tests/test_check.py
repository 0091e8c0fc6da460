"""The check passes what is right and catches every small fault; all traces come from transformers' own model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from moeexp_kernels.parts.deviation import compare_rows
from reference_model import ARCHITECTURE, ModelWeights, build_model, config_of, run_model, tokens, trace_of

from moeexp.check import metrics, tolerances
from moeexp.check.check import Trace, check_float32, check_timed, check_tokens, check_trace
from moeexp.check.metrics import choice_gaps, compare_logits
from moeexp.check.reference import run_reference
from moeexp.check.tolerances import TOLERANCES, own_limit, token_noise, worst_rows
from moeexp.model.qwen3_5_moe import state_shapes

torch.set_num_threads(1)
LENGTH, PROMPT = 24, 15


@pytest.fixture(scope="module")
def weights():
    return ModelWeights(build_model())


@pytest.fixture(scope="module")
def references(weights):
    """The reference on its own choices, and the bf16 pair, all on the same greedy tokens: generated from PROMPT on."""
    ids = tokens(2, PROMPT)
    for _ in range(PROMPT, LENGTH):
        run = reference(weights, ids)
        ids = torch.cat([ids, run.logits(ids.shape[1] - 1, ids.shape[1]).argmax(-1)], dim=1)
    run = reference(weights, ids)
    half = reference(weights, ids, dtype=torch.bfloat16)
    return run, half, reference(weights, ids, expert_ids=half.expert_ids)


def reference(weights, ids, dtype=torch.float32, **options):
    return run_reference(config_of(ARCHITECTURE), weights, ids, PROMPT, dtype=dtype, device="cpu", **options)


def failed(part) -> set[str]:
    assert part.passed == (not part.failures())
    assert len(part.failures()) == sum(not row["passed"] for row in part.tolerances)
    json.dumps(part.to_json(), allow_nan=False)
    return {row["tolerance"] for row in part.tolerances if not row["passed"]}


def test_a_right_trace_passes_every_part(weights, references):
    run, half, on_half = references
    trace = run_model(build_model(), run.token_ids, PROMPT)
    assert not failed(check_trace(trace, ARCHITECTURE))
    part = check_float32(trace, reference(weights, run.token_ids, expert_ids=trace.expert_ids))
    assert not failed(part)
    names = {row["tolerance"] for row in part.tolerances}
    assert names == {"trace.finite"} | {name for name in TOLERANCES if name.startswith("float32.")}
    assert part.report["rmse_ratio"] < 1e-5 and part.report["top1_agreement"] == 1.0
    assert not failed(check_timed(trace_of(half), on_half, half, on_half))
    assert not failed(check_tokens(trace, run)) and not failed(check_tokens(trace, run, half, on_half))


def test_transformers_in_bfloat16_is_its_own_yardstick(references):
    _, half, on_half = references
    part = check_timed(trace_of(half), on_half, half, on_half)
    values = {row["tolerance"]: row["value"] for row in part.tolerances}
    assert values["timed.logits"] == pytest.approx(1.0) and values["timed.position"] == pytest.approx(1.0)
    assert 0 < values["timed.choice"] < 4 and part.report["positions_with_another_choice"] > 0
    assert 0.005 < part.report["rmse_ratio"] < 0.1


def test_longer_caches_and_kept_expert_ids_are_no_fault(references):
    trace = trace_of(references[0])
    for name, state in trace.states.items():
        if name.endswith("_cache"):
            trace.states[name] = torch.cat([state, torch.full_like(state, math.nan)], dim=2)
    trace.states["layers.0.expert_ids"] = trace.expert_ids[0].int()
    trace.expert_ids = trace.expert_ids.int()
    assert not failed(check_trace(trace, ARCHITECTURE)) and not failed(check_float32(trace, references[0]))


def without_first(trace: Trace, first: int) -> Trace:
    return replace(trace, logits=trace.logits[:, first:], first=first)


@pytest.mark.parametrize("first", [1, 9, PROMPT - 1])
def test_a_trace_with_logits_of_the_last_positions_alone_is_judged_by_those(references, first):
    """Every number is what the same rows of a whole trace give; of those before, faults in state and choices are still seen."""
    run, half, on_half = references
    trace = without_first(trace_of(run), first)
    part = check_trace(trace, ARCHITECTURE)
    assert not failed(part) and part.report["with_logits"] == 2 * (LENGTH - first) < part.report["positions"]
    assert not failed(check_float32(trace, run)) and not failed(check_tokens(trace, run, half, on_half))
    timed = check_timed(without_first(trace_of(half), first), on_half, half, on_half)
    values = {row["tolerance"]: row for row in timed.tolerances}
    assert values["timed.logits"]["value"] == pytest.approx(1.0) and values["timed.position"]["value"] == pytest.approx(1.0)
    assert f"from position {first} on" in values["timed.logits"]["where"]
    for position in (first, PROMPT, LENGTH - 1):
        trace = without_first(trace_of(run), first)
        trace.logits[1, position - first] *= 1.01
        part = check_float32(trace, run)
        assert any(f"batch 1, position {position}:" in line for line in part.failures()), part.failures()
        assert ("float32.decode_step" in failed(part)) == (position >= PROMPT)
    trace = without_first(trace_of(run), first)
    trace.states["layers.1.k_cache"][1, 0, 0] *= 1.01
    assert any("layers.1.k_cache, batch 1, head 0, position 0" in line for line in check_float32(trace, run).failures())
    worst = without_first(trace_of(run), first)
    worst.next_token = run.logits(LENGTH - 1, LENGTH)[:, 0].argmin(-1)
    assert failed(check_tokens(worst, run, half, on_half)) == {"tokens.logit_margin"}


def test_a_trace_needs_the_logits_that_predict_the_first_token(references):
    trace = without_first(trace_of(references[0]), PROMPT)
    with pytest.raises(AssertionError, match="predicts the first token"):
        check_trace(trace, ARCHITECTURE)
    trace = replace(trace_of(references[0]), first=3)
    assert failed(check_trace(trace, ARCHITECTURE)) == {"trace.complete"}


def fault_row_by_1_percent(t: Trace):
    t.logits[1, 4] *= 1.01


def fault_zeroed_row(t: Trace):
    t.logits[0, 20] = 0


def fault_nan(t: Trace):
    t.logits[1, 3, 7] = math.nan


def fault_infinity_in_a_state(t: Trace):
    t.states["layers.2.recurrent_state"][0, 1, 2, 3] = math.inf


def fault_state_by_1_percent(t: Trace):
    t.states["layers.3.recurrent_state"] *= 1.01


def fault_cache_row(t: Trace):
    t.states["layers.4.v_cache"][1, 0, 9] *= 1.01


def fault_conv_slot(t: Trace):
    t.states["layers.0.conv_state"][0, :, 2] *= 1.01


def fault_decode_step(t: Trace):
    t.logits[:, 17] += 2.5e-4 * torch.randn(t.logits[:, 17].shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fault", "expected", "where"),
    [
        (fault_row_by_1_percent, {"float32.position", "float32.logits"}, "batch 1, position 4"),
        (fault_zeroed_row, {"float32.position", "float32.logits", "float32.decode_step"}, "batch 0, position 20"),
        (fault_nan, {"trace.finite", "float32.logits", "float32.position"}, "logits"),
        (fault_infinity_in_a_state, {"trace.finite", "float32.state", "float32.state_row"}, "layers.2.recurrent_state"),
        (fault_state_by_1_percent, {"float32.state", "float32.state_row"}, "layers.3.recurrent_state"),
        (fault_cache_row, {"float32.state", "float32.state_row"}, "layers.4.v_cache, batch 1, head 0, position 9"),
        (fault_conv_slot, {"float32.state", "float32.state_row"}, "layers.0.conv_state, batch 0, slot 2"),
        (fault_decode_step, {"float32.decode_step"}, "decode step 2, position 17"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_float32_catches(references, fault, expected, where):
    trace = trace_of(references[0])
    fault(trace)
    part = check_float32(trace, references[0])
    assert expected <= failed(part) and any(where in line for line in part.failures()), part.failures()
    if fault is fault_decode_step:  # small enough that nothing but the step's own tolerance sees it
        assert failed(part) == expected


def test_one_zeroed_row_of_many_fails_by_its_row_alone(references):
    """Of 4,096 rows of 1,000, one small row is zeroed: the aggregate passes, the row does not."""
    reference = torch.randn(4096, 1000, generator=torch.Generator().manual_seed(0))
    reference[77] *= 1e-4  # below the floor: a row whose own ratio says nothing
    reference[99] *= 3e-3
    value = reference.clone()
    value[99] = 0
    rows = compare_rows(value, reference, (0,))
    assert rows.ratio() < 1e-4
    assert rows.row_ratios()[99] == pytest.approx(0.03, rel=0.05) and int(rows.row_ratios().argmax()) == 99
    value[77] = 0  # a whole row is gone, but it is 1e-4 of the tensor's scale
    assert compare_rows(value, reference, (0,)).row_ratios()[77] < 2e-3


def wrong_choice(run, layer: int, position: int):
    """The run's choices with the best expert of one position replaced by its worst."""
    choices = run.expert_ids.clone()
    order = run.router_logits[layer, 0, position].argsort(descending=True)
    choices[layer, 0, position] = torch.stack([order[-1], order[1]])
    return choices


def test_float32_catches_a_wrong_expert(weights, references):
    """All numbers agree, since the reference replays the choice: only the choice's own tolerance can see it."""
    ids = references[0].token_ids
    replayed = reference(weights, ids, expert_ids=wrong_choice(references[0], 2, 13))
    part = check_float32(trace_of(replayed), replayed)
    assert failed(part) == {"float32.choice"} and "layer 2, batch 0, position 13" in part.failures()[0]


def test_timed_catches_a_wrong_expert(weights, references):
    run, half, on_half = references
    choices = wrong_choice(on_half, 0, 13)
    replayed = reference(weights, run.token_ids, expert_ids=choices)
    trace = trace_of(reference(weights, run.token_ids, dtype=torch.bfloat16, expert_ids=choices))
    part = check_timed(trace, replayed, half, on_half)
    assert failed(part) == {"timed.choice"} and "layer 0, batch 0, position 13" in part.failures()[0]


@pytest.mark.parametrize("fault", [fault_zeroed_row, fault_nan, fault_infinity_in_a_state])
def test_timed_catches(references, fault):
    _, half, on_half = references
    trace = trace_of(half)
    fault(trace)
    names = failed(check_timed(trace, on_half, half, on_half))
    assert names & {"timed.position", "trace.finite"}


def test_timed_catches_noise_twice_that_of_bfloat16(references):
    _, half, on_half = references
    trace, exact = trace_of(half), on_half.logits(0, LENGTH)
    trace.logits = exact + 2 * (trace.logits - exact)
    assert failed(check_timed(trace, on_half, half, on_half)) == {"timed.logits", "timed.position"}


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.linear_attn.conv1d.weight",
        "layers.2.linear_attn.norm.weight",
        "layers.1.self_attn.q_norm.weight",
        "layers.1.self_attn.o_proj.weight",
        "layers.3.mlp.experts.down_proj",
        "layers.4.mlp.shared_expert_gate.weight",
        "layers.4.post_attention_layernorm.weight",
        "layers.0.linear_attn.dt_bias",
    ],
)
def test_an_op_that_is_off_by_1_percent_is_caught_in_float32(weights, references, name):
    model = build_model()
    with torch.no_grad():
        dict(model.model.named_parameters())[name].mul_(1.01)
    trace = run_model(model, references[0].token_ids, PROMPT)
    part = check_float32(trace, reference(weights, trace.token_ids, expert_ids=trace.expert_ids))
    assert {"float32.logits", "float32.decode_step"} <= failed(part)


def test_trace_must_be_whole(references):
    def check(change):
        trace = trace_of(references[0])
        change(trace)
        return check_trace(trace, ARCHITECTURE)

    part = check(lambda t: t.states.pop("layers.1.k_cache"))
    assert failed(part) == {"trace.complete"} and "layers.1.k_cache: shape None" in part.failures()[0]
    part = check(lambda t: t.states.update({"layers.9.k_cache": torch.zeros(1)}))
    assert "layers.9.k_cache" in part.failures()[0]
    part = check(lambda t: setattr(t, "logits", t.logits[:, 1:]))
    assert "logits: shape (2, 23, 64), wanted (2, 24, 64)" in part.failures()[0]
    assert failed(check(fault_nan)) == {"trace.finite"}
    for value in (8, -1):
        part = check(lambda t, v=value: t.expert_ids[3, 1, 5].copy_(torch.tensor([0, v])))
        assert failed(part) == {"trace.experts"} and "layer 3, batch 1, position 5" in part.failures()[0]
    assert failed(check(lambda t: t.expert_ids[3, 1, 5].fill_(2))) == {"trace.experts"}


def test_state_shapes_are_those_of_transformers(references):
    shapes = {name: tuple(t.shape) for name, t in references[0].states.items()}
    ours = state_shapes(ARCHITECTURE, batch=2, max_seq_len=LENGTH, dtype=torch.float32)
    assert {name: shape for name, (shape, _) in ours.items() if not name.endswith(".expert_ids")} == shapes


def with_tokens(references, change) -> tuple[Trace, list]:
    """Trace and references whose token ids are changed, their numbers kept: the rule sees only tokens and logits."""
    ids = references[0].token_ids.clone()
    change(ids)
    runs = [copy.copy(run) for run in references]
    for run in runs:
        run.token_ids = ids
    trace = trace_of(runs[0])
    return trace, runs


def test_tokens_catches_a_wrong_token(references):
    def change(ids):
        ids[1, 19] = references[0].logits(18, 19)[1, 0].topk(5).indices[4]

    trace, (run, half, on_half) = with_tokens(references, change)
    for part in (check_tokens(trace, run), check_tokens(trace, run, half, on_half)):
        assert failed(part) == {"tokens.logit_margin"} and "batch 1, position 19" in part.failures()[0]
        assert part.report["tokens"] == 2 * (LENGTH - PROMPT)
        assert part.report["argmax"] == part.report["tokens"] - 1


def test_tokens_judges_the_last_token_that_was_not_fed(references):
    run = references[0]
    trace = trace_of(run)
    trace.next_token = run.logits(LENGTH - 1, LENGTH)[:, 0].argmax(-1)
    part = check_tokens(trace, run)
    assert not failed(part) and part.report["tokens"] == 2 * (LENGTH - PROMPT + 1)
    trace.next_token = run.logits(LENGTH - 1, LENGTH)[:, 0].argmin(-1)
    assert "position 24" in check_tokens(trace, run).failures()[0]


def test_choices_of_logits_are_judged_where_others_chose_the_tokens(references):
    """Also that of the last position. Tokens that nobody would choose are no fault of theirs, another choice is."""

    def change(ids):
        ids[1, 19] = references[0].logits(18, 19)[1, 0].topk(5).indices[4]

    trace, (run, half, on_half) = with_tokens(references, change)
    noise = torch.zeros(trace.logits.shape[-1])
    noise[7] = 1e3  # that every draw would choose
    for more in ((), (half, on_half)):
        part = check_tokens(trace, run, *more, by_logits=True)
        assert not failed(part) and part.report["argmax"] == part.report["tokens"] == 2 * (LENGTH - PROMPT + 1)
        drawn = check_tokens(trace, run, *more, gumbel=lambda logits, first: logits + noise, by_logits=True)
        assert not failed(drawn)
    trace.logits = trace.logits.clone()
    trace.logits[0, LENGTH - 1, run.logits(LENGTH - 1, LENGTH)[0, 0].argmin()] = 1e3
    part = check_tokens(trace, run, by_logits=True)
    assert failed(part) == {"tokens.logit_margin"} and f"batch 0, position {LENGTH}" in part.failures()[0]


def test_the_noise_of_more_tokens_reaches_further_and_no_run_fails_by_chance_more_often():
    """Logits of a vocabulary whose noise is 5 % of their sd: how far the argmax of noisy ones trails, in units of the noise. Of a
    normal sample only the upper tail is drawn."""
    assert token_noise(1) == token_noise(128) == TOLERANCES["tokens.noise"].limit
    generator, sigma, kept, runs = torch.Generator().manual_seed(0), 0.05, 128, 100
    share = kept / 248320
    tail = torch.rand(runs * 1024, kept, generator=generator, dtype=torch.float64) * share
    logits = -torch.special.ndtri(tail)
    noisy = logits + sigma * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    chosen = logits.gather(1, noisy.argmax(1, keepdim=True))[:, 0]
    margin = ((logits.amax(1) - chosen) / sigma).view(runs, 1024)
    fails_of_128 = (margin.view(-1, 128).amax(1) > TOLERANCES["tokens.noise"].limit).double().mean()
    fails = (margin.amax(1) > token_noise(1024)).double().mean()
    assert 0.005 < fails_of_128 < 0.1 and fails < 2 * fails_of_128
    assert (margin.amax(1) > TOLERANCES["tokens.noise"].limit).double().mean() > 4 * fails_of_128, "with the limit of 128"


def test_tokens_are_judged_by_how_many_there_are(references, monkeypatch):
    monkeypatch.setitem(
        TOLERANCES, "tokens.cap", replace(TOLERANCES["tokens.cap"], limit=1.0)
    )  # noise is large in so small a model
    run, half, on_half = (copy.copy(r) for r in references)
    noise = compare_logits(half.logits, on_half.logits, 2, 0, LENGTH, 64).rows.error.sqrt()
    logits = run.logits(0, LENGTH).clone()
    first, second = logits[0, 16].topk(2).indices
    logits[0, 16, second] = logits[0, 16, first] - 1.1 * TOLERANCES["tokens.noise"].limit * noise[0, 16]
    trace, ids = trace_of(run), run.token_ids.clone()
    ids[0, 17] = second
    run.logits = lambda start, stop: logits[:, start:stop]
    for r in (run, half, on_half, trace):
        r.token_ids = ids
    assert failed(check_tokens(trace, run, half, on_half)) == {"tokens.logit_margin"}
    monkeypatch.setattr(tolerances, "CALIBRATED", 1)
    part = check_tokens(trace, run, half, on_half)
    assert not failed(part) and part.report["near_ties"] == 1
    assert part.report["noise"] == pytest.approx((16 + 4 * math.log(part.report["tokens"])) ** 0.5)


def test_tokens_accepts_a_near_tie_and_goes_on(references):
    """A near-tie made by scaling one pair of logits; a wrong token after it is still seen."""
    run, half, on_half = (copy.copy(r) for r in references)
    noise = compare_logits(half.logits, on_half.logits, 2, 0, LENGTH, 64).rows.error.sqrt()
    exact = run.logits(0, LENGTH)
    first, second = exact[0, 16].topk(2).indices
    step = 0.5 * min(TOLERANCES["tokens.noise"].limit * noise[0, 16], TOLERANCES["tokens.cap"].limit * exact[0, 16].std())

    def check(margin, later_wrong=False):
        logits = exact.clone()
        logits[0, 16, second] = logits[0, 16, first] - margin
        changed, trace = copy.copy(run), trace_of(run)
        changed.logits = lambda start, stop: logits[:, start:stop]
        ids = run.token_ids.clone()
        ids[0, 17] = second
        if later_wrong:
            ids[0, 21] = exact[0, 20].argmin()
        for r in (changed, half, on_half, trace):
            r.token_ids = ids
        return check_tokens(trace, changed, half, on_half)

    part = check(step)
    assert not failed(part)
    assert part.report["near_ties"] == 1 and part.report["near_tie_positions"] == [17]
    assert part.report["argmax"] == part.report["tokens"] - 1
    part = check(step, later_wrong=True)
    assert failed(part) == {"tokens.logit_margin"} and len(part.failures()) == 1 and "position 21" in part.failures()[0]
    assert part.report["near_ties"] == 1
    assert failed(check(20 * step)) == {"tokens.logit_margin"}


def test_choice_gaps_see_both_sides_of_a_swap():
    logits = torch.tensor([5.0, 4.0, 2.0, 1.99, 0.0]).view(1, 1, 5)

    def gap(*ids):
        return float(choice_gaps(torch.tensor([[ids]]), logits))

    assert gap(0, 1, 2) == gap(2, 0, 1) == 0
    assert gap(0, 1, 3) == pytest.approx(0.01)
    assert gap(0, 1, 4) == pytest.approx(2.0)
    assert gap(1, 2, 3) == pytest.approx(3.01)  # the k+1-th is a near-tie, but it displaced the best
    assert gap(0, 1, 2, 3, 4) == 0  # every expert is chosen
    assert math.isnan(float(choice_gaps(torch.tensor([[[0, 1]]]), torch.full((1, 1, 5), math.nan))))


def test_slices_change_nothing(references, monkeypatch):
    _, half, on_half = references

    def rows():
        return compare_logits(half.logits, on_half.logits, 2, 0, LENGTH, 64)

    whole = rows()
    monkeypatch.setattr(metrics, "SLICE_ELEMENTS", 2 * 64 * 5)
    assert metrics.slices(2, 0, LENGTH, 64) == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 24)]
    assert metrics.slices(2, 3, 5, 10**6) == [(3, 4), (4, 5)]
    sliced = rows()
    torch.testing.assert_close(sliced.rows.error, whole.rows.error, rtol=1e-3, atol=0)
    torch.testing.assert_close(sliced.kl, whole.kl, rtol=1e-2, atol=1e-6)


def test_reported_numbers_are_what_they_say():
    reference = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
    value = torch.tensor([[[0.0, 1.0, 4.5, 4.0]]])
    rows = compare_logits(lambda a, b: value, lambda a, b: reference, 1, 0, 1, 4)
    assert float(rows.rows.max_abs) == 2.5 and not bool(rows.same_argmax)
    assert rows.rows.ratio() == pytest.approx(math.sqrt(2.5**2 / 21))
    assert float(rows.margin) == pytest.approx(2 / float(reference.std()))
    p, q = reference.softmax(-1), value.softmax(-1)
    assert float(rows.kl) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_gates_fail_on_nothing_measured():
    (row,) = worst_rows("float32.logits", [(0.0, "a"), (math.nan, "b"), (1e-5, "c")])
    assert row["where"] == "b" and not row["passed"] and row["value"] is None
    assert worst_rows("float32.logits", []) == []
    assert own_limit("timed.choice", 10.0) == 15.0 and own_limit("timed.choice", 1.0) == 4.0
    assert own_limit("timed.choice", math.inf) == own_limit("timed.choice", math.nan) == 4.0
    assert all(tolerance.reason and tolerance.what for tolerance in TOLERANCES.values())
