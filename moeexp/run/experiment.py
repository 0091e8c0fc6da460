"""One run: weights, methods, check, benchmark, quality, all into the record."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels import traffic, user_ops
from moeexp_kernels.parts import tuning
from moeexp_runner import timing
from moeexp_runner.profiler import STEPS, kernels_per_token, token_split, write_trace
from moeexp_runner.session import Session
from torch import Tensor

from moeexp import STARTED
from moeexp.check.bits_per_byte import record_quality
from moeexp.check.verify import References, verify
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.config.schema import Config, QuantConfig
from moeexp.config.sources import load_architecture
from moeexp.config.validate import beyond_graphs
from moeexp.model.inputs import check_heldout
from moeexp.model.prompt import prompt_tokens, text_of
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.record.gpus import others_on
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.record.telemetry import Telemetry, watch
from moeexp.run.benchmark import Benchmark
from moeexp.run.budget import step_budget
from moeexp.run.cache_size import cache_bytes
from moeexp.run.identity import confirm
from moeexp.run.memory import memory
from moeexp.run.op_kernels import place
from moeexp.run.roofline import bandwidth_share, bytes_per_step, step_calls
from moeexp.run.transformers_baseline import run_transformers
from moeexp.stack.compilers import Compilers
from moeexp.stack.factory import Stack, build_model, build_stack, check_coverage, python_callbacks
from moeexp.stack.packages import by_none


def run_experiment(cfg: Config, *, run_dir: Path, record: Record, phases: Phases) -> None:
    """`cfg` is validated and resolved. Fills the record; a failed check is a result, not an exception."""
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if cfg.engine == "transformers":
        run_transformers(cfg, run_dir=run_dir, record=record, phases=phases)
        return
    run = Experiment(cfg, run_dir, record, phases)
    with Compilers([cfg]) as compilers:
        with phases("weights"):
            model = build_model(cfg, phases)
        confirm(cfg, record.data["identity"])
        run.build(model, compilers.join)
    try:
        if cfg.check == "inline":
            run.check()
        with phases("benchmark"):
            run.benchmark.warm_up()
            run.look_for_others()
            with watch(cfg.device) as telemetry:
                while not run.benchmark.enough():
                    run.benchmark.round()
        run.after_timing()
        with phases("bandwidth"):
            run.publish(telemetry, timing.read_bandwidth(run.stack.device))
        if cfg.check == "separate":
            run.check()
        run.finish()
    finally:
        run.close()


class Experiment:
    """One config over a model that is there: what happens to it step by step, each step into its record. Several can
    be under way over one model, in turns."""

    def __init__(self, cfg: Config, run_dir: Path, record: Record, phases: Phases):
        self.cfg, self.run_dir, self.record, self.phases = cfg, run_dir, record, phases
        self.arch = load_architecture(cfg.model)
        self.text = text_of(cfg)
        self.prompt = prompt_tokens(cfg, self.arch, self.text)
        check_heldout(cfg, self.arch, self.text)
        self.eos = set(self.arch.eos_token_ids) if cfg.eos else None

    def build(self, model: Qwen35MoE, made_ahead: Callable[[str], bool] = by_none) -> None:
        cfg, decode = self.cfg, self.text.decode
        share = check_coverage(model, bits=cfg.quant.bits, default_skip=_default_skip(cfg.quant))
        self.stack = build_stack(cfg, model, self.phases, made_ahead=made_ahead)
        self.on_device = self.prompt.to(self.stack.device)
        self.benchmark = Benchmark(cfg, self.stack.session, self.on_device, self.eos, self.record)
        shown = [decode(row) for row in self.prompt.tolist()] if decode and cfg.prompt is not None else None
        self.record.set(quantised_coverage=round(share, 6), ops=_ops(self.stack, cfg.dispatch), prompt_text=shown)
        self.stack.session.generate(self.on_device, 1)
        self.record.set(first_token_s=round(time.monotonic() - STARTED, 3))  # imports, weights and compiling included
        length = self.prompt.shape[1]
        if beyond_graphs(cfg, length):  # of text, whose tokens validation does not know
            self.record.add_not_applicable("prefill_graph_lengths")
            self.record.note(f"prefill ran without a CUDA graph: the prompt has {length} tokens, more than each captured length")
        if cfg.pdl and pdl_edges(self.stack.session) == 0:  # ops that cannot
            self.record.add_not_applicable("pdl")

    def check(self, references: References | None = None) -> None:
        """`references`: of the group, whose runs share weights."""
        name = self.record.data["id"]
        verdict = verify(self.cfg, self.stack, self.prompt, self.phases, references, name)
        self.record.set(check=verdict)
        if verdict["first_divergence"]:
            self.record.note(_divergence(verdict["first_divergence"]))

    def look_for_others(self) -> None:
        """Another process on the GPU is said, in the record and to the user: it may take part of what is measured."""
        if self.cfg.device != "cuda":
            return
        uuid = "GPU-" + str(torch.cuda.get_device_properties(self.stack.device).uuid)
        others = others_on(uuid, own=1)
        self.record.add("environment", gpu_other_processes=others)
        if others:
            self.record.note(f"the GPU was busy: {others} other process(es) had a context on it when timing began")
            print(f"warning: {others} other process(es) on the GPU; speeds may suffer", file=sys.stderr)

    def after_timing(self) -> None:
        """What must follow the timing of all runs of a process at once: before anything that only the report needs allocates
        more, runs another prompt, or profiles, which slows down the host from then on."""
        self.record.set(memory_gib=memory(self.stack))
        self.chosen = chosen_experts(self.stack, self.prompt.shape[1], self.benchmark.ids)
        with self.phases("energy", quiet=self.cfg.device != "cuda"):
            self.record.set(**self.benchmark.energy())

    def publish(self, telemetry: Telemetry, bandwidth: float) -> None:
        """Speeds, and what they are held against. `bandwidth`: bytes per second of large reads, measured here and now."""
        cfg, stack = self.cfg, self.stack
        floor = self.floor(bandwidth)
        values, steps = self.benchmark.values(), min(cfg.new_tokens - 1, STEPS)
        step_s = self.benchmark.step_s()
        calls = step_calls(stack.model, **self.step()) if cfg.profile == "budget" else []
        placed = partial(place, ops=[traffic.base(call.op) for call in calls]) if calls else None
        split = token_split(stack.session, self.on_device, steps, step_us=1e6 * step_s, place=placed) if step_s else None
        if split and calls:
            self.record.set(step_budget=step_budget(calls, split.pop("by_op"), self.arch.layer_types))
        self.record.set(
            **values,
            telemetry=telemetry.summary(),
            bytes_per_token=floor,
            bandwidth_share=bandwidth_share(floor, step_s=step_s) if step_s else None,
            kernels_per_token=kernels_per_token(split),
            time_split=split,
        )

    def floor(self, bandwidth: float) -> dict[str, Any]:
        """The record's `bytes_per_token`."""
        device = self.stack.device
        return bytes_per_step(self.stack.model, **self.step()) | {
            "cache_bytes": cache_bytes(device),
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        }

    def step(self) -> dict[str, Any]:
        """The decode step that stands for all: in the middle of a generation, with the experts that the last timed one chose."""
        return {"batch": self.cfg.batch, "length": self.prompt.shape[1] + self.cfg.new_tokens // 2, "ids": self.chosen}

    def finish(self) -> None:
        """After check and timing: their ids, the text, its quality, a trace where one is wanted."""
        cfg, record, decode = self.cfg, self.record, self.text.decode
        ids = self.benchmark.ids
        _compare_ids(record, ids, self.eos)
        record.set(generated_ids=ids, generated_text=[decode(row) for row in ids] if decode else None)
        record_quality(cfg, self.stack.session, self.text, record, self.phases)
        if cfg.profile == "trace":
            with self.phases("trace"):
                path = self.run_dir / "trace.json"
                record.set(trace=write_trace(self.stack.session, self.on_device, path, new_tokens=cfg.new_tokens))

    def close(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()


def _divergence(found: dict[str, Any]) -> str:
    """What `verify.first_divergence` found, in words."""
    chosen = found["other_choice_from"]
    why = "a near-tie" if chosen is None else f"from position {chosen} on other experts are chosen, within the limit"
    where = f"position {found['position']} of sequence {found['sequence']}"
    return f"tokens diverge from those of {found['from']} at {where}: {why}"


def _compare_ids(record: Record, ids: list[list[int]], eos: set[int] | None) -> None:
    """What was timed must be what was checked: the same tokens, of which the check ends no row."""
    if record.data["check"] is None:
        return
    check = dict(record.data["check"])
    checked = check.pop("generated_ids")
    if [timing.cut(row, eos) for row in checked] != ids:
        said = "benchmark: the timed generation chose other tokens than the checked one"
        check |= {"passed": False, "failures": [*check["failures"], said]}
    record.set(check=check)


def _ops(stack: Stack, dispatch: str) -> dict[str, Any]:
    """Each op's implementation, those that call back into Python when a method runs, and whose launch parameters it has."""
    return {
        "implementations": stack.ops,
        "user": {
            op: {"files": [path.name for path in user_ops.sources(name)], "sha256": user_ops.digest(name)}
            for op, name in stack.ops.items()
            if user_ops.is_user_op(name)
        },
        "python_callbacks": python_callbacks(stack, dispatch),
        "launch_parameters": tuning.sources(tuning.architecture(stack.device)),
        "pdl_edges": pdl_edges(stack.session),
        "compiled": {
            name: {"key": artifact.key, "cached": artifact.cached, "compile_s": round(artifact.compile_s, 2)}
            for name, artifact in stack.artifacts.items()
        },
    }


def pdl_edges(session: Session) -> int | None:
    """Programmatic edges (PDL) of the captured decode step; None without a captured step."""
    step = session.graph if session.loop is None else session.loop.graph
    return None if step is None else step.pdl_edges


def chosen_experts(stack: Stack, prompt_len: int, ids: list[list[int]]) -> Tensor:
    """[L, B, N, k]: the experts of the N decode steps behind `ids`, the new tokens of the generation that the session ran
    last: as many as the longest row took. The state keeps each position's; what a loop ran beyond the last token is not
    among them."""
    steps = max(map(len, ids)) - 1
    assert stack.session.length - stack.session.overrun == prompt_len + steps, "another prompt has been run since"
    traces = (stack.arena.tensors[f"layers.{i}.expert_ids"] for i in range(stack.arch.num_hidden_layers))
    return torch.stack([trace[:, prompt_len : prompt_len + steps] for trace in traces])


def _default_skip(quant: QuantConfig) -> bool:
    return set(quant.skip) == set(NEVER_QUANTISED)
