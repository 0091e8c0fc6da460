"""The gated delta net from its definition, for a step and for a prompt: what the kernels are held against, and what runs where
no Triton kernel does. Shape letters, arguments and the rule: gated_delta.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
L2_EPS = 1e-6
MAX_HEAD_DIM = 128  # a whole [Dk, Dv] float32 state tile stays in registers


def check_gdn(
    *, proj: Tensor, conv_weight: Tensor, a_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, conv_state: Tensor,
    recurrent_state: Tensor, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int,
) -> None:  # fmt: skip
    """`ValueError` unless shapes, dtypes and strides are what the kernels address. Never looks at T, which may be symbolic."""
    if num_k_heads < 1 or num_v_heads % num_k_heads:
        raise ValueError(f"{num_v_heads} value heads are no multiple of {num_k_heads} key heads")
    if not (0 < head_k_dim <= MAX_HEAD_DIM and 0 < head_v_dim <= MAX_HEAD_DIM):
        raise ValueError(f"head dims {head_k_dim} and {head_v_dim}: the Triton kernels do 1..{MAX_HEAD_DIM}; use ops=reference")
    if proj.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"proj is {proj.dtype}; float32 and bfloat16 are supported")
    if conv_weight.shape[-1] < 2:
        raise ValueError(f"conv width {conv_weight.shape[-1]} is not supported; it must be at least 2")
    batch, width = proj.shape[0], conv_weight.shape[-1]
    channels = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim
    row = channels + num_v_heads * head_v_dim + 2 * num_v_heads
    shapes = {
        "conv_weight": (conv_weight, (channels, width), None),
        "a_log": (a_log, (num_v_heads,), torch.float32),
        "dt_bias": (dt_bias, (num_v_heads,), torch.float32),
        "norm_weight": (norm_weight, (head_v_dim,), None),
        "conv_state": (conv_state, (batch, channels, width - 1), proj.dtype),
        "recurrent_state": (recurrent_state, (batch, num_v_heads, head_k_dim, head_v_dim), torch.float32),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; these heads, batch and conv width need {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; only a contiguous {name} is supported")
    if proj.dim() != 3 or proj.shape[2] != row:
        raise ValueError(f"proj is {tuple(proj.shape)}; these heads need [B, T, {row}]")
    if proj.stride(2) != 1:
        raise ValueError(f"proj has strides {proj.stride()}; its last dim must have stride 1")


def inputs_of(
    proj, conv_weight, a_log, dt_bias, conv_state, num_k_heads, num_v_heads, head_k_dim, head_v_dim, valid_len=None
):  # fmt: skip
    """q, k [B,Hv,T,Dk], v [B,Hv,T,Dv], z [B,T,Hv,Dv], log-decay g and beta [B,Hv,T], all float32; new conv state.

    Tokens from `valid_len` [B] on: q = k = v = 0, g = 0 and beta = 0, and the conv state ends before them."""
    key_dim, value_dim = num_k_heads * head_k_dim, num_v_heads * head_v_dim
    channels = 2 * key_dim + value_dim
    mixed, z, b, a = proj.split([channels, value_dim, num_v_heads, num_v_heads], dim=-1)
    tokens, width = proj.shape[1], conv_weight.shape[-1]
    window = torch.cat([conv_state, mixed.transpose(1, 2)], dim=-1)  # [B, C, W-1+T]
    filters = conv_weight.float()
    mixed = sum(window[..., w : w + tokens].float() * filters[:, w, None] for w in range(width))
    q, k, v = F.silu(mixed).split([key_dim, key_dim, value_dim], dim=1)
    q, k = (t.unflatten(1, (num_k_heads, head_k_dim)).transpose(-1, -2) for t in (q, k))
    v = v.unflatten(1, (num_v_heads, head_v_dim)).transpose(-1, -2)
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + L2_EPS) for t in (q, k))
    q, k = (t.repeat_interleave(num_v_heads // num_k_heads, dim=1) for t in (q * head_k_dim**-0.5, k))
    g = -a_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    z = z.float().unflatten(-1, (num_v_heads, head_v_dim))
    beta = b.float().sigmoid()
    if valid_len is None:
        new_conv_state = window[..., window.shape[-1] - (width - 1) :]
    else:
        counts = torch.arange(tokens, device=proj.device) < valid_len[:, None]  # [B, T]
        q, k, v = (t.masked_fill(~counts[:, None, :, None], 0.0) for t in (q, k, v))
        g, beta = (t.masked_fill(~counts[..., None], 0.0) for t in (g, beta))
        ends = valid_len[:, None] + torch.arange(width - 1, device=proj.device)
        new_conv_state = window.gather(-1, ends[:, None].expand(-1, channels, -1))
    return q, k, v, z, g.transpose(1, 2), beta.transpose(1, 2), new_conv_state


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """o [B,Hv,T,Dv], z [B,T,Hv,Dv] -> [B, T, Hv*Dv] float32."""
    o = o.transpose(1, 2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (o * F.silu(z)).flatten(-2)


def recurrent_delta_rule(*, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor):
    """The definition, token by token. q, k [B,H,T,Dk], v [B,H,T,Dv], g (log decay), beta [B,H,T], state [B,H,Dk,Dv],
    float32. Returns (o [B,H,T,Dv], new state)."""
    outputs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        delta = beta[:, :, t, None] * (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t]))
        state = state + k[:, :, t, :, None] * delta[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


def chunked_delta_rule(*, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor):
    """Same function, `CHUNK` tokens at a time: within a chunk the updates u solve (I + A) u = beta (v - decayed k S) with
    A strictly lower triangular, so that one triangular solve replaces the token loop."""
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        q_c, k_c, v_c, beta_c = q[:, :, part], k[:, :, part], v[:, :, part], beta[:, :, part, None]
        decay = g[:, :, part].cumsum(-1)  # log of the decay since the chunk's start
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        pair = (decay[..., :, None] - decay[..., None, :]).masked_fill(
            torch.ones(q_c.shape[2], q_c.shape[2], dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
        pair = pair.exp()
        from_start = decay.exp()[..., None]
        system = (beta_c * k_c) @ k_c.transpose(-1, -2) * pair
        rhs = beta_c * (v_c - (k_c * from_start) @ state)
        # Of `system` the solver reads only what lies below the diagonal, which it takes as ones.
        u = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
        outputs.append((q_c * from_start) @ state + (q_c @ k_c.transpose(-1, -2) * pair) @ u)
        to_end = (decay[..., -1:] - decay).exp()[..., None]
        state = state * decay[..., -1, None, None].exp() + (k_c * to_end).transpose(-1, -2) @ u
    return torch.cat(outputs, dim=2), state


def reference_gdn_decode(
    *,
    proj: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    eps: float,
) -> Tensor:
    """A few tokens, T no symbol: for each a handful of traced torch ops; the recurrent definition."""
    q, k, v, z, g, beta, new_conv_state = inputs_of(
        proj, conv_weight, a_log, dt_bias, conv_state, num_k_heads, num_v_heads, head_k_dim, head_v_dim
    )
    o, state = recurrent_delta_rule(q=q, k=k, v=v, g=g, beta=beta, state=recurrent_state)
    conv_state.copy_(new_conv_state)
    recurrent_state.copy_(state)
    return gated_norm(o, z, norm_weight, eps).to(proj.dtype)


@torch.library.custom_op("moeexp::reference_gdn_prefill", mutates_args=("conv_state", "recurrent_state"))
def reference_gdn_prefill(
    proj: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    eps: float,
    valid_len: Tensor | None = None,
) -> Tensor:
    """Any T >= 1. Opaque to export: the number of chunks follows from T, which is symbolic there.

    valid_len [B] int64 in 1..T: only so many tokens of each row count; the rest leave no trace in the state, and their own
    rows of the result mean nothing. None: all T."""
    q, k, v, z, g, beta, new_conv_state = inputs_of(
        proj, conv_weight, a_log, dt_bias, conv_state, num_k_heads, num_v_heads, head_k_dim, head_v_dim, valid_len
    )
    o, state = chunked_delta_rule(q=q, k=k, v=v, g=g, beta=beta, state=recurrent_state)
    conv_state.copy_(new_conv_state)
    recurrent_state.copy_(state)
    return gated_norm(o, z, norm_weight, eps).to(proj.dtype)


@reference_gdn_prefill.register_fake
def _(
    proj, conv_weight, a_log, dt_bias, norm_weight, conv_state, recurrent_state,
    num_k_heads, num_v_heads, head_k_dim, head_v_dim, eps, valid_len=None,
):  # fmt: skip
    return proj.new_empty(proj.shape[0], proj.shape[1], num_v_heads * head_v_dim)
