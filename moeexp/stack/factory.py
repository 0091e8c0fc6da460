"""The composition root: from a resolved config to a model, its compiled methods and a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from moeexp_kernels import registry
from moeexp_kernels.parts.graph_edges import add_pdl_edges
from moeexp_runner.arena import Arena
from moeexp_runner.binding import CompiledMethod, assert_shared
from moeexp_runner.explicit import ExplicitState
from moeexp_runner.sampler import Sampler
from moeexp_runner.session import Session

from moeexp.config import axes
from moeexp.config.architecture import Architecture
from moeexp.config.quantisation import kind_of
from moeexp.config.schema import Config, SamplerConfig
from moeexp.config.sources import load_architecture, weights_folder
from moeexp.model.checkpoint import Snapshot
from moeexp.model.config_agreement import check_agreement
from moeexp.model.qwen3_5_moe import Qwen35MoE, state_shapes
from moeexp.model.weights import Random, Source, load
from moeexp.record.environment import compute_capability
from moeexp.record.phases import Phases
from moeexp.stack import allocator, artifact
from moeexp.stack.compile_cache import Artifact, key_of, source_digest
from moeexp.stack.inductor import loading
from moeexp.stack.methods import STEPS, AtOne, example_inputs, session_methods, torch_compiled
from moeexp.stack.packages import MethodBuilder, by_none, device_of, op_names, package, package_specs

# Share of the quantisable weight bytes (embedding apart) that default settings must quantise: below it, something was
# skipped without a word. Small models have relatively large routers.
LEAST_COVERAGE = {"small": 0.90, "large": 0.95}
LARGE_HIDDEN = 1024


@dataclass
class Stack:
    """Everything that one run decodes with. `ops` names the implementation of each op that runs."""

    arch: Architecture
    model: Qwen35MoE
    session: Session
    arena: Arena | ExplicitState
    ops: dict[str, str]
    device: torch.device
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def close(self) -> None:
        self.session.close()


def source_of(cfg: Config, arch: Architecture) -> Source:
    folder = weights_folder(cfg.model)
    return Random(arch, cfg.model.seed) if folder is None else Snapshot(folder, arch)


def build_model(cfg: Config, phases: Phases) -> Qwen35MoE:
    """Weights from the config's source, quantised as they come, on the config's device. `RuntimeError` if this process
    cannot have the config's allocator."""
    allocator.check(cfg)
    if cfg.artifact is not None:
        return artifact.load_model(cfg, device_of(cfg), phases)
    arch = load_architecture(cfg.model)
    check_agreement(cfg.model, arch)
    source = source_of(cfg, arch)
    total = len(Qwen35MoE(arch, dtype=torch.float32, device="meta").state_dict())
    with phases.progress("weights", total=total) as advance:
        model = load(
            arch,
            source,
            dtype=getattr(torch, cfg.dtype),
            device=device_of(cfg),
            bits=cfg.quant.bits,
            group_size=cfg.quant.group_size or 0,
            skip=tuple(cfg.quant.skip),
            on_buffer=lambda name, nbytes: advance(1),
        )
    if cfg.device == "cuda":
        torch.cuda.empty_cache()  # what quantising needed on the way is not kept
    return model


def coverage(model: Qwen35MoE) -> float:
    """Quantised share of the weight matrices' elements, embedding apart."""
    done = total = 0
    for name, buffer in model.named_buffers():
        if kind_of(name) in (None, "embedding"):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        bits = getattr(owner, "bits", 16) if name.endswith(".weight") else 16
        elements = buffer.numel() * (2 if bits == 4 else 1)
        total += elements
        done += elements if bits != 16 else 0
    return done / total


def check_coverage(model: Qwen35MoE, *, bits: int, default_skip: bool) -> float:
    """The coverage; `RuntimeError` if it is below what default settings must reach."""
    share = coverage(model)
    least = LEAST_COVERAGE["large" if model.arch.hidden_size >= LARGE_HIDDEN else "small"]
    if bits != 16 and default_skip and share < least:
        raise RuntimeError(
            f"only {share:.1%} of the quantisable weights were quantised, at least {least:.0%} are expected: "
            "the shapes of this model leave too much to the router; leave more out explicitly with quant.skip"
        )
    return share


def python_callbacks(stack: Stack, dispatch: str) -> dict[str, list[str]]:
    """Per method, the ops that call back into Python when it runs, compiled or not (a graph replays what they launched)."""
    opaque = {op for op, name in stack.ops.items() if (op, name) in registry.OPAQUE}
    if dispatch == "single":
        opaque |= set(registry.DISPATCHED)
    decode = sorted(op for op in opaque if not op.endswith("_prefill"))
    prefill = decode if dispatch == "token_by_token" else sorted(op for op in opaque if not op.endswith("_decode"))
    return {"prefill": prefill, "decode": decode}


def build_stack(
    cfg: Config,
    model: Qwen35MoE,
    phases: Phases,
    *,
    export: str | None = None,
    cuda_graph: bool | str | None = None,
    made_ahead: Callable[[str], bool] = by_none,
) -> Stack:
    """State, methods and session over `model`, which other stacks may share: state is this one's own, and attached to the
    model only while methods are bound. `export` and `cuda_graph` override the config's, for the check's float32 twin.
    `made_ahead(key)` waits for a package that another process makes for this one, and says whether it did."""
    if export is not None or cuda_graph is not None:
        cfg = replace(
            cfg,
            export=export or cfg.export,
            cuda_graph=cfg.cuda_graph if cuda_graph is None else cuda_graph,
        )
    device, dtype = model.norm.device, model.embed_tokens.weight.dtype
    copy_outputs = device.type == "cuda" and not cfg.skip_output_copy
    names = op_names(cfg)
    if copy_outputs:
        names["sample"] = "reference"  # logits are on the host, where no Triton kernel runs; validate refuses other wishes
    arena = Arena(state_shapes(model.arch, batch=cfg.batch, max_seq_len=cfg.max_seq_len, dtype=dtype), device=device)
    builder = MethodBuilder(cfg, model, names, arena.tensors, made_ahead)
    methods, artifacts = EXPORTERS[cfg.export](builder, phases)
    prefill, decode = session_methods(cfg.dispatch, methods, padded=builder.padded)
    with phases("capture") if cfg.cuda_graph else phases("session"):
        session = Session(
            prefill=prefill,
            decode=decode,
            verify=methods.get("verify"),
            verify_tokens=cfg.verify_tokens,
            sample=sampler_of(cfg.sampler, names["sample"], device="cpu" if copy_outputs else device),
            arena=ExplicitState(arena) if cfg.state == "explicit" else arena,
            batch=cfg.batch,
            max_seq_len=cfg.max_seq_len,
            vocab_size=model.arch.vocab_size,
            device=device,
            cuda_graph=cfg.cuda_graph,
            copy_outputs=copy_outputs,
            shared_stream=cfg.shared_stream,
            padded=builder.padded,
            prefill_graph_lengths=cfg.prefill_graph_lengths,
            prefill_chunk=cfg.prefill_chunk,
            ahead=cfg.loop_ahead,
            pdl=pdl_of(cfg),
        )
    return Stack(model.arch, model, session, session.arena, names, device, artifacts)


def pdl_of(cfg: Config) -> Callable[[int], int] | None:
    """What makes edges of a captured decode step programmatic, as a session takes it; None without PDL."""
    idle = axes.not_applicable(cfg, compute_capability(cfg.device))
    return add_pdl_edges if cfg.pdl and "pdl" not in idle else None


def sampler_of(cfg: SamplerConfig, implementation: str, *, device: torch.device | str) -> Sampler:
    """The config's choice of the next token, by the named implementation of `sample`; validated, so it makes draws if need
    be. Where its op has one that feeds the token as well, a captured loop runs that, else torch's ops feed."""
    if cfg.name == "greedy":
        op = registry.implementation("sample", implementation)
        return Sampler(op, feed_op=registry.feed_of(op))
    op = registry.DRAWS[implementation]
    return Sampler(
        op,
        feed_op=registry.feed_of(op),
        seed=cfg.seed,
        device=device,
        temperature=cfg.temperature,
        top_k=cfg.top_k or 0,
        top_p=1.0 if cfg.top_p is None else cfg.top_p,
    )


def _eager_methods(builder: MethodBuilder, phases: Phases):
    return {name: builder.module(name) for name in builder.methods}, {}


def _torch_compiled_methods(builder: MethodBuilder, phases: Phases):
    """Compiled here, for one token and for several, so that no later phase pays for it. Of a slice dynamo would expect the
    next time that it is a slice, and compile anew for what is none."""
    cfg, methods = builder.cfg, {}
    # Of our ops Inductor\'s own cache knows the name alone: code that an earlier version\'s were compiled into would run.
    torch.compiler.config.cache_key_tag = source_digest()
    for name, count in builder.methods.items():
        methods[name] = torch_compiled(builder.module(name))
        inputs = example_inputs(
            name, batch=cfg.batch, device=builder.model.norm.device,
            padded=builder.padded and name not in STEPS, state=tuple(builder.state.values()), count=count,
        )  # fmt: skip
        with phases(f"compile {name}"), torch.no_grad():
            methods[name](*inputs)
            if name not in STEPS:
                methods[name](*inputs[:2], inputs[2][:1].clone(), *inputs[3:])
            if name in ("forward", "cond"):
                state = tuple(builder.state.values())
                AtOne(methods[name], padded=builder.padded)(inputs[0].new_zeros(cfg.batch, 1), inputs[1], *state)
    return methods, {}


def _packaged_methods(builder: MethodBuilder, phases: Phases):
    """Exports and compiles each method (or finds it compiled), loads it and binds all of them to the same tensors."""
    cfg, model, device = builder.cfg, builder.model, builder.model.norm.device
    methods, artifacts = {}, {}
    for spec in package_specs(cfg):
        with phases(f"compile {spec.method}"):
            if cfg.artifact:
                artifacts[spec.method] = artifact.method(cfg, spec.method)
            else:
                made = builder.made_ahead(key_of(spec))
                found = package(cfg, spec)
                artifacts[spec.method] = replace(found, cached=found.cached and not made)
    with phases("bind"), loading(device.type), model.attached(builder.attached_state):
        for name, found in artifacts.items():
            methods[name] = CompiledMethod(found.package, found.constants, device=device)
            methods[name].bind({fqn: model.get_buffer(fqn.removeprefix("model.")) for fqn in found.constants})
        assert_shared(methods)
    return methods, artifacts


# export -> (builder, phases) -> (methods by name, artifacts by name)
EXPORTERS = {"eager": _eager_methods, "compile": _torch_compiled_methods, "aoti": _packaged_methods}
