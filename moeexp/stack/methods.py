"""The methods of a model as modules, exported with torch.export and compiled with AOTInductor, or with torch.compile.

    prefill   (tokens [B, T], positions [B], logit_positions [n], valid_len [B]?, *state?) -> logits [B, n, V]
    decode    (token [B, 1], positions [B], *state?) -> logits [B, 1, V]
    verify    (tokens [B, T], positions [B], *state?) -> logits [B, T, V], a decode step of T tokens of each sequence, T fixed
    forward   as prefill, for any T in one method: ops choose when they run (dispatch=single)
    cond      as prefill, for any T in one method: torch.cond chooses between the two (dispatch=cond)

Integers are int64. `valid_len` is there for methods that are `padded`. `*state` is there under `state=explicit`:
the tensors of `state_shapes` in order; the result is then (logits, *state), new tensors, the given ones unchanged.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels.parts import tuning
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram

from moeexp.model.qwen3_5_moe import Ops, Qwen35MoE
from moeexp.stack import kernel_calls
from moeexp.stack.inductor import declare_arrays_once_per_writer, remember_kernel_analyses, telling_constants_apart

METHODS = ("prefill", "decode")
# Of a fixed number of tokens, all of whose logits they return.
STEPS = ("decode", "verify")
# dispatch -> the methods that it is made of.
OF_DISPATCH = {
    "dual": METHODS,
    "single": ("forward",),
    "token_by_token": ("decode",),
    "cond": ("cond",),
}

# Dynamo counts the versions of a function's code, which all methods of all stacks of a process share.
DYNAMO_RECOMPILE_LIMIT = 256


class Method(nn.Module):
    """One method; inputs and outputs as in the module's docstring. `state_names` empty: state is mutated in place, that in
    `attached_state`, or where there is none, the model's buffers (for export, which must see it as those)."""

    def __init__(
        self,
        model: Qwen35MoE,
        ops: Ops,
        *,
        name: str,
        state_names: tuple[str, ...] = (),
        attached_state: dict[str, Tensor] | None = None,
        padded: bool = False,
    ):
        super().__init__()
        assert not (state_names and attached_state), "state is explicit or attached, not both"
        self.model, self.ops, self.name = model, ops, name
        self.state_names, self.attached_state = state_names, attached_state
        self.padded = padded and name not in STEPS

    def forward(self, tokens: Tensor, positions: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.name != "cond":
            return self._run({"forward": "single", "verify": "decode"}.get(self.name, self.name), tokens, positions, *more)
        inputs = (tokens, positions, *more)
        if not torch.compiler.is_compiling():
            return self._one([], *inputs) if tokens.shape[1] == 1 else self._many([], *inputs)
        sizes = [tuple(tensor.shape) for tensor in more[len(more) - len(self.state_names) :]]
        return torch.cond(tokens.shape[1] == 1, partial(self._one, sizes), partial(self._many, sizes), inputs)

    def _one(self, sizes: list[tuple[int, ...]], tokens: Tensor, positions: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        # Both branches are traced with T a symbol; here it is one token, and an op may say so.
        _check_sizes(sizes, more)
        return self._run("decode", tokens[:, :1], positions, *more, cut=True)

    def _many(self, sizes: list[tuple[int, ...]], tokens: Tensor, positions: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        _check_sizes(sizes, more)
        return self._run("prefill", tokens, positions, *more)

    def _run(self, phase: str, tokens: Tensor, positions: Tensor, *more: Tensor, cut: bool = False):
        rest = list(more)
        logit_positions = None if self.name in STEPS else rest.pop(0)
        valid_len = rest.pop(0) if self.padded else None
        # Clones: what a method is given stays as it is. In a compiled method they are the buffers that it returns.
        new = {name: tensor.clone() for name, tensor in zip(self.state_names, rest, strict=True)}
        logits = self.model(
            tokens, positions, logit_positions, ops=self.ops, phase=phase, state=new or self.attached_state,
            valid_len=None if cut else valid_len,
        )  # fmt: skip
        return (logits, *new.values()) if new else logits


def _check_sizes(sizes: list[tuple[int, ...]], inputs: tuple[Tensor, ...]) -> None:
    """Of the state, the last of `inputs`: torch 2.11 makes symbols of all that a branch is given."""
    for size, tensor in zip(sizes, inputs[len(inputs) - len(sizes) :], strict=True):
        for wanted, found in zip(size, tensor.shape, strict=True):
            torch._check(found == wanted)


# As in the module's docstring: (model, ops, *, state_names=(), attached_state=None, padded=False).
MODULES = {name: partial(Method, name=name) for name in ("prefill", "decode", "verify", "forward", "cond")}


def session_methods(dispatch: str, methods: dict[str, Callable], *, padded: bool = False) -> tuple[Callable | None, Callable]:
    """(prefill, decode) as a session takes them, from a dispatch's methods by name. A lone method of any T serves as both
    under `single`. `ValueError` where a method is missing, e.g. for a package that holds only one under `dual`."""
    if dispatch == "dual":
        missing = [name for name in METHODS if name not in methods]
        if missing:
            held = ", ".join(methods) or "none"
            raise ValueError(
                f"dispatch=dual needs the methods prefill and decode, and {missing[0]} is missing (there: {held}): "
                "a single method runs with dispatch=single"
            )
        return methods["prefill"], methods["decode"]
    if dispatch == "token_by_token":
        if "decode" not in methods:
            raise ValueError(f"dispatch=token_by_token needs the method decode (there: {', '.join(methods)})")
        return None, methods["decode"]
    names = [name for name in ("forward", "cond", "prefill") if name in methods]
    if not names:
        raise ValueError(f"dispatch={dispatch} needs a method for any number of tokens (there: {', '.join(methods)})")
    return methods[names[0]], AtOne(methods[names[0]], padded=padded)


class AtOne:
    """A method for any T as `decode`: logits of its only token. With `padded`, that token counts."""

    def __init__(self, method: Callable, *, padded: bool = False):
        self.method, self.padded = method, padded
        self._fixed: tuple[Tensor, ...] = ()

    def __call__(self, token: Tensor, positions: Tensor, *state: Tensor):
        if not self._fixed:  # before any capture: a graph needs their addresses
            valid_len = (torch.ones_like(positions),) if self.padded else ()
            self._fixed = (torch.zeros(1, dtype=torch.int64, device=token.device), *valid_len)
        return self.method(token, positions, *self._fixed, *state)


def example_inputs(
    method: str, *, batch: int, device: torch.device, padded: bool = False, state: tuple[Tensor, ...] = (), count: int = 1
) -> tuple[Tensor, ...]:
    """count: tokens of each sequence, of a method of `STEPS`."""
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    if method in STEPS:
        return torch.zeros(batch, count, dtype=torch.int64, device=device), positions, *state
    # Neither T nor n may equal 1 or each other here: export would take that for a law.
    tokens = torch.zeros(batch, 7, dtype=torch.int64, device=device)
    valid_len = (torch.full_like(positions, 5),) if padded else ()
    return tokens, positions, torch.arange(3, dtype=torch.int64, device=device), *valid_len, *state


def prepare_tracing() -> None:
    """From now on, in this process, torch does with a kernel and its calls what it needs to, once; and dynamo, which also traces
    the branches of `torch.cond` for an export, takes for constant what the tuning table says. Ops that are joined ask it outside
    of any custom op, and it lies in a file, which dynamo does not read."""
    remember_kernel_analyses()
    kernel_calls.shorten()
    torch.compiler.assume_constant_result(tuning.lookup)


def export_method(
    method: str,
    model: Qwen35MoE,
    ops: Ops,
    *,
    batch: int,
    max_seq_len: int,
    padded: bool = False,
    state: dict[str, Tensor] | None = None,
    count: int = 1,
) -> ExportedProgram:
    """`model` has its state attached (`Qwen35MoE.attached`), or `state` (an example of each tensor) is explicit. Buffers keep
    their names (`model.layers.0.…`) in every method. All of these may be FakeTensors: shapes are all that counts. count: as of
    `example_inputs`."""
    prepare_tracing()
    state = state or {}
    module = MODULES[method](model, ops, state_names=tuple(state), padded=padded).eval()
    inputs = example_inputs(
        method, batch=batch, device=model.norm.device, padded=padded, state=tuple(state.values()), count=count
    )  # fmt: skip
    more: list[dict | None] = [None] * (len(inputs) - 2)
    tokens = None
    if method not in STEPS:
        tokens = {1: Dim("T", min=1, max=max_seq_len)}
        more[0] = {0: Dim("n", min=1, max=max_seq_len)}
    shapes = {"tokens": tokens, "positions": None} | ({"more": tuple(more)} if more else {})
    with torch.no_grad(), _sizes_may_be_one():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    if isinstance(model.norm, FakeTensor):
        _use_own_fakes(program)
    return program


def _use_own_fakes(program: ExportedProgram) -> None:
    """A program's graph has fakes of its own mode, beside which Inductor takes none of another: those that it was given."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.graph_signature
    for name, target in signature.inputs_to_buffers.items():
        (program.state_dict if target in program.state_dict else program.constants)[target] = values[name]
    given, keywords = program.example_inputs
    own = (
        values[name] if isinstance(tensor, FakeTensor) else tensor
        for name, tensor in zip(signature.user_inputs, given, strict=True)
    )
    program.example_inputs = tuple(own), keywords


def compile_method(program: ExportedProgram, path: Path, config: dict[str, Any]) -> None:
    """Writes an AOTInductor package without weights to `path` (.pt2). config: as of `inductor.inductor_config`.

    By way of memory: torch's own writer ends the process on a full disk, where ours raises `OSError`."""
    from torch._inductor import aoti_compile_and_package

    prepare_tracing()
    declare_arrays_once_per_writer()
    package = io.BytesIO()
    with torch.no_grad(), _sizes_may_be_one(), telling_constants_apart(), warnings.catch_warnings():
        # torch's own, about its own pytrees; nothing that a user could act on.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        aoti_compile_and_package(program, package_path=package, inductor_configs=config)
    path.write_bytes(package.getbuffer())


def torch_compiled(module: Method) -> Callable:
    """The module under torch.compile, whole (fullgraph). T and n are symbols, apart from 1, which dynamo compiles on its
    own: a method then has one more version for a single token or a single row of logits."""
    prepare_tracing()
    torch._dynamo.config.recompile_limit = DYNAMO_RECOMPILE_LIMIT
    # The methods are one function to dynamo, which else makes symbols of whatever differs between their inputs: with explicit
    # state of the trace's length too, and torch 2.11 cannot lower a kernel that mutates such a tensor.
    torch._dynamo.config.automatic_dynamic_shapes = False
    # Said, so that it is in the key of Inductor's own cache: not every torch has there how many threads kernels are written for.
    options: dict[str, Any] | None = {"cpp.threads": torch.get_num_threads()} if module.model.norm.device.type == "cpu" else None
    compiled = torch.compile(module, fullgraph=True, options=options)
    if module.name in STEPS:
        return compiled

    def run(tokens: Tensor, positions: Tensor, logit_positions: Tensor, *more: Tensor):
        # Not `dynamic=True`, which makes symbols of floats as well; those, torch.cond's branches cannot see.
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        torch._dynamo.maybe_mark_dynamic(logit_positions, 0)
        return compiled(tokens, positions, logit_positions, *more)

    return run


@contextlib.contextmanager
def _sizes_may_be_one() -> Iterator[None]:
    """Lets a dynamic dimension of size 1 through export: a one-token prompt is a prompt."""
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    _config.backed_size_oblivious = True
    try:
        yield
    finally:
        _config.backed_size_oblivious = before
