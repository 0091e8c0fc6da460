"""The least bytes that one decode step must move: what a speed is held against."""

from __future__ import annotations

from .model import Linear, Qwen35MoE, state_shapes


def bytes_per_step(model: Qwen35MoE, *, batch: int, length: int) -> dict[str, int]:
    """Bytes of a decode step of `batch` sequences at context `length`: weights read (the chosen experts alone, distinct
    ones at most), embedding rows, recurrent and conv state read and written, KV cache read up to `length` and appended."""
    arch = model.arch
    experts = min(batch * arch.num_experts_per_tok, arch.num_experts)
    weights = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "embed_tokens":
            size = module.weight.nbytes + (0 if module.scales is None else module.scales.nbytes)
            weights += size * experts // arch.num_experts if len(module.shape) == 3 else size
    state_names = set(state_shapes(arch, batch=batch, max_seq_len=1, dtype=model.norm.dtype))
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, buffer in model.named_buffers():
        if name not in state_names and name.rpartition(".")[0] not in linears:
            weights += buffer.nbytes
    row = model.embed_tokens.weight[0].nbytes
    dtype = model.embed_tokens.weight.dtype
    state = kv = 0
    for name, (shape, kind) in state_shapes(arch, batch=batch, max_seq_len=1, dtype=dtype).items():
        size = kind.itemsize
        for extent in shape:
            size *= extent
        if name.endswith("_cache"):
            kv += size * (length + 1)
        elif not name.endswith("expert_ids"):
            state += 2 * size
    return {
        "weights": weights + batch * row,
        "state": state,
        "kv_cache": kv,
        "total": weights + batch * row + state + kv,
    }
