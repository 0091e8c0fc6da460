"""What is taken from Inductor's hands, and that there is something to take it from."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import codecache, config, graph

from moeexp.stack import inductor


@pytest.fixture
def analysis():
    calls = []

    def analyse(kernel, arguments, tma_descriptor_metadata):
        calls.append((kernel, arguments))
        return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

    return inductor.remembered(analyse), calls


def test_a_kernel_is_analysed_once_per_types_and_constants(analysis):
    analyse, calls = analysis
    base = {"x": torch.zeros(2), "n": 3, "FLAG": True}
    assert analyse("kernel", base, {}) == analyse("kernel", base | {"x": torch.ones(5, 7)}, {}) == ["x"]
    assert len(calls) == 1
    changes = [{"x": torch.zeros(2, dtype=torch.int8)}, {"n": 4}, {"FLAG": 1}, {"n": 3.0}, {"x": None}]
    for number, change in enumerate(changes, start=2):
        analyse("kernel", base | change, {})
        assert len(calls) == number, change
    analyse("other kernel", base, {})
    assert len(calls) == len(changes) + 2


def test_the_autotuners_of_one_kernel_are_one_kernel(analysis):
    analyse, calls = analysis

    def tuned(fn, **kwargs):
        return SimpleNamespace(fn=fn, configs=[SimpleNamespace(kwargs=kwargs)])

    for kernel in (tuned("kernel"), tuned("kernel"), tuned("kernel", BLOCK=8), tuned("other"), tuned("kernel", BLOCK=8)):
        analyse(kernel, {"x": torch.zeros(2)}, {})
    assert len(calls) == 3


def test_what_cannot_be_compared_is_analysed_every_time(analysis):
    analyse, calls = analysis
    for _ in range(2):
        analyse("kernel", {"x": torch.zeros(2), "sizes": [1, 2]}, {})
        analyse("kernel", {"x": torch.zeros(2)}, {"x": "a tensor descriptor"})
    assert len(calls) == 4


def test_a_result_handed_out_can_be_changed(analysis):
    analyse, _ = analysis
    analyse("kernel", {"x": torch.zeros(2)}, {}).append("y")
    assert analyse("kernel", {"x": torch.zeros(2)}, {}) == ["x"]


class Wrapper:
    """Names arrays as torch 2.11 does: by `id()` of a method that is bound anew each time it is asked for."""

    def __init__(self):
        self.cache, self.lines = {}, []

    def declare(self, int_array, writeline, known_statically=False, graph=None):
        key = int_array, id(writeline), known_statically, id(graph) if graph else None
        if key not in self.cache:
            self.cache[key] = f"int_array_{len(self.cache)}"
            writeline(f"{self.cache[key]} = {int_array}")
        return self.cache[key]


class Scope:
    def __init__(self):
        self.lines = []

    def writeline(self, line):
        self.lines.append(line)


def undeclared(declare):
    """How often one of 200 scopes, each of which is gone before the next, names an array that it does not declare."""
    wrapper, missing, declared = Wrapper(), 0, 0
    for _ in range(200):
        scope = Scope()
        names = [declare(wrapper, "{1}", scope.writeline) for _ in range(3)]
        missing += sum(not any(line.startswith(f"{name} =") for line in scope.lines) for name in names)
        declared += len(scope.lines)
        del scope
    return missing, declared


def test_a_scope_names_only_arrays_that_it_declares():
    assert undeclared(Wrapper.declare)[0] > 0, "the slip that is mended"
    assert undeclared(inductor.by_writer(Wrapper.declare)) == (0, 200)


def test_the_wrapper_goes_by_the_writer():
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    inductor.declare_arrays_once_per_writer(), inductor.declare_arrays_once_per_writer()
    declare = CppWrapperCpu.codegen_int_array_var
    wrapped = getattr(declare, "__wrapped__", None)
    assert ("__self__" in inspect.unwrap(declare).__code__.co_consts) == (wrapped is None)
    assert not hasattr(wrapped, "__wrapped__")


def test_torch_has_the_functions_that_are_replaced():
    inductor.remember_kernel_analyses()
    found = [getattr(triton_kernel_wrap, name) for name in inductor.ANALYSES if hasattr(triton_kernel_wrap, name)]
    assert found and all(hasattr(function, "remembered") for function in found)
    same, one, other = graph.is_same_tensor, torch.zeros(3), torch.zeros(3)
    with inductor.telling_constants_apart():
        for pair in ((one, one), (one, one.view(3)), (one, other), (one, one[:2]), (one[:2], one[1:])):
            assert graph.is_same_tensor(*pair) == same(*pair)
    assert graph.is_same_tensor is same


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["decode", "cond"])
def test_every_switch_exists(device, method):
    with config.patch(inductor.inductor_config(method=method, device=device)):
        assert config.aot_inductor.package_constants_in_so is False
        assert config.cpp.vec_isa_ok is (False if device == "cuda" else None)
        assert config.allow_buffer_reuse is (method != "cond")
    with inductor.loading(device):
        assert config.cpp.vec_isa_ok is (False if device == "cuda" else None)


@pytest.mark.parametrize("there", [True, False])
def test_loading_does_not_describe_the_machine(monkeypatch, there):
    """Also where a torch has no such function."""
    if not there:
        monkeypatch.delattr(codecache, "get_device_information")
    described = getattr(codecache, "get_device_information", None)
    with inductor.loading("cpu"):
        assert codecache.get_device_information("cpu") == {}
    assert getattr(codecache, "get_device_information", None) is described


LOADED = """
import torch, triton
from moeexp_kernels import registry
from moeexp_kernels.ops import linear
from moeexp_kernels.parts import tuning
from moeexp_runner.arena import Arena
from triton.backends.compiler import GPUTarget

from moeexp.stack import methods
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.sources import load_architecture
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.model.weights import Random, load

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
arch = load_architecture(resolve(compose([f"model={MODEL}"]), cuda_available=False).model)
model = load(
    arch, Random(arch, 0), dtype=torch.bfloat16, device=torch.device("cpu"), bits=4, group_size=GROUP, skip=NEVER_QUANTISED
)
state = Arena(state_shapes(arch, batch=BATCH, max_seq_len=64, dtype=torch.bfloat16), device="cpu").tensors
linear.has_pdl = lambda tensor: True  # as on Hopper, where a GEMV has instructions of its own for that
if FUSED:
    tuning.OVERRIDES["moe_routed", ""], tuning.OVERRIDES["gdn_out", ""] = {"UP_TO": BATCH, "TELLS": BATCH == 2}, {"UP_TO": BATCH}
    tuning.OVERRIDES["linear_rows", ""] = {"TILE_FROM": 4, "GEMM_FROM": 33, "MATMUL_FROM": None}
names = registry.resolve(default="triton", chosen={}, device="cuda")
ops = {op: registry.implementation(op, name) for op, name in names.items()} | registry.joined(names)
"""
TRACED = """
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops import triton_kernel_wrap

from moeexp.stack.inductor import remember_kernel_analyses

class Traceable(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, *inputs):
        return (self.method(*inputs),)

remember_kernel_analyses()
(known,) = [vars(analyse)["remembered"] for analyse in vars(triton_kernel_wrap).values() if hasattr(analyse, "remembered")]
written = {}
for method in ("prefill", "decode"):
    known.clear()
    with model.attached(state):
        program = methods.export_method(method, model, ops, batch=BATCH, max_seq_len=64)
    with torch.no_grad():
        graph, _ = aot_export_module(Traceable(program.module()), program.example_inputs[0], trace_joint=False)
    calls = sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes)
    assert 20 < calls and 2 * len(known) < calls, (method, calls, len(known))
    for kernel, *arguments in known:
        run_time = {parameter.name for parameter in kernel.params if not parameter.is_constexpr}
        floats = [name for name, *kind in filter(None, arguments) if name in run_time and kind[0][0] == "float"]
        assert not floats, (kernel.fn.__name__, floats)
    for key, result in known.items():
        # Names up to torch 2.12, and after: the dependences of each access.
        written.setdefault(key[0].fn.__name__, set()).update(
            result if isinstance(result, list) else (dependence.name for dependence in result.read_writes.writes)
        )
if FUSED:
    assert written["logits_packed_kernel"] == {"logits_ptr", "packed_ptr", "chosen_ptr"}, written
    assert written["gate_up_routed_kernel"] == {"act_ptr", "chosen_ptr"}, written
    assert written["down_routed_kernel"] == {"y_ptr", "trace_ptr"}, written
else:
    assert written["choose_experts_kernel"] == {"ids_ptr", "weights_ptr", "trace_ptr", "packed_ptr"}, written
    assert written["gate_up_packed_kernel"] == {"act_ptr"} and written["down_packed_kernel"] == {"y_ptr"}, written
assert written["_decode_kernel"] == {"state", "raw"} | ({"sums"} if FUSED else set()), written
assert written["gemv_kernel"] == {"y_ptr"}, written
limbs = {"limbs_ptr", "units_ptr"} if BATCH > 2 else set()  # of the tile, to which more rows go
assert written["_merge_kernel"] == {"out"} | limbs, written
if FUSED:
    assert written["gated_gemv_kernel"] == {"y_ptr", "conv_ptr"} and "_finish_kernel" not in written, written
else:
    assert written["_finish_kernel"] == {"out", "conv_state"} | limbs, written
"""
COMPILED = """
from collections import Counter

class Seen(Exception):
    pass

def backend(graph, inputs):
    raise Seen(Counter(str(node.target) for node in graph.graph.nodes if "moeexp" in str(node.target)))

whole = torch.compile
torch.compile = lambda module, *, fullgraph, options: whole(module, fullgraph=fullgraph, backend=backend)
layers = len(arch.layer_types)
with model.attached(state), torch.no_grad():
    module = methods.MODULES["decode"](model, ops).eval()
    try:
        methods.torch_compiled(module)(*methods.example_inputs("decode", batch=BATCH, device=torch.device("cpu")))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        (seen,) = error.inner_exception.args
assert seen["moeexp.moe_decode_routed.default" if FUSED else "moeexp.moe_decode.default"] == layers, seen
assert ("moeexp.gdn_decode_out.default" in seen) == FUSED, seen
"""

EXPORTED = """
from collections import Counter

program = methods.export_method("cond", model, ops, batch=BATCH, max_seq_len=64, state=state)
branches = [module for name, module in program.graph_module.named_children() if name.startswith("true_graph")]
seen = Counter(str(node.target) for branch in branches for node in branch.graph.nodes)
assert seen["moeexp.moe_decode_routed.default" if FUSED else "moeexp.moe_decode.default"] == len(arch.layer_types), seen
"""


def traced(script, model, batch, group, fused):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    said = f"MODEL, BATCH, GROUP, FUSED = {model!r}, {batch}, {group}, {fused}\n"
    done = subprocess.run([sys.executable, "-c", said + LOADED + script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch", "group", "fused"), [("nano", 1, 32, False), ("nano", 2, 32, True), ("tiny", 5, 64, False)]
)
def test_real_methods_need_few_analyses_and_hand_no_float_to_a_kernel(model, batch, group, fused):
    """With torch's own tracing, in a process without Triton's interpreter. Inductor types a float argument as float64, and
    then everything that it touches is computed so. What a kernel writes is seen past a barrier and within a branch."""
    traced(TRACED, model, batch, group, fused)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dynamo_traces_a_decode_step_whole_and_the_branches_of_a_condition(fused):
    """What torch.compile is given has every op; it reads no file, as the tuning table is, that the ops between them ask. Dynamo
    traces the branches of `torch.cond` for an export that is not its own as well."""
    traced(EXPORTED + COMPILED, "nano", 1, 32, fused)
