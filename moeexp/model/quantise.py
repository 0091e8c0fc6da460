"""Grouped weight-only quantisation by hqq's algorithm, in the layout of `moeexp_kernels.ops.linear`.

A CPU tensor is quantised by hqq itself, a CUDA tensor by our kernels of the same algorithm, `moeexp_kernels.hqq`: hqq makes some
200 passes over memory for a slice and gives memory back to the driver after each, 25 s for 35e9 weights on an H100. Both work in
float32, as hqq does not on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from moeexp_kernels.hqq import quantise_rows
from moeexp_kernels.ops.linear import MIDDLE_CODE
from torch import Tensor

# hqq works on float32 copies (about eight of them); this bounds what it needs beside the weights to ~1 GiB. It decides
# codes as well, on every device: hqq stops refining when the mean error over all that it is given stops falling.
SLICE_ELEMENTS = 1 << 25

# hqq gives a group whose values differ by less than this a scale of 1.
FLAT = 1e-4


def pack(codes: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Codes uint8 [..., N, K] in 0..2^bits-1 -> stored weight: [..., N, K/2] for 4 bits, [..., N, K] for 8."""
    if bits == 8:
        return codes
    low, high = codes.unflatten(-1, (-1, 2, group_size // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def quantise(weight: Tensor, *, bits: int, group_size: int, name: str = "weight") -> tuple[Tensor, Tensor]:
    """weight [..., N, K] float -> (stored uint8 weight, scales [..., N, K/G, 2] float16), on weight's device: by our kernels of
    hqq's algorithm on CUDA, by hqq elsewhere. Codes of the two differ where rounding decides.

    `ValueError` for a group size that does not divide K: hqq would let groups span rows without a word."""
    features = weight.shape[-1]
    if bits not in MIDDLE_CODE:
        raise ValueError(f"quant.bits={bits}; supported: {', '.join(map(str, MIDDLE_CODE))}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"quant.group_size={group_size} is not an even number of at least 2 ({name}); {_advice(features)}")
    if features % group_size:
        raise ValueError(
            f"quant.group_size={group_size} does not divide the {features} input features of {name}; {_advice(features)}"
        )
    rows = weight.reshape(-1, features)
    step = max(1, SLICE_ELEMENTS // features)
    round_zero = bits == 4  # hqq's own default
    if weight.is_cuda:
        stored, scales = quantise_rows(
            rows.contiguous(), bits=bits, group_size=group_size, slice_rows=step, flat=FLAT, round_zero=round_zero
        )
    else:
        stored, scales = _by_hqq(rows, step, bits=bits, group_size=group_size, round_zero=round_zero)
    if not scales.isfinite().all():  # the one question for which the host waits
        raise ValueError(f"{name} has groups whose scale does not fit float16 (weights not finite, or beyond ±65504)")
    return stored.view(*weight.shape[:-1], -1), scales.view(*weight.shape[:-1], -1, 2)


def _by_hqq(rows: Tensor, step: int, *, bits: int, group_size: int, round_zero: bool) -> tuple[Tensor, Tensor]:
    """rows [N, K] float -> (stored uint8 [N, K * bits / 8], scales [N, K/G, 2] float16), `step` rows at a time."""
    quantizer, features = _hqq(), rows.shape[1]
    # Written slice by slice into their final place: a list to concatenate would hold everything twice.
    stored = torch.empty(rows.shape[0], features * bits // 8, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(rows.shape[0], features // group_size, 2, dtype=torch.float16, device=rows.device)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        wide = part.float()
        codes, meta = quantizer.quantize(
            wide,
            nbits=bits,
            group_size=group_size,
            axis=1,
            round_zero=round_zero,
            bitpack=False,
            device=str(part.device),
        )
        packed = pack(codes.view(part.shape).to(torch.uint8), bits=bits, group_size=group_size)
        stored[start : start + step].copy_(packed)
        scale, zero = meta["scale"].float(), meta["zero"].float()
        pair = torch.stack([scale, (MIDDLE_CODE[bits] - zero) * scale], dim=-1).view(-1, 2)
        # A shift near 128 would cost float16 all digits of a flat group's value: such a group is its centre, scale 0.
        low, high = wide.view(-1, group_size).aminmax(dim=1)
        centre = torch.stack([torch.zeros_like(low), (low + high) / 2], dim=-1)
        pair = torch.where((high - low <= FLAT)[:, None], centre, pair)
        scales[start : start + step].copy_(pair.view(part.shape[0], features // group_size, 2))
    return stored, scales


@functools.cache
def _hqq() -> Any:
    """Its Quantizer, where weights are quantised. Three methods of its layers, which we never call, are decorated with
    torch.compile: that would import all of Inductor for them."""
    with mock.patch.object(torch, "compile", _compiled_when_called):
        from hqq.core.quantize import Quantizer

    return Quantizer


def _compiled_when_called(**settings: Any) -> Callable[[Callable], Callable]:
    """torch.compile as a decorator, at the first call."""

    def decorate(function: Callable) -> Callable:
        compiled = functools.cache(lambda: torch.compile(function, **settings))
        return functools.wraps(function)(lambda *args, **named: compiled()(*args, **named))

    return decorate


def _advice(features: int) -> str:
    works = next((g for g in (128, 64, 32, 16, 8, 4, 2) if features % g == 0), None)
    return "leave it out with quant.skip" if works is None else f"an even divisor is needed, e.g. quant.group_size={works}"
