"""What methods are made from, and those that are packages: what each hangs on, and how it comes into the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from moeexp_kernels import dispatch, registry
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from moeexp.config import axes
from moeexp.config.schema import Config
from moeexp.config.sources import load_architecture
from moeexp.model.qwen3_5_moe import Qwen35MoE, state_shapes
from moeexp.model.weights import unfilled
from moeexp.record.environment import compute_capability
from moeexp.stack.compile_cache import Artifact, MethodSpec, get_or_compile
from moeexp.stack.methods import MODULES, OF_DISPATCH, STEPS, Method, export_method


def device_of(cfg: Config) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if cfg.device == "cuda" else torch.device(cfg.device)


def op_names(cfg: Config) -> dict[str, str]:
    chosen = {f.name: getattr(cfg.ops, f.name) for f in fields(cfg.ops) if f.name != "default"}
    return registry.resolve(default=cfg.ops.default, chosen=chosen, device=cfg.device)


def _pads(cfg: Config) -> bool:
    """Prefill is captured at fixed lengths, to which prompts are padded."""
    return cfg.cuda_graph == "all"


def names_in(method: str, names: dict[str, str]) -> dict[str, str]:
    """What of `names` is in a method: the sampler is in none, and a prefill method has no op of a decode step."""
    other = {"prefill": "_decode"} | dict.fromkeys(STEPS, "_prefill")
    return {op: name for op, name in names.items() if op != "sample" and not op.endswith(other.get(method, "nothing"))}


def methods_of(cfg: Config) -> dict[str, int]:
    """{method: tokens of each sequence that a call takes, 1 where that is no fixed number of several}, in the order of the
    config's dispatch."""
    methods = dict.fromkeys(OF_DISPATCH[cfg.dispatch], 1)
    return methods | {"verify": cfg.verify_tokens} if cfg.verify_tokens else methods


def by_none(key: str) -> bool:
    """Where no other process makes packages for this one."""
    return False


@dataclass
class MethodBuilder:
    """What the methods of one stack are made from; `names` of ops, `tensors` of its state, `made_ahead` as of `build_stack`."""

    cfg: Config
    model: Qwen35MoE
    names: dict[str, str]
    tensors: dict[str, Tensor]
    made_ahead: Callable[[str], bool] = by_none

    @property
    def state(self) -> dict[str, Tensor]:
        """What goes in and out of each call."""
        return self.tensors if self.cfg.state == "explicit" else {}

    @property
    def attached_state(self) -> dict[str, Tensor]:
        """What is mutated in place."""
        return {} if self.cfg.state == "explicit" else self.tensors

    @property
    def padded(self) -> bool:
        return _pads(self.cfg)

    @property
    def methods(self) -> dict[str, int]:
        return methods_of(self.cfg)

    def ops(self) -> dict[str, Callable]:
        ops = {op: registry.implementation(op, name) for op, name in self.names.items()} | registry.joined(self.names)
        return ops | dispatch.ops(self.names) if self.cfg.dispatch == "single" else ops

    def module(self, name: str) -> Method:
        """Runs as it is, on this stack's own state: several stacks may share the model."""
        return MODULES[name](
            self.model, self.ops(), state_names=tuple(self.state), attached_state=self.attached_state, padded=self.padded
        ).eval()


def package_specs(cfg: Config) -> list[MethodSpec]:
    """Of the methods of a resolved config that are compiled as packages, in the order of its dispatch."""
    arch, names = load_architecture(cfg.model), op_names(cfg)
    found = []
    for method, count in methods_of(cfg).items():
        settings = axes.compiled_in(cfg, compute_capability(cfg.device)) | {
            "architecture": arch.to_hf(),
            "ops": registry.identities(names_in(method, names)),
            "skip": sorted(cfg.quant.skip),
        }
        found.append(MethodSpec(method, settings, padded=_pads(cfg) and method not in STEPS, count=count))
    return found


def package(cfg: Config, spec: MethodSpec) -> Artifact:
    """From the cache, or exported and compiled now, of a model and a state that are shapes without storage: no package contains
    a value of theirs."""

    def export() -> ExportedProgram:
        arch, dtype, device = load_architecture(cfg.model), getattr(torch, cfg.dtype), device_of(cfg)
        quant, shapes = cfg.quant, state_shapes(arch, batch=cfg.batch, max_seq_len=cfg.max_seq_len, dtype=dtype)
        with FakeTensorMode():
            model = unfilled(
                arch, dtype=dtype, device=device, bits=quant.bits, group_size=quant.group_size or 0, skip=tuple(quant.skip)
            )
            state = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        builder = MethodBuilder(cfg, model, op_names(cfg), state)
        with model.attached(builder.attached_state):
            return export_method(
                spec.method, model, builder.ops(), batch=cfg.batch, max_seq_len=cfg.max_seq_len, padded=spec.padded,
                state=builder.state, count=spec.count,
            )  # fmt: skip

    return get_or_compile(spec, export)
