"""The compiled methods themselves: two AOTInductor compiles of `nano`, shared by all quick tests here and by all workers."""

import contextlib
import json
import math
import os
import zipfile
from dataclasses import replace

import common
import pytest
import torch
from moeexp_kernels import registry
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moeexp.check.traces import record_trace
from moeexp.config.compose import compose
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.config.resolve import resolve
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.model.weights import Random, load, unfilled
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.stack import compile_cache
from moeexp.stack.compile_cache import cache_dir
from moeexp.stack.compilers import Compilers
from moeexp.stack.factory import build_model, build_stack
from moeexp.stack.methods import export_method
from moeexp.stack.packages import names_in

# Three of nano's four layers: a layer behind one of its own kind, and behind one of the other. A compile is as long as its graph.
LAYERS = ["linear_attention", "linear_attention", "full_attention"]
BASE = ["model=nano", "quant=int4", "max_seq_len=160", f"model.architecture.layer_types=[{','.join(LAYERS)}]"]
BASE += [f"model.architecture.num_hidden_layers={len(LAYERS)}"]


@pytest.fixture(scope="module")
def cfg():
    return resolve(compose([*BASE, "export=aoti"]), cuda_available=False)


@pytest.fixture(scope="module")
def phases(tmp_path_factory, cfg):
    record = Record(tmp_path_factory.mktemp("run") / "record.json", id="t", config=cfg, command=["test"])
    return Phases(record, Console(quiet=True))


@pytest.fixture(scope="module")
def model(cfg, phases):
    return build_model(cfg, phases)


@pytest.fixture(scope="module")
def compiled(cfg, model, phases, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers: who comes second waits for the first one's packages
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEEXP_CACHE_DIR", str(base / "compiled"))
        yield build_stack(cfg, model, phases)


def tokens(n, seed=0):
    return torch.randint(0, 256, (1, n), generator=torch.Generator().manual_seed(seed))


def traces_of_both(cfg, model, phases, compiled, prompt, new_tokens):
    fast = record_trace(compiled, prompt, new_tokens)
    eager = build_stack(cfg, model, phases, export="eager")
    forced = torch.cat([fast.token_ids[:, prompt.shape[1] :], fast.next_token[:, None]], 1)
    slow = record_trace(eager, prompt, new_tokens, forced=forced)
    return fast, slow


def test_compiled_equals_eager_at_any_prompt_length(cfg, model, phases, compiled):
    """One test: workers beside each other would compile for each."""
    for length in (1, 2, 63, 64, 65, 129):
        fast, slow = traces_of_both(cfg, model, phases, compiled, tokens(length, seed=length), 4)
        where = f"length {length}"
        torch.testing.assert_close(fast.logits, slow.logits, rtol=0, atol=1e-4, msg=where)
        assert torch.equal(fast.expert_ids, slow.expert_ids), where
        for name in slow.states:
            torch.testing.assert_close(fast.states[name], slow.states[name], rtol=0, atol=1e-4, msg=f"{where}: {name}")


def test_methods_share_weights_and_state_with_the_model(model, compiled):
    """Seen through the methods, not the bookkeeping: a weight written in place changes both, state goes from one to
    the other, and no vector was frozen into the code."""
    prompt = tokens(5)
    compiled.session.reset()
    before = compiled.session.prefill(prompt).clone()
    step_before = compiled.session.decode(prompt[:, :1]).clone()
    for name in ("layers.0.mixer.a_log", "layers.0.mixer.dt_bias", "layers.2.mixer.q_norm", "inv_freq", "norm"):
        buffer = model.get_buffer(name)
        kept = buffer.clone()
        buffer.mul_(0.5).add_(0.25)
        compiled.session.reset()
        prefill_changed = not torch.equal(compiled.session.prefill(prompt), before)
        decode_changed = not torch.equal(compiled.session.decode(prompt[:, :1]), step_before)
        buffer.copy_(kept)
        assert prefill_changed and decode_changed, name
    compiled.session.reset()
    assert torch.equal(compiled.session.prefill(prompt), before)
    assert torch.equal(compiled.session.decode(prompt[:, :1]), step_before)


@pytest.mark.slow
def test_unbound_method_refuses_to_run(compiled):
    from moeexp_runner.binding import CompiledMethod

    artifact = compiled.artifacts["decode"]
    method = CompiledMethod(artifact.package, artifact.constants, device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="bind"):
        method(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_binding_refuses_everything_that_does_not_fit(compiled):
    from moeexp_runner.binding import CompiledMethod

    artifact = compiled.artifacts["decode"]
    method = CompiledMethod(artifact.package, artifact.constants, device=torch.device("cpu"))
    with compiled.model.attached(compiled.arena.tensors):
        right = {name: compiled.model.get_buffer(name.removeprefix("model.")) for name in artifact.constants}
    head, norm = "model.head.weight", "model.norm"
    wrong = {
        "shape": right | {norm: right[norm][:-1]},
        "dtype": right | {norm: right[norm].double()},
        "stride": right | {head: right[head].t().contiguous().t()},
        "missing": {name: tensor for name, tensor in right.items() if name != norm},
        "not a constant": right | {"model.extra": right[norm]},
        "meta": right | {norm: right[norm].to("meta")},
    }
    for word, tensors in wrong.items():
        with pytest.raises(ValueError, match=word):
            method.bind(tensors)
        assert not method.bound
    method.bind(right)


@pytest.mark.slow
def test_second_build_compiles_nothing(cfg, model, phases, compiled, monkeypatch):
    assert all(artifact.compile_s > 0 for artifact in compiled.artifacts.values())  # here or by another worker
    folder = compiled.artifacts["decode"].package.parent.parent.parent
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(folder))
    assert cache_dir() == folder
    monkeypatch.setattr("moeexp.stack.packages.export_method", lambda *a, **k: pytest.fail("exported again"))
    again = build_stack(cfg, model, phases)
    assert all(artifact.cached for artifact in again.artifacts.values())
    prompt = tokens(9)
    compiled.session.reset()
    assert torch.equal(again.session.prefill(prompt), compiled.session.prefill(prompt))
    assert math.isfinite(float(again.session.decode(prompt[:, :1]).sum()))


@pytest.mark.slow
def test_processes_of_their_own_make_the_same_packages(cfg, model, phases, compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path))
    with Compilers([cfg]) as compilers:
        monkeypatch.setattr("moeexp.stack.packages.export_method", lambda *a, **k: pytest.fail("exported here"))
        apart = build_stack(cfg, model, phases, made_ahead=compilers.join)
    for name, here in compiled.artifacts.items():
        there = apart.artifacts[name]
        assert (there.key, there.constants, there.cached) == (here.key, here.constants, False) and there.compile_s > 0
        found, made = (json.loads(one.package.with_name("manifest.json").read_text()) for one in (here, there))
        own = {"compile_s": None, "package_sha256": None}
        assert found | own == made | own and libraries(here.package) == libraries(there.package)
    prompt = tokens(9)
    expected, ids = compiled.session.generate(prompt, 8), apart.session.generate(prompt, 8)
    assert torch.equal(torch.as_tensor(ids), torch.as_tensor(expected))
    with Compilers([cfg]) as compilers:
        assert not any(compilers.join(artifact.key) for artifact in apart.artifacts.values()), "nothing was missing"


def libraries(package):
    with zipfile.ZipFile(package) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith(".so")]


SMALL = replace(common.EVEN, linear_value_head_dim=16)
TIED = replace(SMALL, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("arch", "method", "bits", "explicit"),
    [
        (SMALL, "prefill", 4, False),
        (TIED, "decode", 16, True),
        pytest.param(TIED, "decode", 4, False, marks=pytest.mark.slow),
        pytest.param(SMALL, "cond", 4, True, marks=pytest.mark.slow),
    ],
)
def test_shapes_without_storage_export_as_weights_do(arch, method, bits, explicit):
    """The same graph, of the same constants."""
    layout = {"dtype": torch.float32, "device": torch.device("cpu"), "bits": bits, "group_size": 16, "skip": NEVER_QUANTISED}
    shapes = state_shapes(arch, batch=2, max_seq_len=32, dtype=torch.float32)
    programs = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            fake = isinstance(mode, FakeTensorMode)
            model = unfilled(arch, **layout) if fake else load(arch, Random(arch, 0), **layout)
            state = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        with model.attached({} if explicit else state):
            program = export_method(
                method, model, common.reference_ops(), batch=2, max_seq_len=32, state=state if explicit else None
            )
        tensors = [*program.state_dict.values(), *program.constants.values()]
        assert all(isinstance(tensor, FakeTensor) == fake for tensor in tensors)
        programs.append((str(program.graph), compile_cache._constants(program), str(program.range_constraints)))
    assert programs[0] == programs[1]


@pytest.mark.slow
def test_a_tied_head_is_one_constant(phases, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path))
    tied = ["model=nano", "quant=none", "dispatch=token_by_token", "model.architecture.tie_word_embeddings=true"]
    cfg = resolve(compose([*tied, "max_seq_len=160", "export=aoti"]), cuda_available=False)
    model = build_model(cfg, phases)
    fast, slow = build_stack(cfg, model, phases), build_stack(cfg, model, phases, export="eager")
    assert len({"model.head.weight", "model.embed_tokens.weight"} & fast.artifacts["decode"].constants.keys()) == 1
    assert fast.session.generate(tokens(5), 8) == slow.session.generate(tokens(5), 8)


OTHERS = [
    "export=aoti dispatch=single",
    pytest.param("export=aoti dispatch=single state=explicit", marks=pytest.mark.slow),
    pytest.param("export=aoti dispatch=cond state=explicit", marks=pytest.mark.slow),
    pytest.param("export=aoti state=explicit", marks=pytest.mark.slow),
    pytest.param("export=compile", marks=pytest.mark.slow),
    pytest.param("export=compile dispatch=cond state=explicit", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OTHERS)
def test_compiled_methods_of_other_axes_equal_eager(model, phases, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path))
    cfg = resolve(compose([*BASE, *overrides.split()]), cuda_available=False)
    fast, slow = build_stack(cfg, model, phases), build_stack(cfg, model, phases, export="eager")
    for length in (1, 9, 65):
        prompt = tokens(length, seed=length)
        ours = record_trace(fast, prompt, 4)
        forced = torch.cat([ours.token_ids[:, length:], ours.next_token[:, None]], 1)
        theirs = record_trace(slow, prompt, 4, forced=forced)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
        for name in theirs.states:
            torch.testing.assert_close(ours.states[name], theirs.states[name], rtol=0, atol=1e-4, msg=name)


def test_a_package_depends_on_the_ops_that_its_method_has():
    """A prefill method is compiled once for decode steps of every kind, and the other way round."""

    def names(method, **chosen):
        resolved = registry.resolve(default="triton", chosen=chosen, device="cuda")
        return names_in(method, resolved)

    assert names("prefill", gdn_decode="chunked") == names("prefill")
    assert names("decode", gdn_decode="chunked") != names("decode")
    assert names("cond", gdn_decode="chunked") != names("cond")
    assert names("decode", moe_prefill="reference") == names("decode")
    assert names("prefill", router="reference") != names("prefill")
    assert "sample" not in names("forward")


@pytest.mark.slow
def test_dynamo_makes_symbols_of_the_marked_lengths_alone(cfg, model, phases, monkeypatch):
    """All methods are one function to it, and prefill and decode have different inputs at the same places: what differs there
    must not become a symbol, of the state above all."""
    graphs, torch_compile = [], torch.compile

    def keep(graph, inputs, options=None):
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        graphs.append([(tuple(x.shape), x.dtype) for x in values if isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **options: torch_compile(module, backend=keep, **options))
    explicit = replace(cfg, state="explicit")
    stack = build_stack(explicit, model, phases, export="compile")
    built = len(graphs)
    expected = build_stack(explicit, model, phases, export="eager").session.generate(tokens(21), 3)
    assert stack.session.generate(tokens(21), 3) == expected
    stack.session.generate(tokens(33), 3)
    assert len(graphs) <= built + 3, "another prompt length is no other version"
    assert any(isinstance(size, torch.SymInt) for shapes in graphs for shape, _ in shapes for size in shape)
    for shapes in graphs:
        symbolic = [(shape, dtype) for shape, dtype in shapes if any(isinstance(size, torch.SymInt) for size in shape)]
        assert all(dtype == torch.int64 for _, dtype in symbolic), symbolic  # tokens, and the rows of logits that are wanted
    stack.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", ["dispatch=dual", "dispatch=single", "dispatch=cond state=explicit", "dispatch=token_by_token"]
)
def test_what_torch_compile_makes_of_the_methods_is_made_in_their_phase(model, phases, monkeypatch, overrides):
    """A prompt and its decode steps compile nothing more: a check or a benchmark would be charged with it."""
    graphs, torch_compile = [], torch.compile

    def keep(graph, inputs, options=None):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda module, **options: torch_compile(module, backend=keep, **options))
    cfg = resolve(compose([*BASE, "export=compile", *overrides.split()]), cuda_available=False)
    stack = build_stack(cfg, model, phases)
    built = len(graphs)
    assert built > 0
    stack.session.generate(tokens(21), 3)
    assert len(graphs) == built
