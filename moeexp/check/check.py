"""Does the fast path compute the same function? Judges a trace of it against the reference.

`check_trace` looks at the trace alone and comes first: only a trace that passes it can be replayed. Then, each against
references from `moeexp.check.reference.run_reference` on the trace's tokens:

    check_float32(trace, run_reference(float32, expert_ids=trace.expert_ids))
    bf16 = run_reference(bfloat16)
    check_timed(trace, <as above>, bf16, run_reference(float32, expert_ids=bf16.expert_ids))
    check_tokens(trace, <as either>)

Expert choices are replayed because one flipped near-tie would drown every other difference; that a choice *is* a
near-tie is a tolerance of its own. Limits: `moeexp.check.tolerances`. Shape letters: B batch, S sequence, L layers, V vocabulary,
E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from moeexp_kernels.parts.deviation import Rows, compare_rows, quotient
from torch import Tensor

from moeexp.check.metrics import LogitRows, choice_gaps, compare_logits, count_not_finite, slices, unravel
from moeexp.check.reference import ReferenceRun
from moeexp.check.tolerances import TOLERANCES, Part, json_number, make_part, measured, own_limit, token_noise, worst_rows
from moeexp.model.qwen3_5_moe import state_shapes

# Dimensions of a state tensor that index its rows: what a fault in a kernel would hit alone.
STATE_ROWS = {"conv_state": (0, 2), "recurrent_state": (0, 1), "k_cache": (0, 1, 2), "v_cache": (0, 1, 2)}
STATE_DIMS = {
    "conv_state": ("batch", "slot"),
    "recurrent_state": ("batch", "head"),
    "k_cache": ("batch", "head", "position"),
    "v_cache": ("batch", "head", "position"),
}


@dataclass
class Trace:
    """What the fast path did on one set of sequences. Position i's logits predict token i + 1."""

    token_ids: Tensor  # [B, S] int64, every token that was fed
    prompt_len: int
    logits: Tensor = field(repr=False)  # [B, S - first, V], any float dtype
    expert_ids: Tensor = field(repr=False)  # [L, B, S, k]
    states: dict[str, Tensor] = field(repr=False)  # after the last fed token; caches may be longer than S
    next_token: Tensor | None = None  # [B]: generated last and not fed; None if nothing was
    first: int = 0  # the position that `logits` begin with, one of the prompt's


def check_trace(trace: Trace, config: Any) -> Part:
    """Is the trace whole: every tensor there, of its shape, finite, and its expert ids a possible choice? `config` is
    transformers' own, as for the reference."""
    batch, length = trace.token_ids.shape
    layers, k = config.num_hidden_layers, config.num_experts_per_tok
    assert 0 <= trace.first < trace.prompt_len, "the prompt's last position predicts the first token"
    wanted = {"logits": (batch, length - trace.first, config.vocab_size), "expert_ids": (layers, batch, length, k)}
    states = state_shapes(config, batch=batch, max_seq_len=length, dtype=trace.logits.dtype)
    wanted |= {name: shape for name, (shape, _) in states.items() if not name.endswith(".expert_ids")}
    found = {"logits": trace.logits, "expert_ids": trace.expert_ids, **_states(trace)}
    tolerances = []
    for name in sorted(wanted.keys() | found.keys()):
        shape = tuple(found[name].shape) if name in found else None
        if name.endswith("_cache") and name in wanted and shape is not None and len(shape) == 4 and shape[2] > length:
            shape = (*shape[:2], length, shape[3])
        if shape != wanted.get(name):
            tolerances.append(measured("trace.complete", 1, f"{name}: shape {shape}, wanted {wanted.get(name)}"))
    if tolerances:
        return make_part("trace", tolerances, {})
    tolerances = [measured("trace.complete", 0, "all tensors")]
    tolerances += _finite(trace, {})
    bad = []
    for layer, ids in enumerate(trace.expert_ids.long()):  # [B, S, k]
        ordered = ids.sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        wrong = repeated | (ids < 0).any(-1) | (ids >= config.num_experts).any(-1)
        bad.append((int(wrong.sum()), f"layer {layer}{_first(wrong)}"))
    tolerances += worst_rows("trace.experts", bad)
    return make_part(
        "trace", tolerances, {"positions": batch * length, "with_logits": batch * (length - trace.first), "layers": layers}
    )


def check_float32(trace: Trace, reference: ReferenceRun) -> Part:
    """Part (a): the same ops in float32 against the reference that replayed the trace's expert choices."""
    _assert_same_run(trace, reference)
    logits = _compare(trace, reference, trace.first)
    tolerances = _finite(trace, {"reference": reference})
    tolerances.append(measured("float32.logits", logits.rows.ratio(), _which(trace)))
    tolerances.append(_worst_row("float32.position", logits.rows, ("batch", "position"), trace.first))
    steps = [
        (_step_ratio(logits.rows, position - trace.first), f"decode step {position - trace.prompt_len}, position {position}")
        for position in range(trace.prompt_len, trace.token_ids.shape[1])
    ]
    tolerances += worst_rows("float32.decode_step", steps)

    states, rows = [], []
    for name, expected in reference.states.items():
        kind = name.rsplit(".", 1)[1]
        state = _used(name, trace.states[name], reference.token_ids.shape[1])
        compared = compare_rows(state, expected, STATE_ROWS[kind])
        states.append((compared.ratio(), name))
        row = _worst_row("float32.state_row", compared, STATE_DIMS[kind])
        rows.append((math.inf if row["value"] is None else row["value"], f"{name}, {row['where']}"))
    tolerances += worst_rows("float32.state", states) + worst_rows("float32.state_row", rows)

    spread = [layer.double().std(-1).square().mean().sqrt() for layer in reference.router_logits]
    gaps, differing = _choices(trace, reference, spread)
    report = _report(logits) | differing
    report["states"] = _worst_by_kind(states)
    return make_part("float32", tolerances + worst_rows("float32.choice", gaps), report)


def check_timed(
    trace: Trace,
    reference: ReferenceRun,
    bf16_run: ReferenceRun,
    reference_on_bf16_choices: ReferenceRun,
) -> Part:
    """Part (b): the timed dtype deviates from its reference no more than transformers in bfloat16 from its own.

    `reference` replayed the trace's expert choices, `reference_on_bf16_choices` those of `bf16_run`.
    """
    _assert_same_run(trace, reference)
    _assert_pair(bf16_run, reference_on_bf16_choices, trace)
    ours, theirs = _compare(trace, reference, trace.first), _compare(bf16_run, reference_on_bf16_choices, trace.first)
    tolerances = _finite(trace, {"reference": reference, "bf16 run": bf16_run, "its reference": reference_on_bf16_choices})
    tolerances.append(measured("timed.logits", quotient(ours.rows.ratio(), theirs.rows.ratio()), _which(trace)))
    worst = _worst_row("timed.position", ours.rows, ("batch", "position"), trace.first)
    worst_theirs = float(theirs.rows.row_ratios().max())
    worst_ours = math.inf if worst["value"] is None else worst["value"]
    tolerances.append(measured("timed.position", quotient(worst_ours, worst_theirs), worst["where"]))
    pairs = zip(bf16_run.router_logits, reference_on_bf16_choices.router_logits, strict=True)
    noise = [_noise(*pair) for pair in pairs]
    gaps, differing = _choices(trace, reference, noise)
    own_gaps, own_differing = _choices(bf16_run, reference_on_bf16_choices, noise)
    tolerances += worst_rows("timed.choice", gaps, own_limit("timed.choice", max(gap for gap, _ in own_gaps)))
    report = _report(ours) | differing
    report["transformers_bf16"] = _report(theirs) | own_differing
    states = []
    for name, expected in reference.states.items():
        state = _used(name, trace.states[name], reference.token_ids.shape[1])
        states.append((compare_rows(state, expected, STATE_ROWS[name.rsplit(".", 1)[1]]).ratio(), name))
    report["states"] = _worst_by_kind(states)
    return make_part("timed", tolerances, report)


def _chosen_by_logits(trace: Trace, start: int, gumbel: Callable[[Tensor, int], Tensor] | None) -> Tensor:
    """[B, n]: what the logits of the positions from `start` on would choose, with the noise that `gumbel` adds."""
    batch, _, vocab = trace.logits.shape
    chosen = []
    for first, last in slices(batch, start, trace.token_ids.shape[1], vocab):
        logits = trace.logits[:, first - trace.first : last - trace.first]
        chosen.append((logits if gumbel is None else gumbel(logits.float(), first)).argmax(-1).to(trace.token_ids.device))
    return torch.cat(chosen, 1)


def check_tokens(
    trace: Trace,
    reference: ReferenceRun,
    bf16_run: ReferenceRun | None = None,
    reference_on_bf16_choices: ReferenceRun | None = None,
    *,
    gumbel: Callable[[Tensor, int], Tensor] | None = None,
    by_logits: bool = False,
) -> Part:
    """Every generated token must be the reference's argmax or a near-tie with it.

    Of tokens that were drawn it is the Gumbel-argmax check: `gumbel(logits [B, n, V], position of the first)` adds the noise
    that each was drawn with, and the token must be the argmax of the reference's logits with that noise.

    by_logits: not the tokens that were fed are judged, which others chose, but those that the trace's own logits would choose.

    A near-tie is as far as the noise of so many tokens reaches at that position, but capped. Without the bf16 pair, for a
    float32 trace, noise is what the float32 logits tolerance would let pass. A near-tie ends nothing: each later token is judged
    too.
    """
    _assert_same_run(trace, reference)
    batch, length = trace.token_ids.shape
    start = trace.prompt_len - 1  # the last prompt position predicts the first generated token
    targets = _chosen_by_logits(trace, start, gumbel) if by_logits else trace.token_ids[:, trace.prompt_len :]
    if trace.next_token is not None and not by_logits:
        targets = torch.cat([targets, trace.next_token.to(targets).view(batch, 1)], dim=1)
    stop = start + targets.shape[1]
    assert start < stop, "the trace generated no token"
    vocab = reference.config.vocab_size
    noise, cap = None, TOLERANCES["tokens.cap"].limit
    if bf16_run is not None:
        assert reference_on_bf16_choices is not None, "a bf16 run needs the reference on its choices"
        _assert_pair(bf16_run, reference_on_bf16_choices, trace)
        own = _compare(bf16_run, reference_on_bf16_choices, trace.first)
        noise = own.rows.error.sqrt()[:, start - trace.first :]
        cap = own_limit("tokens.cap", float(own.margin.max()))

    margins, allowed, most = [], [], token_noise(batch * (stop - start))
    for first, last in slices(batch, start, stop, vocab):
        logits = reference.logits(first, last)
        here = slice(first - start, last - start)
        token = targets[:, here].to(logits.device)
        judged = logits if gumbel is None else gumbel(logits, first)
        margins.append((judged.amax(-1) - judged.gather(-1, token[..., None])[..., 0]).double())
        rms = torch.linalg.vector_norm(logits, dim=-1, dtype=torch.float64) / math.sqrt(vocab)
        error = TOLERANCES["float32.logits"].limit * rms if noise is None else noise[:, here]
        allowed.append(torch.minimum(most * error, cap * logits.std(-1)))
    margin, limit = torch.cat(margins, 1), torch.cat(allowed, 1)
    relative = torch.where(margin == 0, 0.0, margin / limit).nan_to_num(nan=math.inf, posinf=math.inf)

    values = [
        (float(relative[b, i]), f"batch {b}, position {trace.prompt_len + i}: token {int(targets[b, i])}")
        for b in range(batch)
        for i in range(stop - start)
    ]
    near = (margin > 0) & (relative <= TOLERANCES["tokens.logit_margin"].limit)
    report = {
        "tokens": batch * (stop - start),
        "argmax": int((margin == 0).sum()),
        "near_ties": int(near.sum()),
        "near_tie_positions": [trace.prompt_len + int(i) for _, i in near.nonzero()[:32]],
        "largest_logit_margin": json_number(float(margin.max())),
        "cap": json_number(cap),
        "noise": json_number(most),
    }
    return make_part("tokens", worst_rows("tokens.logit_margin", values), report)


def _states(trace: Trace) -> dict[str, Tensor]:
    """The trace's state tensors; the expert ids that the model keeps beside them are compared on their own."""
    return {name: tensor for name, tensor in trace.states.items() if not name.endswith(".expert_ids")}


def _used(name: str, state: Tensor, length: int) -> Tensor:
    return state[:, :, :length] if name.endswith("_cache") else state


def _slicer(run: Trace | ReferenceRun):
    if isinstance(run, ReferenceRun):
        return run.logits
    return lambda start, stop: run.logits[:, start - run.first : stop - run.first]


def _compare(run: Trace | ReferenceRun, reference: ReferenceRun, first: int) -> LogitRows:
    """Of the positions from `first` on."""
    batch, length = reference.token_ids.shape
    return compare_logits(_slicer(run), reference.logits, batch, first, length, reference.config.vocab_size)


def _which(trace: Trace) -> str:
    return f"logits from position {trace.first} on" if trace.first else "all logits"


def _noise(logits: Tensor, reference: Tensor) -> Tensor:
    """[B, S, E] twice -> [B, S]: rms error of each position, or of the whole layer where that is larger."""
    square = (logits - reference).double().square()
    return torch.maximum(square.mean(-1), square.mean()).sqrt()


def _choices(
    run: Trace | ReferenceRun, reference: ReferenceRun, units: list[Tensor]
) -> tuple[list[tuple[float, str]], dict[str, Any]]:
    """Per layer the worst choice that differs from the reference's own top-k: (its gap in `units`, where)."""
    values, differing = [], 0
    for layer, logits in enumerate(reference.router_logits):
        gaps = choice_gaps(run.expert_ids[layer], logits).double()  # [B, S]
        differing += int((gaps > 0).sum())
        relative = torch.where(gaps == 0, 0.0, gaps / units[layer]).nan_to_num(nan=math.inf, posinf=math.inf)
        index = int(relative.argmax())
        where = f"layer {layer}, {_where(('batch', 'position'), index, relative.shape)}"
        values.append((float(relative.flatten()[index]), where))
    report = {
        "positions_with_another_choice": differing,
        "positions_with_choices": reference.router_logits[..., 0].numel(),
        "worst_choice_gap": json_number(max(value for value, _ in values)),
    }
    return values, report


def _finite(trace: Trace, runs: dict[str, ReferenceRun]) -> list[dict]:
    """Trace and references must be finite: with a NaN on either side nothing has been compared."""
    length = trace.token_ids.shape[1]
    batch, vocab = trace.token_ids.shape[0], trace.logits.shape[-1]
    # On the device of the run: logits of a long prompt, which lie in host memory, are billions.
    ranges = slices(batch, 0, trace.logits.shape[1], vocab)
    parts = (trace.logits[:, a:b].to(trace.token_ids.device) for a, b in ranges)
    counts = [(sum(map(count_not_finite, parts)), "logits")]
    counts += [(count_not_finite(_used(name, state, length)), name) for name, state in _states(trace).items()]
    for label, run in runs.items():
        counts.append((count_not_finite(run.hidden), f"{label}, hidden state after the last layer"))
        counts.append((count_not_finite(run.router_logits), f"{label}, router logits"))
        counts += [(count_not_finite(state), f"{label}, {name}") for name, state in run.states.items()]
    return worst_rows("trace.finite", counts)


def _assert_same_run(trace: Trace, reference: ReferenceRun) -> None:
    assert torch.equal(trace.token_ids.cpu(), reference.token_ids.cpu()), "the reference ran other tokens"
    assert trace.prompt_len == reference.prompt_len, "the reference ran another prompt length"
    assert torch.equal(trace.expert_ids.long().cpu(), reference.expert_ids.cpu()), "the reference used other experts"
    assert reference.dtype == torch.float32, "the reference is float32"
    assert _states(trace).keys() == reference.states.keys(), "run check_trace first"


def _assert_pair(bf16_run: ReferenceRun, reference: ReferenceRun, trace: Trace) -> None:
    for run in (bf16_run, reference):
        assert torch.equal(trace.token_ids.cpu(), run.token_ids.cpu()), "a reference ran other tokens"
        assert trace.prompt_len == run.prompt_len, "a reference ran another prompt length"
    assert torch.equal(bf16_run.expert_ids.cpu(), reference.expert_ids.cpu()), "the pair used different experts"
    assert reference.dtype == torch.float32 and bf16_run.dtype != torch.float32


def _report(logits: LogitRows) -> dict[str, Any]:
    """Numbers beside the tolerances: worth reading, never a reason to fail."""
    return {
        "rmse_ratio": json_number(logits.rows.ratio()),
        "worst_position": json_number(float(logits.rows.row_ratios().max())),
        "max_abs": json_number(float(logits.rows.max_abs.max())),
        "kl_mean": json_number(float(logits.kl.mean())),
        "kl_max": json_number(float(logits.kl.max())),
        "top1_agreement": float(logits.same_argmax.double().mean()),
    }


def _worst_by_kind(states: list[tuple[float, str]]) -> dict[str, float | None]:
    by_kind: dict[str, float] = {}
    for ratio, name in states:
        kind = name.rsplit(".", 1)[1]
        by_kind[kind] = max(by_kind.get(kind, 0.0), ratio)
    return {kind: json_number(ratio) for kind, ratio in by_kind.items()}


def _step_ratio(rows: Rows, position: int) -> float:
    return quotient(rows.error[:, position].mean().sqrt(), rows.reference[:, position].mean().sqrt())


def _worst_row(name: str, rows: Rows, dims: tuple[str, ...], start: int = 0) -> dict[str, Any]:
    """start: what the last of `dims` counts from."""
    ratios = rows.row_ratios()
    index = int(ratios.argmax())
    over = int((ratios > TOLERANCES[name].limit).sum())
    where = _where(dims, index, ratios.shape, start) + (f" ({over} rows of {ratios.numel()} are over)" if over > 1 else "")
    return measured(name, float(ratios.flatten()[index]), where)


def _where(dims: tuple[str, ...], index: int, shape: Iterable[int], start: int = 0) -> str:
    *found, last = unravel(index, tuple(shape))
    return ", ".join(f"{dim} {i}" for dim, i in zip(dims, [*found, last + start], strict=True))


def _first(flags: Tensor) -> str:
    """', batch b, position p' of the first flag that is set."""
    return ", " + _where(("batch", "position"), int(flags.int().argmax()), flags.shape) if bool(flags.any()) else ""
