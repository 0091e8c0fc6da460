"""The composition root: from a resolved config to a model, its compiled methods and a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from moeexp_kernels import registry
from moeexp_runner.arena import Arena
from moeexp_runner.binding import CompiledMethod, assert_shared
from moeexp_runner.session import Session
from torch import Tensor

from . import artifact
from .architecture import Architecture
from .compile_cache import Artifact, MethodSpec, get_or_compile
from .methods import METHODS, MODULES, export_method
from .model import Qwen35MoE, state_shapes
from .phases import Phases
from .schema import Config
from .validate import load_architecture, weights_folder
from .weights import Random, Snapshot, Source, kind_of, load

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
    arena: Arena
    ops: dict[str, str]
    device: torch.device
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def close(self) -> None:
        self.session.close()


def device_of(cfg: Config) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if cfg.device == "cuda" else torch.device(cfg.device)


def source_of(cfg: Config, arch: Architecture) -> Source:
    folder = weights_folder(cfg.model)
    return Random(arch, cfg.model.seed) if folder is None else Snapshot(folder, arch)


def build_model(cfg: Config, phases: Phases) -> Qwen35MoE:
    """Weights from the config's source, quantised as they come, on the config's device."""
    if cfg.artifact is not None:
        return artifact.load_model(cfg, device_of(cfg), phases)
    arch = load_architecture(cfg.model)
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


def op_names(cfg: Config) -> dict[str, str]:
    chosen = {f.name: getattr(cfg.ops, f.name) for f in fields(cfg.ops) if f.name != "default"}
    return registry.resolve(default=cfg.ops.default, chosen=chosen, device=cfg.device)


def build_stack(
    cfg: Config, model: Qwen35MoE, phases: Phases, *, export: str | None = None, cuda_graph: bool | None = None
) -> Stack:
    """Arena, methods and session over `model`, whose state buffers are (re)attached. `export` and `cuda_graph` override
    the config's, for the check's float32 twin."""
    device, dtype = model.norm.device, model.embed_tokens.weight.dtype
    names = op_names(cfg)
    ops = {op: registry.implementation(op, name) for op, name in names.items()}
    arena = Arena(state_shapes(model.arch, batch=cfg.batch, max_seq_len=cfg.max_seq_len, dtype=dtype), device=device)
    model.attach_state(arena.tensors)
    artifacts: dict[str, Artifact] = {}
    if (export or cfg.export) == "eager":
        methods: dict[str, Callable[..., Tensor]] = {name: MODULES[name](model, ops).eval() for name in METHODS}
    else:
        methods, artifacts = _compiled_methods(cfg, model, ops, names, device, phases)
    graph = cfg.cuda_graph is not False if cuda_graph is None else cuda_graph
    with phases("capture") if graph else phases("session"):
        session = Session(
            prefill=methods["prefill"],
            decode=methods["decode"],
            sample=ops["sample"],
            arena=arena,
            batch=cfg.batch,
            max_seq_len=cfg.max_seq_len,
            vocab_size=model.arch.vocab_size,
            device=device,
            cuda_graph=graph,
            copy_outputs=device.type == "cuda" and not cfg.skip_output_copy,
        )
    return Stack(model.arch, model, session, arena, names, device, artifacts)


def _compiled_methods(cfg, model, ops, names, device, phases):
    """Exports and compiles each method (or finds it compiled), loads it and binds all of them to the same tensors."""
    methods, artifacts = {}, {}
    for name in METHODS:
        spec = MethodSpec(
            method=name,
            architecture=model.arch.to_hf(),
            ops=registry.identities(names),
            bits=cfg.quant.bits,
            group_size=cfg.quant.group_size,
            skip=tuple(sorted(cfg.quant.skip)),
            dtype=cfg.dtype,
            batch=cfg.batch,
            max_seq_len=cfg.max_seq_len,
            device=device.type,
        )

        def export(name=name):
            with phases(f"export {name}"):
                return export_method(name, model, ops, batch=cfg.batch, max_seq_len=cfg.max_seq_len)

        with phases(f"compile {name}"):
            artifacts[name] = artifact.method(cfg, name) if cfg.artifact else get_or_compile(spec, export)
    with phases("bind"):
        for name, made in artifacts.items():
            methods[name] = CompiledMethod(made.package, made.constants, device=device)
            methods[name].bind({fqn: model.get_buffer(fqn.removeprefix("model.")) for fqn in made.constants})
        assert_shared(methods)
    return methods, artifacts
