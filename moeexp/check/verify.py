"""Runs the correctness check of one stack: makes traces of the fast path, runs the references, collects the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels.ops.sample import reference_scores, reference_support
from torch import Tensor

from moeexp.check.check import Trace, check_float32, check_timed, check_tokens, check_trace
from moeexp.check.reference import ReferenceRun, generate_reference, run_reference
from moeexp.check.tolerances import Part, make_part, measured
from moeexp.check.traces import check_replay, record_trace
from moeexp.check.weight_agreement import check_weights
from moeexp.config.schema import Config
from moeexp.config.sources import weights_folder
from moeexp.model.config_agreement import text_config
from moeexp.model.dequantise import DequantisedWeights, as_dtype
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.record import free_memory
from moeexp.record.phases import Phases
from moeexp.stack.factory import Stack, build_stack

# transformers.generate is compared with only where a float32 copy of the model is small (4 GiB).
GENERATE_ELEMENTS = 1 << 30


# Host memory for the references of a group. One of 35B on 4,096 tokens takes 0.45 GiB: states and router logits.
KEPT_BYTES = 4 << 30


class References:
    """References over one model, kept for the runs of a group: the same tokens and expert choices give the same reference,
    and with the same ops, dispatch and state the same float32 part. Between two checks they lie in host memory, and no more
    than `KEPT_BYTES` of them: those that were used last. The others are made again where they are wanted. One that is larger by
    itself is not kept at all: of a long prompt four of them fill a GPU."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}  # in the order of their last use
        self.reused: list[str] = []
        self._first: dict[Hashable, tuple[str, Trace]] = {}  # by prompt and sampler: the first run's name and trace

    def first_divergence(self, name: str, trace: Trace, alike: Hashable) -> dict[str, Any] | None:
        """Where and why the tokens of this run diverge from those of the first one with `alike`; None where they do not."""
        other, first = self._first.setdefault(alike, (name, _choices_of(trace)))
        return None if other == name else first_divergence(other, first, trace)

    def get(self, name: str, key: tuple[Hashable, ...], make: Callable[[], Any]) -> Any:
        entry = (name, *key)
        if entry in self._known:
            self.reused.append(name)
            found = self._known.pop(entry)
        else:
            found = make()
        if not isinstance(found, ReferenceRun) or found.nbytes() <= KEPT_BYTES:
            self._known[entry] = found
        return found

    def put_away(self) -> None:
        """After each check: off the device, and the least recently used ones away for good where it is too much."""
        kept, size = [], 0
        for entry, found in reversed(self._known.items()):
            if isinstance(found, ReferenceRun):
                size += found.nbytes()
                if size > KEPT_BYTES:
                    break
                found = found.to("cpu")
            kept.append((entry, found))
        self._known = dict(reversed(kept))


def _choices_of(trace: Trace) -> Trace:
    """What of a trace tells where another diverges from it, in host memory."""
    last = None if trace.next_token is None else trace.next_token.cpu()
    return replace(
        trace, token_ids=trace.token_ids.cpu(), expert_ids=trace.expert_ids.cpu(), next_token=last,
        logits=torch.empty(0), states={},
    )  # fmt: skip


def verify(
    cfg: Config, stack: Stack, prompt: Tensor, phases: Phases, references: References | None = None, name: str = ""
) -> dict[str, Any]:
    """prompt [B, T] int64. The record's `check`: {passed, parts, generated_ids, …}; `references` where other runs over the
    same weights are checked too: `reused` says what was taken from those, `first_divergence` where this run, of this
    name, chose other tokens than the first of them. Restores nothing: reset follows."""
    references = references or References()
    references.reused = []
    with phases("check: trace"):
        trace = record_trace(stack, prompt.to(stack.device), cfg.new_tokens, prompt_logits=cfg.check_logits)
    config = text_config(cfg.model)
    parts = [check_trace(trace, config)]
    if snapshot_of(cfg) is not None:
        parts.append(references.get("weights", (), lambda: check_snapshot(cfg, stack.model, phases)))
    if cfg.cuda_graph:
        with phases("check: replay"):
            parts.append(check_replay(stack, trace))
    if parts[0].passed:
        parts += _against_reference(cfg, stack, config, trace, phases, references)
    if parts[0].passed and cfg.verify_tokens:
        parts += _of_steps_together(cfg, stack, config, trace, phases, references)
    failures = [f"{part.name}: {line}" for part in parts for line in part.failures()]
    return {
        "passed": all(part.passed for part in parts),
        "parts": [part.to_json() for part in parts],
        "failures": failures[:50],
        "tokens": int(trace.token_ids.shape[1]),
        "reused": references.reused,
        "first_divergence": (
            references.first_divergence(name, trace, (digest(prompt), str(cfg.sampler))) if parts[0].passed else None
        ),
        "generated_ids": generated_ids(trace),
    }


def _of_steps_together(
    cfg: Config, stack: Stack, config: Any, trace: Trace, phases: Phases, references: References
) -> list[Part]:
    """The same tokens, `verify_tokens` a step: judged as those of decode steps are. Their logits differ by rounding where rows
    of a step meet other kernels than one row does, and with them the experts that are chosen. So each is held against its own
    reference, and what is judged as chosen is what these logits choose."""
    fed, count = trace.token_ids, trace.prompt_len
    with phases("check: verify trace"):
        together = record_trace(
            stack, fed[:, :count].contiguous(), fed.shape[1] - count + 1, forced=fed[:, count:], together=cfg.verify_tokens,
            prompt_logits=cfg.check_logits,
        )  # fmt: skip
    parts = [check_trace(together, config)]
    if parts[0].passed:
        parts += _against_reference(cfg, stack, config, together, phases, references, together=cfg.verify_tokens)
    return [replace(part, name=f"verify {part.name}") for part in parts]


def first_divergence(name: str, first: Trace, trace: Trace) -> dict[str, Any] | None:
    """{from, position, other_choice_from}: the first position whose token differs from that of run `name`, and the first
    before it where experts were chosen otherwise, if any. Where none was, both runs have the same reference, and one of the
    two tokens is a near-tie of it; where one was, that choice is within the limit that each run's check shows."""
    ours, theirs = generated_ids(trace), generated_ids(first)
    found = [
        (trace.prompt_len + i, b)
        for b, (own, other) in enumerate(zip(ours, theirs, strict=True))
        for i, (token, known) in enumerate(zip(own, other, strict=False))
        if token != known
    ]
    if not found:
        return None
    position, sequence = min(found)
    chosen, known = (t.expert_ids[:, sequence, :position].sort(-1).values.cpu() for t in (trace, first))
    differing = (chosen != known).any(-1).any(0).nonzero()
    other = int(differing[0]) if len(differing) else None
    return {"from": name, "sequence": sequence, "position": position, "other_choice_from": other}


def generated_ids(trace: Trace) -> list[list[int]]:
    assert trace.next_token is not None
    new = torch.cat([trace.token_ids[:, trace.prompt_len :], trace.next_token[:, None]], dim=1)
    return new.tolist()


def snapshot_of(cfg: Config) -> Path | None:
    """What the weights are compared with. Those from a seed have no names but ours, and an artifact no snapshot beside it."""
    return weights_folder(cfg.model) if cfg.artifact is None else None


def check_snapshot(cfg: Config, model: Qwen35MoE, phases: Phases) -> Part:
    """The weights of `model` by transformers' rules."""
    folder, layers = snapshot_of(cfg), model.arch.num_hidden_layers
    assert folder is not None
    with phases("check: weights"), phases.progress("check: weights", total=layers + 1) as advance:
        return check_weights(model, folder, text_config(cfg.model), lambda: advance(1))


def _against_reference(
    cfg: Config, stack: Stack, config: Any, trace: Trace, phases: Phases, references: References, *, together: int = 1
) -> list[Part]:
    """together: as of `record_trace`, by which the trace was made."""
    weights = DequantisedWeights(stack.model)
    tokens = (digest(trace.token_ids), trace.prompt_len)

    def run(name: str, dtype: torch.dtype, expert_ids: Tensor | None) -> ReferenceRun:
        def make() -> ReferenceRun:
            layers = config.num_hidden_layers
            with phases(f"check: {name}"), phases.progress(name, total=layers) as advance:
                return run_reference(
                    config, weights, trace.token_ids, trace.prompt_len, dtype=dtype, device=stack.device,
                    expert_ids=expert_ids, on_layer=lambda index, total: advance(1),
                )  # fmt: skip

        key = (*tokens, None if expert_ids is None else digest(expert_ids))
        return references.get(name, key, make).to(stack.device)

    reference = run("reference", torch.float32, trace.expert_ids)
    gumbel = gumbel_scores(cfg, trace) if cfg.sampler.name == "gumbel" else None
    if cfg.dtype == "float32":
        # The timed methods are the float32 methods: part (a) judges them directly, with the stricter limits.
        parts = [check_float32(trace, reference), check_tokens(trace, reference, gumbel=gumbel, by_logits=together > 1)]
        return parts if together > 1 else parts + _against_generate(cfg, stack, trace, phases)
    reference = _aside(reference)
    # Its eager methods know no graph and no compiler.
    alike = (*tokens, cfg.dispatch, cfg.state, cfg.max_seq_len, cfg.check_logits, together, tuple(sorted(stack.ops.items())))
    parts = [references.get("float32", alike, lambda: _float32_twin(cfg, stack, config, trace, run, phases, together))]
    bf16 = _aside(run("bf16 baseline", torch.bfloat16, None))
    reference_on_bf16 = run("bf16 reference", torch.float32, bf16.expert_ids)
    with phases("check: compare"):
        reference, bf16 = reference.to(stack.device), bf16.to(stack.device)
        parts.append(check_timed(trace, reference, bf16, reference_on_bf16))
        parts.append(check_tokens(trace, reference, bf16, reference_on_bf16, gumbel=gumbel, by_logits=together > 1))
    return parts


def _aside(found: ReferenceRun) -> ReferenceRun:
    """Off the device until it is compared, where it is as large as those of a long prompt and the host has room for two: three
    of 262,144 tokens are half of a GPU of 140 GB, and the next one needs the room."""
    size = found.nbytes()
    return found.to("cpu") if KEPT_BYTES < size <= free_memory.of_host() // 2 else found


def digest(tensor: Tensor) -> str:
    """Of its values, shape and dtype: two rows of two tokens are not one of four."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(kind + tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


def gumbel_scores(cfg: Config, trace: Trace) -> Callable[[Tensor, int], Tensor]:
    """The scores of which a drawn token is the argmax, for `check_tokens`: (logits [B, n, V],
    position of the first) -> logits plus temperature times the noise of each position's draw, -inf where the trace's filter was.

    Draws are numbered from 0, which is that of the prompt's last position; filters are those of the trace's own logits,
    because near an edge of theirs the reference's may fall the other way."""
    sampler = cfg.sampler

    def scores(logits: Tensor, first: int) -> Tensor:
        result = torch.empty_like(logits)
        for i in range(logits.shape[1]):
            draw = first + i - (trace.prompt_len - 1)
            seed_state = torch.tensor([sampler.seed, draw], dtype=torch.int64, device=logits.device)
            score = reference_scores(logits=logits[:, i : i + 1], seed_state=seed_state, temperature=sampler.temperature)
            keep = reference_support(
                logits=trace.logits[:, [first + i - trace.first]].to(logits.device), temperature=sampler.temperature,
                top_k=sampler.top_k or 0, top_p=1.0 if sampler.top_p is None else sampler.top_p,
            )  # fmt: skip
            result[:, i] = (score * sampler.temperature).masked_fill(~keep, float("-inf"))
        return result

    return scores


def _float32_twin(
    cfg: Config, stack: Stack, config: Any, trace: Trace, run: Callable[[str, torch.dtype, Tensor], ReferenceRun],
    phases: Phases, together: int,
) -> Part:  # fmt: skip
    """Part (a) for a run in another dtype: the same ops, weights and tokens with float32 activations."""
    with phases("check: float32"):
        twin_cfg = replace(cfg, dtype="float32")
        twin = build_stack(twin_cfg, as_dtype(stack.model, torch.float32), phases, export="eager", cuda_graph=False)
        try:
            fed = trace.token_ids
            twin_trace = record_trace(
                twin, fed[:, : trace.prompt_len].contiguous(), fed.shape[1] - trace.prompt_len + 1,
                forced=fed[:, trace.prompt_len :], together=together, prompt_logits=cfg.check_logits,
            )  # fmt: skip
        finally:
            twin.close()
    whole = check_trace(twin_trace, config)
    if not whole.passed:
        return replace(whole, name="float32")
    # Its expert choices may differ from the trace's at near-ties, and its reference with them.
    return check_float32(twin_trace, run("reference", torch.float32, twin_trace.expert_ids))


def _against_generate(cfg: Config, stack: Stack, trace: Trace, phases: Phases) -> list[Part]:
    """Unquantised weights of a snapshot: transformers loads it itself and generates greedily, token for token the same."""
    folder = snapshot_of(cfg)
    size = sum(buffer.numel() for buffer in stack.model.buffers())
    if folder is None or cfg.quant.bits != 16 or cfg.sampler.name != "greedy" or size > GENERATE_ELEMENTS:
        return []
    with phases("check: generate"):
        prompt, config = trace.token_ids[:, : trace.prompt_len].cpu(), text_config(cfg.model)
        expected = generate_reference(folder, prompt, cfg.new_tokens, config=config).tolist()
    rows = []
    for row, (ours, theirs) in enumerate(zip(generated_ids(trace), expected, strict=True)):
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        where = f"row {row}" + (f", first at new token {differing[0]}" if differing else "")
        rows.append(measured("generate.tokens", len(differing), where))
    return [make_part("transformers.generate", rows, {"tokens": cfg.new_tokens})]
