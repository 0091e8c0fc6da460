"""RoPE frequencies of a model, operation for operation as transformers computes them: the bits are to be the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.config.rope import Yarn


def inverse_frequencies(arch: Architecture) -> Tensor:
    """[1, R/2] float32, on the CPU: pow differs in the last bit between devices."""
    exponents = torch.arange(0, arch.rotary_dim, 2, dtype=torch.float32) / arch.rotary_dim
    wavelengths = arch.rope_theta**exponents  # over 2 pi
    if arch.rope_scaling is None:
        return (1.0 / wavelengths)[None]
    kept = 1 - _ramp(arch.rope_scaling, arch.rope_theta, arch.rotary_dim)
    return (1.0 / (arch.rope_scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept)[None]


def _ramp(yarn: Yarn, theta: float, dim: int) -> Tensor:
    """[R/2] float32: 0 where a frequency is kept, 1 where it is divided by `factor`."""

    def dim_of(turns: float) -> float:
        """The dim that turns so often over the original context."""
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(yarn.beta_fast), dim_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers has it: no division by zero
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
