"""What the kernels of a chain of layers are made of, as Triton compiles them for an architecture. No GPU is needed.

Instructions are not time. But where a kernel waits for the one before it (PDL, see `parts/pdl.py`), the whole GPU waits for those
behind its wait, barriers among them, and registers and shared memory say how many of its programs find room on an SM.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeexp_kernels.bench.layers import Layers
from moeexp_kernels.bench.shapes import Shapes
from moeexp_kernels.parts import pdl, tuning

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")
ALIGNED = [["tt.divisibility", 16]]  # as Triton finds of tensors, and of numbers that 16 divides

WAIT, BARRIER = "ACQBULK", "BAR"  # griddepcontrol.wait and bar.sync, as the assembler names them
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", re.M)
REGISTERS = re.compile(r"REG:(\d+)")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def key(self) -> tuple:
        """Launches with the same key compile to the same code."""
        seen = ((n, (v.dtype, "tensor") if isinstance(v, Tensor) else v) for n, v in self.arguments.items())
        return self.name, self.grid, tuple(seen)


@dataclass(frozen=True)
class Counts:
    before: int  # instructions before the first wait; of a kernel that does not wait 0
    behind: int
    barriers: int
    registers: int  # of a thread


class EmptyTensors:
    """In place of `case.SeededTensors`: shapes and dtypes."""

    def __init__(self, device: str):
        self.device = device

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def weight(self, *shape: int, bits: int, group: int) -> tuple[Tensor, Tensor]:
        *rows, features = shape
        codes = torch.empty(*rows, features * bits // 8, dtype=torch.uint8, device=self.device)
        return codes, torch.empty(*rows, features // group, 2, dtype=torch.float16, device=self.device)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def launches(shapes: Shapes, *, sequences: int, arch: str) -> list[Launch]:
    """What a chain of layers launches on a GPU of `arch`, each launch once, with arguments that have no memory."""
    found: dict[tuple, Launch] = {}

    class Watched:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*arguments: Any, **named: Any) -> None:
                made = Launch(self.kernel, tuple(grid), dict(zip(self.kernel.arg_names, arguments, strict=False)) | named)
                found.setdefault(made.key(), made)

            return launch

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("moeexp_kernels.ops.") and hasattr(module, "wrap_triton"):
                stack.enter_context(replaced(module, "wrap_triton", Watched))
        for owner in (tuning, pdl):
            stack.enter_context(replaced(owner, "architecture", lambda device: arch if device.type == "cuda" else device.type))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        chain = Layers(shapes, "cuda", sequences, source=EmptyTensors("cuda"))
        chain.call(chain.x)
    return list(found.values())


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, and its options."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[name], attributes[(i,)] = TYPES[value.dtype], ALIGNED
        elif parameter.is_constexpr or value is None or value == 1:
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = ALIGNED
    options = {name: launch.arguments[name] for name in OPTIONS if name in launch.arguments}
    return ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes), options


def count(assembly: str, usage: str) -> Counts:
    """Of what nvdisasm and `cuobjdump -res-usage` print. The instructions that fill a kernel's last lines are not counted."""
    names, registers = INSTRUCTION.findall(assembly), REGISTERS.search(usage)
    while names and names[-1] in ("NOP", "BRA"):
        names.pop()
    if not names or registers is None:
        raise ValueError("no instructions of a kernel are in what nvdisasm and cuobjdump printed")
    before = names.index(WAIT) if WAIT in names else 0
    return Counts(before, len(names) - before, names.count(BARRIER), int(registers.group(1)))


def counts_of(cubin: bytes) -> Counts:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def printed(tool: str, option: str) -> str:
            return subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout

        return count(printed("nvdisasm", "-c"), printed("cuobjdump", "-res-usage"))


def print_instructions(shapes: Shapes, *, counts: list[int], arch: str) -> None:
    """A line for each kernel of the chain, for each number of sequences."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    print(f"four layers as Triton {triton.__version__} compiles them for {arch}; instructions of one program's warp")
    head = f"{'kernel':24s} {'programs':>8s} {'warps':>5s} {'before wait':>11s} {'behind':>6s} {'barriers':>8s} "
    head += f"{'registers':>9s} {'shared, bytes':>13s}"
    for sequences in counts:
        print(f"\n{sequences} sequences\n{head}")
        for launch in launches(shapes, sequences=sequences, arch=arch):
            source, options = source_of(launch)
            made = triton.compile(source, target=target, options=options)
            found, programs = counts_of(made.asm["cubin"]), math.prod(launch.grid)
            print(
                f"{launch.name:24s} {programs:8d} {made.metadata.num_warps:5d} {found.before:11d} {found.behind:6d} "
                f"{found.barriers:8d} {found.registers:9d} {made.metadata.shared:13d}",
                flush=True,
            )
