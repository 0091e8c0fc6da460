"""The reference on the device: transformers' attention in pieces, whose tensors grow from one to the next."""

from __future__ import annotations

import pytest
import torch
from reference_model import ARCHITECTURE, config_of

from moeexp.check.pure_torch import eager, full_precision, modeling, pure_torch
from moeexp.check.reference import _InPieces

LENGTH, MOST = 4096, 256
ATTENDS = ARCHITECTURE.layer_types.index("full_attention")


@torch.inference_mode()
def outputs(dtype, *, reserve: bool, monkeypatch) -> tuple[torch.Tensor, int]:
    """([1, LENGTH, D], how often torch asked the driver for memory meanwhile)."""
    from transformers import DynamicCache

    config = eager(config_of(ARCHITECTURE))
    torch.manual_seed(0)
    with torch.device("cuda"):
        attention = modeling().Qwen3_5MoeAttention(config, ATTENDS).to(dtype)
        rotary = modeling().Qwen3_5MoeTextRotaryEmbedding(config)
        hidden = torch.randn(1, LENGTH, config.hidden_size, dtype=dtype)
    rope = rotary(hidden, torch.arange(LENGTH, device="cuda").expand(3, 1, -1))
    pieces = _InPieces(attention, MOST)
    if not reserve:
        monkeypatch.setattr(pieces, "_reserve", lambda hidden_states: None)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    with pure_torch(), full_precision():
        found = pieces(hidden, rope, None, DynamicCache(config=config))[0]
    torch.cuda.synchronize()
    return found, torch.cuda.memory_stats()["num_device_alloc"] - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_growing_pieces_are_cut_from_one_block(dtype, monkeypatch):
    """And are the same to the bit. Small tensors have blocks of their own."""
    plain, asked = outputs(dtype, reserve=False, monkeypatch=monkeypatch)
    reserved, fewer = outputs(dtype, reserve=True, monkeypatch=monkeypatch)
    assert torch.equal(plain, reserved)
    assert fewer < asked, (fewer, asked)
