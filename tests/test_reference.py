"""The layer-major reference equals the whole transformers model, and replays expert choices."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from reference_model import ARCHITECTURE, ModelWeights, build_model, config_of, run_model, tokens
from torch import nn

from moeexp.check import reference as reference_module
from moeexp.check.pure_torch import (
    KERNEL_FUNCTIONS,
    assert_pure_torch,
    full_precision,
    modeling,
    pure_torch,
    torch_functions,
)
from moeexp.check.reference import SINGLE_STEPS, generate_reference, run_reference
from moeexp.record import free_memory

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return build_model()


def reference(model, ids, prompt_len, dtype=torch.float32, **options):
    return run_reference(config_of(ARCHITECTURE), ModelWeights(model), ids, prompt_len, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("prompt_len", [1, 2, 7, 17, 20])
@pytest.mark.parametrize("alike", [True, False], ids=["in the same calls", "in a call for each token"])
def test_equals_the_whole_model_stepwise(model, prompt_len, alike):
    ids = tokens(2, 20)
    run = reference(model, ids, prompt_len)
    trace = run_model(model, ids, max(prompt_len, 20 - SINGLE_STEPS) if alike else prompt_len)
    close = {"rtol": 1e-5, "atol": 5e-6} if alike else {"rtol": 1e-4, "atol": 5e-5}  # another order of the same sums
    torch.testing.assert_close(run.logits(0, 20), trace.logits, **close)
    assert torch.equal(run.expert_ids, trace.expert_ids)
    assert run.states.keys() == trace.states.keys() and len(run.states) == 10
    for name, state in trace.states.items():
        assert run.states[name].shape == state.shape
        torch.testing.assert_close(run.states[name], state, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_equals_one_forward_of_the_whole_model(model):
    ids = tokens(2, 70)  # more than one chunk of 64 of the delta rule
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(reference(model, ids, 66).logits(0, 70), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, {"rtol": 1e-5, "atol": 5e-6}), (torch.bfloat16, {"rtol": 0, "atol": 0.04})]
)
def test_full_attention_in_pieces_of_queries_is_the_same(model, monkeypatch, dtype, close):
    """Of 20 positions, 16 in one call of all: here in pieces of 3, none of which holds more scores than it may. Experts see the
    16 at once all the same, and so do norms."""
    ids, called, routed = tokens(2, 20), [], []
    mask, hook = reference_module._causal_mask, reference_module._Routing.hook
    monkeypatch.setattr(reference_module, "_causal_mask", lambda *a: called.append(a[:2]) or mask(*a))

    def counted(self, gate, args, output):
        routed.append((self.start, self.stop, len(args[0])))
        return hook(self, gate, args, output)

    monkeypatch.setattr(reference_module._Routing, "hook", counted)
    calls = [(0, 16, 2 * 16), *((i, i + 1, 2) for i in range(16, 20))]
    whole = reference(model, ids, 12, dtype)
    layers = ARCHITECTURE.layer_types.count("full_attention")
    assert called == layers * [(0, 16)] and routed == len(ARCHITECTURE.layer_types) * calls
    called.clear()
    routed.clear()
    monkeypatch.setattr(reference_module, "SCORES", 3 * 20 * 2 * ARCHITECTURE.num_attention_heads)
    pieces = reference(model, ids, 12, dtype, expert_ids=whole.expert_ids)
    assert called == layers * [(0, 3), (3, 6), (6, 9), (9, 12), (12, 15)], "the last piece is a single query"
    assert routed == len(ARCHITECTURE.layer_types) * calls
    torch.testing.assert_close(pieces.logits(0, 20), whole.logits(0, 20), **close)
    for name, state in whole.states.items():
        torch.testing.assert_close(pieces.states[name], state, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "device, free, scores",
    [
        ("cuda", 100 << 30, 1 << 31),
        ("cuda", 48 << 30, 1 << 31),
        ("cuda", 24 << 30, 1 << 30),
        ("cuda", 15 << 30, (15 << 30) // 24),
        ("cuda", 1 << 30, 1 << 28),  # then torch says what did not fit
        ("cuda", -1 << 30, 1 << 28),
        ("cuda", None, 1 << 31),
        ("cpu", 1 << 30, 1 << 31),
    ],
)
def test_scores_of_a_piece_take_at_most_half_of_a_gpus_free_memory(monkeypatch, device, free, scores):
    used = 20 << 30
    monkeypatch.setattr(free_memory, "of_device", {"cuda": None if free is None else free + used}.get)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: used)
    assert reference_module._scores(torch.device(device)) == scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_delta_net_in_pieces_of_whole_chunks_is_the_same(model, monkeypatch, dtype):
    """Of two sequences of 200 positions, 196 in one call: here 64 at a time, each from the state that the one before left."""
    ids, lengths = tokens(2, 200), []
    forward = reference_module._DeltaInPieces.forward

    def counted(self, hidden_states, *arguments, **options):
        lengths.append([piece.shape[1] for piece in hidden_states.split(self.most, dim=1)])
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(reference_module._DeltaInPieces, "forward", counted)
    whole = reference(model, ids, 150, dtype)
    layers = ARCHITECTURE.layer_types.count("linear_attention")
    assert lengths == layers * [[196], [1], [1], [1], [1]]
    lengths.clear()
    monkeypatch.setattr(reference_module, "DELTA_POSITIONS", 2 * 100)
    pieces = reference(model, ids, 150, dtype, expert_ids=whole.expert_ids)
    assert lengths == layers * [[64, 64, 64, 4], [1], [1], [1], [1]]
    close = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.05}  # matmuls of another shape
    torch.testing.assert_close(pieces.logits(0, 200), whole.logits(0, 200), **close)
    for name, state in whole.states.items():
        torch.testing.assert_close(pieces.states[name], state, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_of_a_slice_and_shapes(model):
    run = reference(model, tokens(2, 9), 4)
    assert run.hidden.shape == (2, 9, 32) and run.router_logits.shape == (5, 2, 9, 8)
    assert run.router_logits.dtype == torch.float32 and torch.isfinite(run.router_logits).all()
    assert run.states["layers.0.conv_state"].shape == (2, 64, 3)
    assert run.states["layers.1.k_cache"].shape == (2, 2, 9, 16)
    torch.testing.assert_close(run.logits(3, 6), run.logits(0, 9)[:, 3:6], rtol=1e-6, atol=1e-6)


def test_bfloat16_is_transformers_in_bfloat16(model):
    ids = tokens(1, 12)
    half = build_model().to(torch.bfloat16)
    half.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq  # from_pretrained keeps it float32; .to() does not
    trace, run = run_model(half, ids, 5), reference(model, ids, 5, dtype=torch.bfloat16)
    assert run.hidden.dtype == torch.bfloat16 and run.states["layers.0.recurrent_state"].dtype == torch.float32
    assert torch.equal(run.expert_ids, trace.expert_ids)
    # One bf16 step of a logit near 4 is 0.016: the same roundings, apart from the last matmul's shape.
    torch.testing.assert_close(run.logits(0, 12), trace.logits.float(), rtol=0, atol=0.04)


def test_replaying_own_choices_is_the_identity(model):
    ids = tokens(2, 11)
    run = reference(model, ids, 6)
    again = reference(model, ids, 6, expert_ids=run.expert_ids)
    assert torch.equal(again.hidden, run.hidden) and torch.equal(again.router_logits, run.router_logits)
    assert all(torch.equal(again.states[name], state) for name, state in run.states.items())


def test_a_replayed_choice_matches_an_independent_computation():
    """The last layer's MoE written out from its definition, with experts that the router did not choose."""
    model, ids = build_model(), tokens(1, 6)
    own = reference(model, ids, 4)
    choices = own.expert_ids.clone()
    choices[-1] = (own.expert_ids[-1] + 3) % 8
    run = reference(model, ids, 4, expert_ids=choices)
    assert torch.equal(run.expert_ids, choices)
    assert torch.equal(run.router_logits, own.router_logits)  # nothing before the last MoE changed
    layer, seen = model.model.layers[-1], {}
    layer.mlp.register_forward_hook(lambda module, args, output: seen.update(x=args[0], out=output))
    with torch.no_grad():
        whole = model(ids)
        hidden_before = own.hidden[0] - seen["out"][0]
        x = seen["x"][0]  # [T, D]
        expected = torch.zeros_like(x)
        for t in range(x.shape[0]):
            weight = torch.exp(x[t] @ layer.mlp.gate.weight.T)[choices[-1, 0, t]]
            for expert, w in zip(choices[-1, 0, t], weight / weight.sum(), strict=True):
                gate, up = (layer.mlp.experts.gate_up_proj[expert] @ x[t]).chunk(2)
                expected[t] += w * (layer.mlp.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        expected += torch.sigmoid(layer.mlp.shared_expert_gate(x)) * layer.mlp.shared_expert(x)
    torch.testing.assert_close(run.hidden[0], hidden_before + expected, rtol=1e-5, atol=1e-5)
    assert (run.logits(0, 6) - whole.logits).abs().max() > 0.1


def test_on_layer_is_called_after_each_layer(model):
    seen = []
    reference(model, tokens(1, 3), 2, on_layer=lambda i, n: seen.append((i, n)))
    assert seen == [(i, 5) for i in range(5)]


def test_weights_must_fill_a_layer_exactly(model):
    class Broken(ModelWeights):
        def __init__(self, model, change):
            super().__init__(model)
            self.change = change

        def layer(self, index):
            tensors = super().layer(index)
            self.change(tensors)
            return tensors

    def run(change):
        run_reference(config_of(ARCHITECTURE), Broken(model, change), tokens(1, 3), 2, dtype=torch.float32, device="cpu")

    with pytest.raises(ValueError, match=r"layer 0.*missing \['mlp.gate.weight'\]"):
        run(lambda t: t.pop("mlp.gate.weight"))
    with pytest.raises(ValueError, match=r"layer 0.*surplus \['mlp.gate.bias'\]"):
        run(lambda t: t.update({"mlp.gate.bias": torch.zeros(8)}))
    with pytest.raises(ValueError, match=r"layer 0.*mlp.gate.weight \(8, 31\) instead of \(8, 32\)"):
        run(lambda t: t.update({"mlp.gate.weight": torch.zeros(8, 31)}))


@pytest.mark.parametrize(
    ("ids", "prompt_len", "experts", "message"),
    [
        (torch.tensor([[1, 64]]), 1, None, "64"),
        (torch.tensor([[1, -1]]), 1, None, "-1"),
        (torch.tensor([[1, 2]]), 0, None, "prompt_len=0"),
        (torch.tensor([[1, 2]]), 3, None, "prompt_len=3"),
        (torch.tensor([1, 2]), 1, None, "batch"),
        (torch.tensor([[1, 2]]), 1, torch.zeros(5, 1, 2, 3), "expert_ids of shape"),
        (torch.tensor([[1, 2]]), 1, torch.full((5, 1, 2, 2), 8), "0..7"),
    ],
)
def test_refuses_bad_inputs(model, ids, prompt_len, experts, message):
    with pytest.raises(ValueError, match=message):
        reference(model, ids, prompt_len, expert_ids=experts)


def fused(name: str):
    """What transformers binds where flash-linear-attention or causal_conv1d is installed; must never be called."""

    def broken(*args, **kwargs):
        raise AssertionError(f"{name}: the installed kernel ran")

    return functools.wraps(torch_functions()[name])(broken)


class Func(nn.Module):
    """What the `kernels` package turns a decorated function into: see `_create_func_module` there."""


def kernels_module(func) -> nn.Module:
    class Made(Func):
        def forward(self, *args, **kwargs):
            return func(*args, **kwargs)

    return Made()


@pytest.mark.parametrize("wrap", [lambda f: f, kernels_module], ids=["fla", "fla+kernels"])
def test_runs_the_torch_functions_where_kernels_are_installed(model, monkeypatch, wrap):
    ids = tokens(1, 7)
    expected = reference(model, ids, 4)
    bound = {name: wrap(fused(name)) for name in KERNEL_FUNCTIONS}
    for name, function in bound.items():
        monkeypatch.setattr(modeling(), name, function)
    with pytest.raises(AssertionError, match="the installed kernel ran"), torch.no_grad():
        model(ids)
    assert torch.equal(reference(model, ids, 4).hidden, expected.hidden)
    assert all(getattr(modeling(), name) is function for name, function in bound.items()), "not restored"


def test_pure_torch_is_checked_and_restored(model):
    layer = model.model.layers[0]
    before = {name: getattr(modeling(), name) for name in KERNEL_FUNCTIONS}
    with pytest.raises(AssertionError, match="is not the torch function"):
        assert_pure_torch(layer)
    with pytest.raises(KeyError), pure_torch():
        assert_pure_torch(layer)
        for name in KERNEL_FUNCTIONS:
            function = getattr(modeling(), name)
            assert function.__code__.co_filename == modeling().__file__ and function.__name__ == name
        raise KeyError
    assert all(getattr(modeling(), name) is function for name, function in before.items())
    layer.mlp.gate.forward = layer.mlp.gate.forward  # as hub kernels are put in
    with pytest.raises(AssertionError, match="forward was replaced"), pure_torch():
        assert_pure_torch(layer)
    del layer.mlp.gate.forward


def test_an_unknown_binding_is_an_error(monkeypatch):
    monkeypatch.setattr(modeling(), "causal_conv1d_fn", lambda *args: None)
    with pytest.raises(RuntimeError, match="causal_conv1d_fn"):
        torch_functions()


def precision() -> list[str]:
    b = torch.backends
    return [s.fp32_precision for s in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)]


def test_full_precision_inside_and_restored():
    initial = torch.get_float32_matmul_precision()
    default = precision()
    torch.set_float32_matmul_precision("high")
    try:
        before = precision()
        assert "tf32" in before[:2]
        with pytest.raises(KeyError), full_precision():
            assert precision() == ["ieee"] * 5
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cudnn.allow_tf32 is False and torch.backends.cuda.matmul.allow_tf32 is False
            raise KeyError
        assert precision() == before and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision(initial)
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = default[0], default[3]


def test_the_reference_runs_in_full_precision(model):
    seen = []
    reference(model, tokens(1, 3), 2, on_layer=lambda i, n: seen.append(precision()))
    assert seen == [["ieee"] * 5] * 5


def test_generate_is_greedy_and_passes_end_of_sequence(model, tmp_path):
    prompt = tokens(2, 5)
    ids = prompt
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = ids[:, 5:]
    model.generation_config.eos_token_id = int(expected[0, 2])
    model.config.eos_token_id = int(expected[0, 2])
    before = model.generation_config
    assert torch.equal(generate_reference(model, prompt, 8), expected)
    assert model.generation_config is before
    model.save_pretrained(tmp_path)
    assert torch.equal(generate_reference(tmp_path, prompt, 8), expected)


def test_generate_refuses_an_incomplete_snapshot(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        generate_reference(tmp_path, tokens(1, 2), 1)
    from safetensors.torch import load_file, save_file

    model = build_model(dataclasses.replace(ARCHITECTURE, num_hidden_layers=1, layer_types=("full_attention",)))
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight"):
        generate_reference(tmp_path, tokens(1, 2), 1)
