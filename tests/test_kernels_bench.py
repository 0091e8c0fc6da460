"""The kernel bench without its clock: that its cases are right, that a wrong op gets no time, and what it prints."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import kernels_common as common
import pytest
import torch
import torch.nn.functional as F
import yaml
from moeexp_kernels.bench import measure, table
from moeexp_kernels.bench.__main__ import main, measure_or_say
from moeexp_kernels.bench.candidates import chain_targets, head_target, targets
from moeexp_kernels.bench.case import SeededTensors, count_for, ratios, red
from moeexp_kernels.bench.cases import BUILDERS, Spec, build, specs
from moeexp_kernels.bench.layers import Layers
from moeexp_kernels.bench.peers import executorch, fla, humming, torch_int4, torch_ops
from moeexp_kernels.bench.peers.peer import WHOLE, delta_expected, delta_inputs
from moeexp_kernels.bench.shapes import FULL, MODELS
from moeexp_kernels.ops.linear import dequantise
from moeexp_kernels.parts import tuning

TINY = replace(
    FULL, vocab=300, hidden=64, heads=4, kv_heads=2, head_dim=16, rotary=8, gdn_k_heads=1, gdn_v_heads=4, gdn_k_dim=16,
    gdn_v_dim=16, experts=8, top_k=2, expert_width=32, shared_width=32, group=32, kv_lens=(5, 40), prefill=(20,),
)  # fmt: skip
INTERPRETED_TOLERANCE = 3e-2  # Triton's interpreter cuts bfloat16 where a GPU rounds


def case_of(spec: Spec, cold: int = 0):
    case = build(spec, TINY, common.DEVICE, cold)
    if case.tolerance:
        case.tolerance = max(case.tolerance, INTERPRETED_TOLERANCE)
    return case


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_those_of_the_model(name):
    path, shapes = Path(__file__).resolve().parents[1] / "conf" / "model" / f"{name}.yaml", MODELS[name]
    model = yaml.safe_load(path.read_text())["architecture"]
    names = {
        "vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim", "gdn_k_heads": "linear_num_key_heads", "gdn_v_heads": "linear_num_value_heads",
        "gdn_k_dim": "linear_key_head_dim", "gdn_v_dim": "linear_value_head_dim", "conv_width": "linear_conv_kernel_dim",
        "experts": "num_experts", "top_k": "num_experts_per_tok", "expert_width": "moe_intermediate_size",
        "shared_width": "shared_expert_intermediate_size",
    }  # fmt: skip
    assert {ours: getattr(shapes, ours) for ours in names} == {ours: model[theirs] for ours, theirs in names.items()}
    assert shapes.rotary == model["head_dim"] * model["partial_rotary_factor"]


def test_the_projections_are_as_wide_as_the_table_s_keys_say():
    assert FULL.linears()["gdn in"][:2] == (12_352, 2048) and FULL.linears()["attention in"][:2] == (9216, 2048)


CHAIN = replace(TINY, gdn_k_dim=32, gdn_v_dim=32, head_dim=32)


@pytest.mark.slow
@pytest.mark.parametrize("sequences, tokens", [(1, 1), (3, 1), (1, 2)])
def test_every_layer_of_the_chain_advances_its_state(sequences, tokens):
    chain = Layers(CHAIN, common.DEVICE, sequences, tokens)
    assert chain.x.shape[:2] == (sequences, tokens)
    before = [{name: tensor.clone() for name, tensor in layer.state.items()} for layer in chain.layers]
    assert chain.call(chain.x).isfinite().all()
    for was, layer in zip(before, chain.layers, strict=True):
        assert all(not torch.equal(was[name], now) for name, now in layer.state.items()), layer.kind
        for slot in range(512, 512 + tokens):
            assert layer.trace[-1, slot].unique().numel() == CHAIN.top_k, "a choice is traced where the token stands"


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_chain_s_targets_are_rows_it_asks_for_and_a_case_runs_with_each(sequences):
    shapes = replace(CHAIN, hidden=128, group=64, gdn_v_dim=64, head_dim=64, expert_width=64, shared_width=64)
    chain = Layers(shapes, common.DEVICE, sequences)
    asked = chain.rows()
    found = chain_targets(shapes, sequences, asked)
    once = {"gdn_decode", "router_gemv"}  # rows that serve several sequences too
    wanted = {"moe_gate_up_packed", "moe_down_packed"} | ({"gemv", *once} if sequences == 1 else {"linear_tile", "limbs"})
    assert {target.op for target in found} == wanted
    for target in found:
        assert (target.op, target.key) in asked and target.candidates
        (spec,) = target.specs
        case = build(spec, shapes, common.DEVICE, 0)
        with tuning.asked() as by_itself:
            case.call(**case.copies[0])
        assert (target.op, target.key) in by_itself, (spec, target.key)


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs(TINY, list(BUILDERS), [2], quick=False), ids=str)
def test_every_case_agrees_with_its_reference_and_names_rows_of_the_table(spec):
    case = case_of(spec)
    assert red(case.check()) is None
    assert case.moved > 0 and len(case.copies) >= 2
    for op, key in case.tuned:
        assert op == "gemv" or tuning.lookup(op, key, "sm_90"), (op, key)


@pytest.mark.parametrize(
    ("tokens", "op"),
    [
        pytest.param(1, "gemv", marks=pytest.mark.slow),
        (2, "linear_tile"),
        pytest.param(9, "linear_tile", marks=pytest.mark.slow),
        (33, "gemm"),
    ],
)
def test_a_linear_case_names_the_row_that_its_kernel_runs_with(tokens, op):
    case = build(Spec("linear", "decode", tokens, "gdn in"), replace(TINY, hidden=128, group=64), common.DEVICE, 0)
    case.tolerance = INTERPRETED_TOLERANCE
    with tuning.asked() as asked:
        assert red(case.check()) is None
    assert [name for name, _ in case.tuned] == [op] and set(case.tuned) <= asked


@pytest.mark.parametrize(("sequences", "op"), [pytest.param(1, "gemv", marks=pytest.mark.slow), (3, "linear_tile"), (40, "gemm")])
def test_a_head_s_target_is_the_row_that_its_kernel_runs_with(sequences, op):
    shapes = replace(TINY, hidden=128, group=64)
    target = head_target(shapes, sequences, common.DEVICE)
    case = build(*target.specs, shapes, common.DEVICE, 0)
    with tuning.asked() as asked:
        case.call(**case.copies[0])
    assert target.op == op and (target.op, target.key) in asked and target.key.endswith("40") == (sequences == 40)
    row = tuning.lookup(op, target.key, "sm_90", rule=target.candidates[0])
    assert all(change.keys() <= row.keys() for change in target.candidates)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear", "gdn", "moe", "attention", "router", "sample", "rope"])
def test_a_wrong_op_is_red_and_gets_no_time(op, monkeypatch):
    spec = specs(TINY, [op], [2], quick=True)[0]
    case, right = case_of(spec), BUILDERS[op]
    assert right is not None
    call = case.call

    def wrong(**arguments):
        out = call(**arguments)
        first = out[0] if isinstance(out, tuple) else out
        first += first.abs().amax().to(first.dtype) // 2 + 1 if not first.is_floating_point() else first.abs().amax()
        return out

    case.call = wrong
    monkeypatch.setattr(measure, "graph_samples", lambda *_, **__: pytest.fail("a wrong op was timed"))
    row = measure.measure(case, reader=None, arch="sm_90")
    assert row.problem and row.us is None
    assert "no time" in table.line(row)


def test_an_op_that_raises_is_a_row_that_says_so(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of\nresource")

    monkeypatch.setattr("moeexp_kernels.bench.__main__.build", broken)
    row = measure_or_say(Spec("linear", "decode", 1, "head"), 0, None, "sm_90")
    assert row.us is None and row.problem == "RuntimeError: out of resource"


def test_a_wrong_peer_gets_no_time(monkeypatch):
    case = case_of(specs(TINY, ["attention"], [1], quick=True)[0])
    peer = torch_ops.attention(case)
    assert red(peer.check()) is None
    call = peer.call
    peer.call = lambda copy: call(copy) * 1.1
    monkeypatch.setattr(measure, "graph_samples", lambda *_, **__: pytest.fail("a wrong peer was timed"))
    row = measure.measure_peer("torch", peer, "decode")
    assert row.us is None and row.problem


@pytest.mark.parametrize("spec", [s for s in specs(TINY, ["attention", "sample", "linear"], [2], quick=False)], ids=str)
def test_torch_as_a_peer_is_right(spec):
    case = case_of(spec)
    for make in torch_ops.OPS[case.op]:
        peer = make(case)
        assert peer is None or red(peer.check()) is None


def test_a_peer_that_raises_is_a_line_and_not_the_end(monkeypatch):
    def broken(case):
        raise OSError("no such\nkernel")

    monkeypatch.setitem(torch_ops.OPS, "sample", [broken])
    absent = {name: "not installed" for name in measure.SOURCES if name != "torch"}
    rows = measure.measure_peers(case_of(Spec("sample", "decode", 1)), absent)
    assert [(row.name, row.problem) for row in rows] == [("broken", "OSError: no such kernel")]


def test_codes_reach_the_peers_in_their_own_layout():
    """Both layouts unpacked by their definition give the weights that ours dequantises to."""
    weight, scales = SeededTensors(common.DEVICE).weight(6, 64, bits=4, group=16)
    scale, shift = (part.float().repeat_interleave(16, 1) for part in scales.unbind(-1))
    codes = torch_int4.natural_codes(weight, 16).float()
    ours = dequantise(weight=weight, scales=scales, in_features=64)
    common.assert_close_ratio((codes - 8) * scale + shift, ours, 1e-6)
    pairs, peer_scales = executorch.symmetric(weight, scales, 16)
    assert torch.equal(peer_scales.float(), scales[..., 0].float()), "scales are drawn so that bfloat16 holds them"
    unsigned = pairs.view(torch.uint8)
    theirs = torch.stack([unsigned & 0xF, unsigned >> 4], dim=-1).flatten(1).float()
    symmetric = dequantise(weight=weight, scales=executorch.without_shift(scales), in_features=64)
    common.assert_close_ratio((theirs - 8) * scale, symmetric, 1e-6)


def test_codes_go_into_words_from_the_lowest_bits_on():
    codes = torch.randint(0, 16, (3, 32), dtype=torch.uint8)
    found = humming.words(codes)
    assert found.dtype == torch.int32 and found.shape == (3, 4)
    assert torch.equal(torch.stack([found >> 4 * i & 15 for i in range(8)], -1).flatten(1), codes.int())


@pytest.mark.parametrize("spec", [Spec("gdn", "decode", 2), Spec("gdn", "prefill", 20)], ids=str)
def test_what_delta_rule_peers_get_is_what_our_op_computes(spec):
    """Their inputs, the rule, then the gated norm: our op's output, so that they are timed on the same problem."""
    from moeexp_kernels.ops.gated_delta_reference import gated_norm

    case = case_of(spec)
    arguments = case.copies[0]
    o, state = delta_expected(arguments, delta_inputs(arguments))
    hv, dv = arguments["num_v_heads"], arguments["head_v_dim"]
    z = arguments["proj"][..., TINY.channels : TINY.channels + hv * dv].float().unflatten(-1, (hv, dv))
    y = gated_norm(o.transpose(1, 2), z, arguments["norm_weight"], arguments["eps"])
    fresh = {k: v.clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    common.assert_close_ratio(y, case.reference(**fresh).float(), 2e-2)
    common.assert_close_ratio(state, fresh["recurrent_state"], 2e-2)


class StandInFla:
    """flash-linear-attention's functions that the adapter calls: its layouts and conventions, in plain torch, by definition.

    Also refuses what the library would copy first, unseen: the peer would be timed with copies that it need not make."""

    @staticmethod
    def uncopied(**tensors):
        copied = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
        assert not copied, f"the library would copy {copied}"

    def causal_conv1d(self, *, x, weight, initial_state, output_final_state, activation):
        self.uncopied(weight=weight, initial_state=initial_state)
        width = weight.shape[1]
        assert initial_state.shape == (x.shape[0], x.shape[2], width) and activation == "silu" and output_final_state
        inputs = torch.cat([initial_state[..., 1:], x.transpose(1, 2)], dim=-1)
        y = F.conv1d(inputs.float(), weight.float()[:, None], groups=x.shape[2])
        return F.silu(y).transpose(1, 2).to(x.dtype).contiguous(), inputs[..., -width:].contiguous()

    def causal_conv1d_update(self, *, x, cache, weight, activation):
        y, state = StandInFla.causal_conv1d(
            self, x=x, weight=weight, initial_state=cache, output_final_state=True, activation=activation
        )
        cache.copy_(state)
        return y, cache

    def chunk_gated_delta_rule(
        self, *, q, k, v, g, beta, A_log, dt_bias, initial_state, output_final_state, **switches
    ):  # fmt: skip
        self.uncopied(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
        names = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
        assert output_final_state and switches == dict.fromkeys(names, True)
        ratio, state, outputs = v.shape[2] // q.shape[2], initial_state.clone(), []
        decay = (-A_log.exp() * F.softplus(g.float() + dt_bias)).exp()
        for t in range(q.shape[1]):
            q_t, k_t = (F.normalize(x[:, t].float(), dim=-1).repeat_interleave(ratio, 1) for x in (q, k))
            state = state * decay[:, t, :, None, None]
            delta = beta[:, t, :, None].float().sigmoid() * (v[:, t].float() - (k_t[..., None] * state).sum(-2))
            state = state + k_t[..., None] * delta[..., None, :]
            outputs.append((q_t[..., None] * state).sum(-2) * q.shape[-1] ** -0.5)
        return torch.stack(outputs, 1).to(v.dtype), state

    def fused_recurrent_gated_delta_rule(self, **arguments):
        return StandInFla.chunk_gated_delta_rule(self, **arguments)

    def rms_norm_gated(self, x, g, weight, bias, *, activation, eps):
        self.uncopied(x=x, g=g, weight=weight)
        assert bias is None and activation == "silu"
        return (F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps) * F.silu(g.float())).to(x.dtype)

    def install(self, monkeypatch):
        modules = {
            "ops.gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
            "modules.convolution": ("causal_conv1d", "causal_conv1d_update"),
            "modules.fused_norm_gate": ("rms_norm_gated",),
        }
        for parent in ("fla", "fla.ops", "fla.modules"):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for path, names in modules.items():
            module = ModuleType(f"fla.{path}")
            for name in names:
                setattr(module, name, getattr(self, name))
            monkeypatch.setitem(sys.modules, module.__name__, module)


def install_library(monkeypatch):
    """The library itself, in Triton's interpreter where there is no GPU: untuned there, and with its token loop in place of
    its chunks, whose kernels call methods of what the interpreter holds as plain integers."""
    if common.DEVICE != "cpu":
        return
    import fla.ops.gated_delta_rule as rules
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def untuned(self, *arguments, **options):
        monkeypatch.setattr(self, "configs", self.configs[:1])
        return run(self, *arguments, **options)

    monkeypatch.setattr(Autotuner, "run", untuned)
    monkeypatch.setattr(rules, "chunk_gated_delta_rule", rules.fused_recurrent_gated_delta_rule)


DELTA_SPECS = [Spec("gdn", "decode", 1), Spec("gdn", "decode", 2), Spec("gdn", "prefill", 2), Spec("gdn", "prefill", 20)]


@pytest.mark.parametrize("library", ["stand-in", *(["installed"] if find_spec("fla") else [])])
@pytest.mark.parametrize("spec", DELTA_SPECS, ids=str)
def test_flash_linear_attention_as_a_peer_is_right_and_stays_so_when_called_again(library, spec, monkeypatch):
    StandInFla().install(monkeypatch) if library == "stand-in" else install_library(monkeypatch)
    case = case_of(spec)
    before = [{k: v.clone() for k, v in copy.items() if torch.is_tensor(v)} for copy in case.copies]
    rule, whole = (make(case) for make in fla.OPS["gdn"])
    assert "no conv" in rule.covers and whole.covers == WHOLE
    for peer in (rule, whole):
        first = peer.check()
        assert red(first) is None
        for _ in range(6):
            for copy in peer.copies:
                out = peer.call(copy)
        assert all(torch.isfinite(tensor).all() for tensor in out)
        assert peer.check() == first
    assert len(first) >= 3, "output, recurrent state, conv state"
    for copy, old in zip(case.copies, before, strict=True):
        assert all(torch.equal(copy[name], old[name]) for name in old), "another peer would start from other inputs"


@pytest.mark.parametrize("spec", DELTA_SPECS[1:3], ids=str)
def test_the_new_state_of_a_peer_stays_so_that_the_next_call_writes_elsewhere(spec, monkeypatch):
    StandInFla().install(monkeypatch)
    for make in fla.OPS["gdn"]:
        peer = make(case_of(spec))
        states = [weakref.ref(peer.call(copy)[1]) for copy in peer.copies]
        assert all(state() is not None for state in states)


def no_update(self, *, x, cache, weight, activation):
    return StandInFla.causal_conv1d_update(self, x=x, cache=cache.clone(), weight=weight, activation=activation)[0], cache


def no_gate(self, x, g, weight, bias, *, activation, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def old_state(self, *, initial_state, **arguments):
    return StandInFla.chunk_gated_delta_rule(self, initial_state=initial_state, **arguments)[0], initial_state


@pytest.mark.parametrize("spec", DELTA_SPECS[:2], ids=str)
@pytest.mark.parametrize(
    ("function", "broken", "output"),
    [
        ("causal_conv1d_update", no_update, 2),
        ("rms_norm_gated", no_gate, 0),
        ("fused_recurrent_gated_delta_rule", old_state, 1),
    ],
)
def test_a_peer_that_leaves_out_work_of_the_whole_op_gets_no_time(function, broken, output, spec, monkeypatch):
    library = type("Broken", (StandInFla,), {function: broken})()
    library.install(monkeypatch)
    monkeypatch.setattr(measure, "graph_samples", lambda *_, **__: pytest.fail("a wrong peer was timed"))
    row = measure.measure_peer(fla.NAME, fla.whole_op(case_of(spec)), spec.phase)
    assert row.us is None and row.problem.startswith(f"output {output}")


def test_no_memory_is_met_again_before_the_cache_has_turned_over():
    assert count_for(100, 30) * 30 >= 100 + 30
    assert count_for(0, 10) == 2
    case = case_of(Spec("linear", "decode", 1, "out"), cold=20_000)
    pointers = {copy["weight"].data_ptr() for copy in case.copies}
    size = case.copies[0]["weight"].nbytes + case.copies[0]["scales"].nbytes
    assert len(pointers) == len(case.copies) and (len(pointers) - 1) * size >= 20_000


def test_decode_calls_walk_through_disjoint_experts():
    case = case_of(Spec("moe", "decode", 2), cold=10**6)
    first, second = (case.copies[i]["ids"].flatten().tolist() for i in (0, 1))
    assert len(set(first + second)) == 2 * 2 * TINY.top_k


def test_every_candidate_completes_a_row_of_the_table():
    fields = {}
    for target in targets(list(BUILDERS)):
        row = tuning.lookup(target.op, target.key, "sm_90", rule=target.candidates[0])
        fields.setdefault(target.op, set(row))
        for change in target.candidates:
            assert set({**row, **change}) == fields[target.op], (target.op, change)
        for spec in target.specs:
            assert spec.op in BUILDERS
    assert {"gemv", "moe_gate_up_packed", "moe_down_packed", "gdn_decode", "attention_decode"} <= set(fields)


def test_ratios_see_one_bad_row_and_a_value_that_is_not_finite():
    good = common.randn(400, 16, seed=1)
    bad = good.clone()
    bad[7] *= 1.2
    name, ratio, tolerance, worst = ratios("y", bad, good, 4e-2)
    assert ratio < tolerance and worst > 0.19
    assert red([ratios("y", bad, good, 1.5e-2)]) is not None
    bad[7, 0] = float("nan")
    assert red([ratios("y", bad, good, 1.0)]) is not None


def row_of(**changes) -> measure.OpTiming:
    values = {
        "op": "linear", "shape": "out 8x8", "phase": "decode", "tokens": 1, "moved": 4_000_000, "flops": 100, "check": [],
        "us": 2.0, "samples": [2.0], "read_us": 1.5, "share": 0.625,
    }  # fmt: skip
    return measure.OpTiming(**(values | changes))


def test_the_table_and_the_json_say_what_was_measured(tmp_path):
    peers = [
        measure.PeerTiming("torch", "mm", "the product", us=3.04),
        measure.PeerTiming("gemlite", "gemv", "the product", problem="output 0: RMSE ratio 1.0e+00"),
        measure.PeerTiming("fla", "norm + mm", WHOLE, us=5.0),
    ]
    rows = [row_of(peers=peers), row_of(phase="prefill", flops=4_000_000_000, us=20.0), row_of(us=None, problem="y: red")]
    environment = {
        "gpu": "G", "driver": "1", "torch": "2", "triton": "3", "table": "sm_90", "read_tb_s": 3.2, "command": "bench",
    }  # fmt: skip
    text = table.markdown(rows, environment, {"flash-linear-attention": "No module named 'fla'"})
    assert "| linear | out 8x8 | 1 | 2.0 | 4.0 | 2.00 | 62 % | 1.5 | fla `norm + mm` 5.0, torch `mm` 3.0 (part), " in text
    assert "gemlite `gemv`: no time (output" in text
    assert "| 1 prefill | 20.0 | 4.0 | 0.20 | 200 TFLOP/s |" in text
    assert "no time: y: red" in text
    assert "* flash-linear-attention is not here: No module named 'fla'." in text and "* torch `mm` does the product." in text
    assert text.count("norm + mm") == 1, "of a peer that does all of the work there is nothing to say below"
    assert "\n(part): that peer does only this of the op's work" in text and text.index("(part): ") < text.index("* torch `mm`")
    assert "(part)" not in table.markdown([row_of(peers=peers[2:])], environment, {})
    table.write_json(tmp_path / "out.json", rows, environment, {})
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rows"][0]["peers"][0]["us"] == 3.04 and document["rows"][2]["problem"] == "y: red"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], "--jobs=0"),
        (["gdm"], "gdm"),
        (["--tokens", "0"], "--tokens=0"),
        (["tune", "x"], "'x'"),
        (["linear", "--layers"], "--layers"),
        (["layers", "--model", "x"], "--model=x"),
        (["linear", "--model", "qwen3_5_122b_a10b"], "--model belongs to"),
        (["instructions", "--arch", "sm_9"], "--arch=sm_9"),
        (["instructions"], "TRITON_INTERPRET"),
        (["layers", "--arch", "sm_90"], "--arch belongs to"),
        (["layers"], "CUDA"),
        ([], "CUDA"),
    ],
)
def test_what_cannot_run_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0]
