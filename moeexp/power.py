"""What the check can see: `python -m moeexp.power [out=FILE] [override …]` injects every seeded fault into `tiny` and writes
the table in docs/check_power.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels import registry
from rich.console import Console

from moeexp.check.faults import FAULTS, PROMPT_LEN, Fault, copy_of, with_reading
from moeexp.check.verify import References, verify
from moeexp.config import compose, schema
from moeexp.config.resolve import resolved
from moeexp.config.sources import weights_folder
from moeexp.model import checkpoint, dequantise
from moeexp.model.config_agreement import check_agreement, differences, text_config
from moeexp.model.prompt import prompt_tokens, text_of
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.stack.factory import build_model, build_stack

DEFAULT_OUT = Path("docs") / "check_power.md"
QUANT = ("none", "int8", "int4")
FIXED = ("model=tiny", "export=eager", "new_tokens=6", f"prompt_ids=[{','.join(str(65 + i % 50) for i in range(PROMPT_LEN))}]")

INTRODUCTION = """# What the check can see

Written by `python -m moeexp.power`; a test compares. Each fault is put into the shipped model `tiny` on its own, with a prompt
of {prompt} tokens and {new} new ones, on the CPU; a cell names the parts of the check that fail.

* **config**: before weights are read, our reading of config.json is compared with transformers' own config object.
* **loading**: the snapshot's tensors do not fit our table of names and shapes.
* **trace**: tensors of the run that are missing, misshapen or not finite, impossible expert ids.
* **weights**: each weight of the model against what transformers' loader finds in the snapshot under that name.
* **float32**: the run's ops in float32 against transformers, given the same experts.
* **timed**: the run itself (bfloat16 here) against what transformers deviates in bfloat16.
* **tokens**: each generated token against the reference's logits.
* **generate**: `transformers.generate` in float32, without quantisation only.

A graph's replay is compared bit by bit with the eager method; that part needs a GPU and is not in the table.
*map* changes our table of names in both directions, for the loader and for what the reference is given; *loaded* changes a
tensor after loading, so that the reference computes with the same wrong weights; *reading* changes our reading of the config
after it has been compared.
"""


class Shared(References):
    """What does not depend on the ops of a run."""

    def get(self, name: str, key: tuple, make: Callable[[], Any]) -> Any:
        return make() if name == "float32" else super().get(name, key, make)


def configured(overrides: Iterable[str]) -> schema.Config:
    return resolved(compose.compose([*FIXED, *overrides]), cuda_available=torch.cuda.is_available())


def seen_by(fault: Fault, cfg: schema.Config, clean: Qwen35MoE, references: References | None = None) -> list[str]:
    """The parts of the check that see the fault. `clean`: the model of `cfg`, loaded without it; `references` over it."""
    with _phases(cfg) as phases, contextlib.ExitStack() as injected:
        if fault.config:
            return _refused(fault, cfg)
        injected.enter_context(_wrapped(fault, cfg, clean))
        injected.enter_context(_renamed(fault))
        try:
            model = build_model(cfg, phases) if fault.pieces else copy_of(clean)
        except ValueError:
            return ["loading"]
        parts = []
        if fault.reading:
            model = with_reading(model, **fault.reading)
            parts = ["config"] if any(differences(model.arch, text_config(cfg.model))) else []
        if fault.model:
            fault.model(model)
        if fault.model or fault.pieces:
            references = None
        stack = build_stack(cfg, model, phases)
        prompt = prompt_tokens(cfg, model.arch, text_of(cfg))
        if fault.session:
            stack.session.generate(prompt.flip(1).to(stack.device), 2)
            stack.arena.reset = lambda: None  # type: ignore[method-assign]
        try:
            verdict = verify(cfg, stack, prompt, phases, references)
        finally:
            stack.close()
    return parts + [part["name"].removeprefix("transformers.") for part in verdict["parts"] if not part["passed"]]


def table(overrides: Iterable[str] = (), *, faults: Iterable[Fault] = FAULTS) -> dict[str, dict[str, list[str]]]:
    """fault -> quant -> parts."""
    found: dict[str, dict[str, list[str]]] = {fault.name: {} for fault in faults}
    for quant in QUANT:
        cfg = configured([*overrides, f"quant={quant}", "dtype=bfloat16"])
        wide = replace(cfg, dtype="float32")
        with _phases(cfg) as phases:
            clean, clean_wide = build_model(cfg, phases), build_model(wide, phases) if quant == "none" else None
        references, wide_references = Shared(), Shared()
        for fault in faults:
            parts = seen_by(fault, cfg, clean, references)
            if clean_wide is not None and not fault.config:
                parts += [part for part in seen_by(fault, wide, clean_wide, wide_references) if part == "generate"]
            found[fault.name][quant] = parts
            print(f"{quant:5} {fault.name:60} {', '.join(parts) or '-'}", file=sys.stderr, flush=True)
    return found


def markdown(found: dict[str, dict[str, list[str]]], *, new_tokens: int) -> str:
    lines = [INTRODUCTION.format(prompt=PROMPT_LEN, new=new_tokens), "| fault | " + " | ".join(QUANT) + " |", "|---" * 4 + "|"]
    for name, cells in found.items():
        nothing = "passes, as it must" if name == "none" else "**nothing sees it**"
        shown = [", ".join(cells[quant]) or nothing for quant in QUANT]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _refused(fault: Fault, cfg: schema.Config) -> list[str]:
    """A copy of the snapshot with other keys in its config.json, as a run would open it."""
    folder = weights_folder(cfg.model)
    assert folder is not None
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "snapshot"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | fault.config))
        try:
            check_agreement(replace(cfg.model, weights=str(copy)))
        except ValueError:
            return ["config"]
    return []


@contextlib.contextmanager
def _wrapped(fault: Fault, cfg: schema.Config, clean: Qwen35MoE) -> Iterator[None]:
    """The registry with the fault's ops in place of every implementation of theirs."""
    before = {op: dict(registry.OPS[op]) for op in fault.ops}
    try:
        for op, wrapper in fault.ops.items():
            for name, real in before[op].items():
                registry.OPS[op][name] = _Wrapped(wrapper, real, clean)
        yield
    finally:
        for op, implementations in before.items():
            registry.OPS[op].update(implementations)


class _Wrapped:
    def __init__(self, wrapper: Callable, real: Callable, model: Qwen35MoE):
        self.wrapper, self.real, self.model = wrapper, real, model

    def __call__(self, **arguments: Any) -> Any:
        return self.wrapper(self.real, self.model, arguments)


@contextlib.contextmanager
def _renamed(fault: Fault) -> Iterator[None]:
    """The piece table as the fault has it, for the loader and for the reference's weights."""
    real = checkpoint.pieces
    change = fault.pieces or (lambda table: table)
    try:
        checkpoint.pieces = dequantise.pieces = lambda *args, **options: change(real(*args, **options))
        yield
    finally:
        checkpoint.pieces = dequantise.pieces = real


@contextlib.contextmanager
def _phases(cfg: schema.Config) -> Iterator[Phases]:
    with tempfile.TemporaryDirectory() as scratch:
        record = Record(Path(scratch) / "record.json", id="power", config=cfg, command=["python", "-m", "moeexp.power"])
        yield Phases(record, Console(quiet=True))


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    out = next((Path(a.removeprefix("out=")) for a in arguments if a.startswith("out=")), DEFAULT_OUT)
    overrides = [a for a in arguments if not a.startswith("out=")]
    try:
        new_tokens = configured(overrides).new_tokens
        text = markdown(table(overrides), new_tokens=new_tokens)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
