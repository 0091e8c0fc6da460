"""The model against transformers' own code, and its two phases against each other."""

import pytest
import torch
from common import random_tokens
from moeexp_kernels import registry
from moeexp_runner.arena import Arena

from moeexp.check.pure_torch import pure_torch
from moeexp.config.architecture import Architecture
from moeexp.config.compose import compose
from moeexp.config.quantisation import NEVER_QUANTISED
from moeexp.config.sources import load_architecture
from moeexp.model.dequantise import DequantisedWeights
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.model.weights import Random, load


def build(arch, *, bits=16, batch=1, max_seq_len=128, dtype=torch.float32, seed=0):
    model = load(
        arch,
        Random(arch, seed),
        dtype=dtype,
        device=torch.device("cpu"),
        bits=bits,
        group_size=16,
        skip=NEVER_QUANTISED,
    )
    arena = Arena(state_shapes(arch, batch=batch, max_seq_len=max_seq_len, dtype=dtype), device="cpu")
    arena.reset()
    names = registry.resolve(default="reference", chosen={}, device="cpu")
    ops = {op: registry.OPS[op][name] for op, name in names.items()}
    return model, arena, {"ops": ops, "state": arena.tensors}


def transformers_logits(model, tokens):
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    weights = DequantisedWeights(model)
    state = {"model.embed_tokens.weight": weights.embedding(), "model.norm.weight": weights.final_norm()}
    state["lm_head.weight"] = weights.head()
    for i in range(model.arch.num_hidden_layers):
        state |= {f"model.layers.{i}.{key}": value for key, value in weights.layer(i).items()}
    config = Qwen3_5MoeTextConfig(**model.arch.to_hf())
    reference = Qwen3_5MoeForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    reference.load_state_dict(state, strict=True)
    with torch.no_grad(), pure_torch():
        return reference(tokens, use_cache=False).logits


NANO = load_architecture(compose(["model=nano"]).model)
# Sizes in which no two dimensions agree, odd head counts, one key head for three value heads.
ODD = Architecture.from_hf({
    "vocab_size": 77, "hidden_size": 48, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 1,
    "linear_num_value_heads": 3, "linear_key_head_dim": 32, "linear_value_head_dim": 16, "num_experts": 5,
    "num_experts_per_tok": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 80,
})  # fmt: skip


@pytest.mark.parametrize("arch", [NANO, ODD], ids=["nano", "odd"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_prefill_equals_transformers(arch, bits):
    model, _, how = build(arch, bits=bits, batch=2)
    # The same in each run: one sequence in some thousands has a token for which two right orders of sums differ by more than
    # 2e-5, where 5e-6 is usual.
    tokens = random_tokens(2, 70, vocab=arch.vocab_size)
    ours = model(tokens, torch.zeros(2, dtype=torch.int64), None, phase="prefill", **how)
    torch.testing.assert_close(ours, transformers_logits(model, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("split", [1, 2, 63, 64, 65])
def test_decode_continues_prefill(split):
    model, arena, how = build(NANO)
    tokens = random_tokens(1, 70, vocab=NANO.vocab_size)
    whole = model(tokens, torch.zeros(1, dtype=torch.int64), None, phase="prefill", **how)
    state = arena.snapshot()
    arena.reset()
    parts = [model(tokens[:, :split], torch.zeros(1, dtype=torch.int64), None, phase="prefill", **how)]
    for t in range(split, 70):
        parts.append(model(tokens[:, t : t + 1], torch.tensor([t]), None, phase="decode", **how))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=3e-5)
    for name, tensor in arena.tensors.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=3e-5, msg=name)


def test_logit_positions_select_rows():
    model, arena, how = build(NANO)
    tokens = random_tokens(1, 9, vocab=NANO.vocab_size)
    zero = torch.zeros(1, dtype=torch.int64)
    whole = model(tokens, zero, None, phase="prefill", **how)
    arena.reset()
    some = model(tokens, zero, torch.tensor([8, 2]), phase="prefill", **how)
    # A product with another number of rows may sum in another order; a wrong row would be off by about 1.
    torch.testing.assert_close(some, whole[:, [8, 2]], rtol=0, atol=1e-5)


def test_expert_ids_are_traced_by_position():
    model, arena, how = build(NANO)
    arena.tensors["layers.0.expert_ids"][:, :-1].fill_(-7)
    tokens = random_tokens(1, 5, vocab=NANO.vocab_size)
    model(tokens, torch.tensor([10]), None, phase="prefill", **how)
    trace = arena.tensors["layers.0.expert_ids"]
    assert (trace[:, :10] == -7).all() and (trace[:, 15:-1] == -7).all() and (trace[:, -1] == 0).all()
    chosen = trace[:, 10:15]
    assert chosen.min() >= 0 and chosen.max() < NANO.num_experts
    assert (chosen[..., 0] != chosen[..., 1]).all()


def test_no_buffer_that_inductor_would_write_into_the_code():
    model, _, _ = build(NANO)
    short = [name for name, buffer in model.named_buffers() if buffer.ndim == 1 and buffer.numel() <= 8]
    assert not short
