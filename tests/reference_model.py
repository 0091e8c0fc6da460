"""A tiny random `Qwen3_5MoeForCausalLM` and traces made from it, for the tests of the reference and the check."""

from __future__ import annotations

import torch
from torch import Tensor

from moeexp.check.check import Trace
from moeexp.check.reference import ReferenceRun
from moeexp.config.architecture import Architecture

ARCHITECTURE = Architecture(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=5,
    layer_types=("linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    partial_rotary_factor=0.25,
    rope_theta=10000.0,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=256,
    eos_token_ids=(3,),
)


def config_of(architecture: Architecture):
    """transformers' own config object, which the reference is built from."""
    from transformers import Qwen3_5MoeTextConfig

    return Qwen3_5MoeTextConfig(**architecture.to_hf())


def build_model(architecture: Architecture = ARCHITECTURE, seed: int = 0):
    """float32, eager, weights that keep activations near 1 (transformers' own init leaves layers near identity)."""
    from transformers import Qwen3_5MoeForCausalLM

    config = config_of(architecture)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = Qwen3_5MoeForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise * 0.5)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith(("linear_attn.norm.weight", "dt_bias")) else 0.0))
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.ndim == 2 else noise * 0.3)
    return model


class ModelWeights:
    """`ReferenceWeights` of a transformers model. Layers are cloned: the reference must not write into the model."""

    def __init__(self, model):
        self.model = model

    def layer(self, index: int) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.model.model.layers[index].state_dict().items()}

    def embedding(self) -> Tensor:
        return self.model.model.embed_tokens.weight.detach()

    def final_norm(self) -> Tensor:
        return self.model.model.norm.weight.detach()

    def head(self) -> Tensor:
        return self.model.lm_head.weight.detach()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, ARCHITECTURE.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run_model(model, token_ids: Tensor, prompt_len: int) -> Trace:
    """The whole model, prompt in one call and then token by token, as a trace; hooks read the routers."""
    from transformers import DynamicCache

    chosen: list[list[Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, output, log=log: log.append(output[2]))
        for layer, log in zip(model.model.layers, chosen, strict=True)
    ]
    cache, logits = DynamicCache(config=model.config), []
    batch, length = token_ids.shape
    for start, stop in [(0, prompt_len)] + [(i, i + 1) for i in range(prompt_len, length)]:
        logits.append(model(token_ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    for handle in handles:
        handle.remove()
    states = {}
    for i, layer in enumerate(cache.layers):
        if model.config.layer_types[i] == "full_attention":
            states |= {f"layers.{i}.k_cache": layer.keys, f"layers.{i}.v_cache": layer.values}
        else:
            states[f"layers.{i}.conv_state"] = layer.conv_states[0][..., -3:]
            states[f"layers.{i}.recurrent_state"] = layer.recurrent_states[0]
    ids = torch.stack([torch.cat([t.view(batch, -1, t.shape[-1]) for t in log], dim=1) for log in chosen])
    return Trace(token_ids, prompt_len, torch.cat(logits, dim=1), ids, states)


def trace_of(run: ReferenceRun) -> Trace:
    logits = run.logits(0, run.token_ids.shape[1])
    states = {name: tensor.clone() for name, tensor in run.states.items()}
    return Trace(run.token_ids, run.prompt_len, logits, run.expert_ids.clone(), states)
