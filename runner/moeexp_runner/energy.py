"""Energy of decoding, from the GPU's own counter.

The counter moves every 20 to 100 ms only, so that the energy of one prefill or of one generation cannot be read. Two windows
of many calls can: whole generations, and generations of one token. What a generation takes more than its prefill is the
energy of decoding, and every fixed cost cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

from moeexp_runner import nvml

SECONDS = 1.5  # a window's least length
IDLE_S = 0.15
POLL_S = 0.0005
PATIENCE_S = 0.5  # a counter that has not moved for so long is none

Read = Callable[[], float]


@dataclass(frozen=True)
class Window:
    joules: float
    calls: int
    tokens: int
    seconds: float


def counter(device: torch.device) -> Read | None:
    """What reads the GPU's joules so far; None where there is no GPU or it does not tell."""
    if device.type != "cuda":
        return None
    try:
        handle = nvml.handle_of(device)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def of_decoding(generate: Callable[[int], int], new_tokens: int, *, read: Read | None) -> dict[str, Any] | None:
    """`generate(n)` makes up to n tokens of each sequence, and returns how many of all came after the first ones. Not timed.

    The record's `energy`: {joules and tokens of one generation's decoding, joules_per_generation, joules_per_prefill,
    generations, prefills, seconds}. None where nothing is decoded or read, or where both windows take the same."""
    if read is None or new_tokens < 2:
        return None
    whole = _window(lambda: generate(new_tokens), read)
    prefill = None if whole is None else _window(lambda: generate(1), read)
    if whole is None or prefill is None:
        return None
    per_generation, per_prefill = whole.joules / whole.calls, prefill.joules / prefill.calls
    tokens = whole.tokens / whole.calls
    if tokens == 0 or per_generation <= per_prefill:
        return None
    return {
        "joules": per_generation - per_prefill,
        "tokens": tokens,
        "joules_per_generation": per_generation,
        "joules_per_prefill": per_prefill,
        "generations": whole.calls,
        "prefills": prefill.calls,
        "seconds": round(whole.seconds + prefill.seconds, 3),
    }


def _window(call: Callable[[], int], read: Read) -> Window | None:
    """Calls for `SECONDS`, from a movement of the counter to the next one after the last call; what the GPU takes while it
    waits for that is measured behind it and subtracted. None if the counter stands still."""
    begin = _movement(read)
    if begin is None:
        return None
    calls = tokens = 0
    while time.perf_counter() - begin[0] < SECONDS or not calls:
        tokens += call()
        calls += 1
    end = time.perf_counter()
    first = later = _movement(read)
    while first is not None and later is not None and later[0] - first[0] < IDLE_S:
        later = _movement(read)
    if first is None or later is None:
        return None
    watts = (later[1] - first[1]) / (later[0] - first[0])
    return Window(first[1] - begin[1] - watts * (first[0] - end), calls, tokens, end - begin[0])


def _movement(read: Read) -> tuple[float, float] | None:
    """(when, joules) of the counter's next movement; None if it does not come."""
    start, before = time.perf_counter(), read()
    while time.perf_counter() - start < PATIENCE_S:
        time.sleep(POLL_S)
        now = read()
        if now != before:
            return time.perf_counter(), now
    return None
