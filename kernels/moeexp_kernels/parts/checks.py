"""What every op asks of an argument before it launches: kernels address memory by shape alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_argument(tensor: Tensor, *, name: str, shape: Sequence, dtypes: Sequence[torch.dtype]) -> None:
    """`ValueError` unless `tensor` has this shape and one of the dtypes, and is contiguous. Sizes may be symbolic."""
    wanted = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {tuple(shape)}, contiguous"
    if tensor.dtype not in dtypes or tensor.dim() != len(shape) or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; supported: {wanted}")
    # With a symbolic size the question itself would specialise an exported graph; then the last stride has to do.
    static = isinstance(tensor.numel(), int)
    if not tensor.is_contiguous() if static else tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tuple(tensor.stride())}; supported: {wanted}")
