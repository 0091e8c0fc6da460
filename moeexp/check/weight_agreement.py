"""Are the model's dequantised weights the snapshot's own, within what quantising may lose?

The reference computes with the dequantised weights under the names of our piece table. Here each of them is compared with
the tensor that transformers' own loader puts under that name (`moeexp.check.snapshot_reader`), so that no name, slice, order of
experts or tie of ours is taken on trust.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels.ops.linear import MIDDLE_CODE
from torch import Tensor

from moeexp.check.snapshot_reader import SnapshotReader
from moeexp.check.tolerances import Part, make_part, measured, worst_rows
from moeexp.model.dequantise import DequantisedWeights, Stored
from moeexp.model.qwen3_5_moe import Qwen35MoE

# Elements of one slice: some float32 temporaries of 64 MB each beside a model that nearly fills the device.
SLICE_ELEMENTS = 2**24

HALF_ULP = 2.0**-11  # of a float16, relative: scales and shifts are stored as such
TINY = 2.0**-25  # half the least float16
FLAT = 2.0**-14  # a group whose values differ by less than 1e-4 is stored as its centre


def check_weights(model: Qwen35MoE, folder: Path, config: Any, advance: Callable[[], None] = lambda: None) -> Part:
    """`config`: transformers' own of the snapshot in `folder`. A layer of each in memory at a time."""
    reader, ours = SnapshotReader(folder, config), DequantisedWeights(model)
    problems = [f"{name}: nothing in the snapshot" for name in reader.missing]
    problems += [f"{key}: no parameter of transformers' model" for key in reader.unused]
    values: dict[str, list[tuple[float, str]]] = {"weights.exact": [], "weights.step": [], "weights.clipped": []}
    by_prefix: dict[str, list[str]] = {}
    for name in reader.shapes:
        by_prefix.setdefault(_prefix(name), []).append(name)
    compared = 0
    for prefix, names in by_prefix.items():
        stored = ours.stored(prefix)
        wanted = [name for name in names if name not in reader.missing]
        for name, theirs in reader.read(wanted, model.norm.device):
            mine = stored.get(name.removeprefix("model.").removeprefix(prefix))
            if mine is None or theirs is None or theirs.shape != mine.value.shape:
                shapes = [None if t is None else tuple(t.shape) for t in (None if mine is None else mine.value, theirs)]
                problems.append(f"{name}: shape {shapes[0]} here, {shapes[1]} in the snapshot")
                continue
            for key, value in compare(mine, theirs).items():
                values[key].append((value, name))
            compared += 1
        advance()
    tolerances = worst_rows("weights.names", [(1, problem) for problem in problems]) or [
        measured("weights.names", 0, "all names")
    ]
    for key, found in values.items():
        tolerances += worst_rows(key, found)
    quantised = len(values["weights.step"])
    return make_part("weights", tolerances, {"tensors": compared, "quantised": quantised})


def compare(mine: Stored, theirs: Tensor) -> dict[str, float]:
    """By tolerance. Quantised: in units of each group's step, how far from the nearest value that its codes can express, and how
    far beyond the outermost of these the snapshot's value lies (hqq clips outliers). Otherwise: elements that differ."""
    shape = (-1, theirs.shape[-1]) if theirs.ndim > 1 else (1, -1)
    left, right = mine.value.reshape(shape), theirs.reshape(shape)
    rows = max(1, SLICE_ELEMENTS // left.shape[1])
    worst = {"weights.exact": 0.0} if mine.scales is None else {"weights.step": 0.0, "weights.clipped": 0.0}
    scales = None if mine.scales is None else mine.scales.reshape(left.shape[0], -1, 2)
    for start in range(0, left.shape[0], rows):
        here = slice(start, start + rows)
        value, wanted = left[here], right[here].to(mine.dtype).float()
        if scales is None:
            worst["weights.exact"] += int((value != wanted).sum())  # a NaN differs from itself
            continue
        for key, found in zip(worst, _steps(value, wanted, scales[here].float(), mine.bits), strict=True):
            worst[key] = max(worst[key], found)
    return worst


def _steps(value: Tensor, wanted: Tensor, scales: Tensor, bits: int) -> tuple[float, float]:
    """value, wanted [n, K], scales [n, K/G, 2] -> the two figures of `compare`; inf where one is no number."""
    groups = scales.shape[1]
    value, wanted = value.unflatten(-1, (groups, -1)), wanted.unflatten(-1, (groups, -1))
    scale, shift = scales[..., :1], scales[..., 1:]
    middle, last = MIDDLE_CODE[bits], 2**bits - 1
    nearest = torch.minimum(torch.maximum(wanted, shift - middle * scale), shift + (last - middle) * scale)
    # The code was chosen before scale and shift were rounded to float16.
    slack = HALF_ULP * (shift.abs() + (wanted - shift).abs()) + TINY * (1 + middle)
    step = torch.where(scale > 0, scale, FLAT)
    nearest = torch.where(scale > 0, nearest, wanted)
    off, beyond = ((nearest - value).abs() - slack) / step, (wanted - nearest).abs() / step
    return _largest(off), _largest(beyond)


def _largest(tensor: Tensor) -> float:
    value = float(tensor.max())
    return value if math.isfinite(value) else math.inf


def _prefix(name: str) -> str:
    layer = re.match(r"(?:model\.)?(layers\.\d+\.)", name)
    return layer[1] if layer else ""
