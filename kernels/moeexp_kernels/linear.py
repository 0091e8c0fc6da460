"""Dense linear layer on plain, int8 or int4 weights, with an optional RMSNorm before and residual after it.

Shape letters: M rows of activations (any leading shape), K input features, N output features, G quantisation group.

Weight formats (told apart by dtype and shape, never by a flag that could disagree with the data):
    plain  weight [N, K] float dtype, scales None
    int8   weight [N, K] uint8, scales [N, K/G, 2] float16
    int4   weight [N, K/2] uint8, scales [N, K/G, 2] float16

Within a group of an int4 row, byte j holds element j in its low and element j + G/2 in its high nibble: a 16-byte load
brings two runs of 16 *consecutive* inputs, so that activations are read with vector loads and no shuffle.
`scales[..., 0]` is the scale s, `scales[..., 1]` the shift c; with the code q in 0..2^bits-1 and the middle code
m = 2^(bits-1), the weight is (q - m) * s + c. Centring keeps c small, so float16 holds it without loss that matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIDDLE_CODE = {4: 8, 8: 128}


def weight_bits(*, weight: Tensor, scales: Tensor | None, in_features: int) -> int:
    """16 (plain), 8 or 4. `ValueError` where weight and scales do not fit an input of `in_features`."""
    if scales is None:
        if weight.shape[-1] != in_features:
            raise ValueError(f"weight {tuple(weight.shape)} does not take inputs of {in_features} features")
        return 16
    if weight.dtype != torch.uint8 or scales.dtype != torch.float16:
        raise ValueError(f"a quantised weight is uint8 with float16 scales; got {weight.dtype} and {scales.dtype}")
    if in_features % scales.shape[-2] or weight.shape[-1] not in (in_features, in_features // 2):
        raise ValueError(
            f"weight {tuple(weight.shape)} with scales {tuple(scales.shape)} does not take {in_features} input features"
        )
    return 8 if weight.shape[-1] == in_features else 4


def dequantise(*, weight: Tensor, scales: Tensor | None, in_features: int) -> Tensor:
    """Float32 weight [..., N, K] of any of the three formats (leading dims: experts)."""
    bits = weight_bits(weight=weight, scales=scales, in_features=in_features)
    if scales is None:
        return weight.float()
    groups = scales.shape[-2]
    if bits == 4:
        packed = weight.unflatten(-1, (groups, -1))
        codes = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    else:
        codes = weight.unflatten(-1, (groups, -1))
    scale, shift = scales.float().unsqueeze(-1).unbind(-2)  # each [..., N, groups, 1]
    return ((codes.float() - MIDDLE_CODE[bits]) * scale + shift).flatten(-2)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Unit-offset RMSNorm in float32: x / rms(x) * (1 + weight) over the last dim; float32 out."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1.0 + weight.float())


def reference_linear(
    *,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + norm(x) @ weight.T, float32 inside, one rounding to x's dtype at the end.

    x [..., K]; weight and scales as above; norm_weight [K] or None; residual [..., N] or None. Returns [..., N]."""
    wide = dequantise(weight=weight, scales=scales, in_features=x.shape[-1])
    y = rms_norm(x=x, weight=norm_weight, eps=eps) if norm_weight is not None else x.float()
    y = torch.nn.functional.linear(y, wide)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
