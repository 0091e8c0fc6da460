"""Shortcuts where torch traces a kernel's call: what comes out is what torch itself makes."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moeexp.stack import kernel_calls

# In a process of its own, whose target is a Hopper: the graph of nano's methods that Inductor lowers, as torch makes it and
# with the shortcuts.
COMPARED = """
import torch, triton
from moeexp_kernels import registry
from moeexp_runner.arena import Arena
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from moeexp.config.compose import compose
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.config.resolve import resolve
from moeexp.config.sources import load_architecture
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.model.weights import Random, load
from moeexp.stack import kernel_calls
from moeexp.stack.inductor import remember_kernel_analyses
from moeexp.stack.methods import export_method

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Stop(Exception):
    pass

triton.runtime.driver.set_active(Driver())
shorten, kernel_calls.shorten = kernel_calls.shorten, lambda: None  # `export_method` calls it
arch = load_architecture(resolve(compose(["model=nano"]), cuda_available=False).model)
model = load(
    arch, Random(arch, 0), dtype=torch.bfloat16, device=torch.device("cpu"), bits=4, group_size=32, skip=NEVER_QUANTISED
)
state = Arena(state_shapes(arch, batch=1, max_seq_len=64, dtype=torch.bfloat16), device="cpu").tensors
names = registry.resolve(default="triton", chosen={}, device="cuda")
ops = {op: registry.implementation(op, name) for op, name in names.items()} | registry.joined(names)
functional = torch.ops.higher_order.triton_kernel_wrapper_functional

def told(value):
    if isinstance(value, torch.Tensor):
        return str((value.dtype, value.shape, value.stride(), value.storage_offset()))
    return str(value)

def lowered(program):
    torch._higher_order_ops.triton_kernel_wrap.kernel_side_table.reset_table()  # calls are numbered there
    found = []
    def inner(graph, *_, **__):
        modes = [node.meta["val"].fake_mode for node in graph.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
        with V.set_fake_mode(modes[0]), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(graph, is_inference=True)
        place = {node: f"%{index}" for index, node in enumerate(graph.graph.nodes)}
        for node in graph.graph.nodes:
            meta = {key: tree_map(told, node.meta.get(key)) for key in ("val", "eager_input_vals", "stack_trace")}
            # The nodes of the arguments by their place, since names count up.
            arguments = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda one: place.get(one, one)
                                                    if isinstance(one, torch.fx.Node) else told(one))
            found.append((node.op, str(node.target).partition(" at 0x")[0], str(arguments), sorted(node.meta), str(meta)))
        raise Stop
    try:
        with torch.no_grad(), config.patch({"cpp_wrapper": True}):
            compile_fx.compile_fx_aot(program.module(), list(program.example_inputs[0]), inner_compile=inner)
    except Stop:
        return found
    raise AssertionError("Inductor was not reached")

left = []
decompose = post_grad.decompose_triton_kernel_wrapper_functional
def counted(graph):
    left.append(len(graph.find_nodes(op="call_function", target=functional)))
    decompose(graph)
remember_kernel_analyses()
for method in ("prefill", "decode"):
    with model.attached(state):
        program = export_method(method, model, ops, batch=1, max_seq_len=64)
        post_grad.decompose_triton_kernel_wrapper_functional = counted
        as_torch_does = lowered(program)
        before = left[-1]
        shorten()
        shorten()
        shortened = lowered(program)
        torch._higher_order_ops.triton_kernel_wrap.clone_preserve_strides = torch._prims_common.clone_preserve_strides
    assert before > 20 and left[-1] == 0, (method, left)
    assert len(as_torch_does) == len(shortened) > 100
    for one, other in zip(as_torch_does, shortened, strict=True):
        assert one == other, (method, one, other)
print("same")
"""


@pytest.mark.slow
def test_the_graph_that_inductor_lowers_is_the_same_with_the_shortcuts():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARED], capture_output=True, text=True, timeout=600, check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-3000:]


def test_a_copy_of_shapes_is_a_tensor_of_that_shape():
    asked = []
    cloned = kernel_calls.of_shapes(lambda x: asked.append(x) or x.clone())
    real = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(cloned(real), real) and len(asked) == 1, "values are wanted"
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        found = cloned(fake)
        assert len(asked) == 1 and found is not fake
        assert (found.shape, found.stride(), found.dtype) == (fake.shape, fake.stride(), fake.dtype)
        cloned(fake[1:])
        assert len(asked) == 2, "a part of a storage keeps its place in it"
    make_fx(lambda x: cloned(x) + 1, tracing_mode="fake")(real)
    assert len(asked) == 3, "a trace has the copy in it"
