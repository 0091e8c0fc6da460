"""Where a token's time goes: kernels, copies, gaps between them, and waiting for the host.

A pass of its own under the profiler, which slows the host down: what it says of the GPU is used, and the wall-clock time is
that which was measured before. One measured afterwards, in a process that had profiled, was up to a third longer where the
host is what a step waits for.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moeexp_runner.session import Session
from moeexp_runner.timing import synchronize

Event = tuple[str, float, float]  # name, start and end in microseconds

# A pause between two pieces of GPU work that is shorter than this is the GPU's own (launch latency, a dependency); in a
# longer one it had nothing to do. Microseconds.
LONGEST_GAP = 5.0
TOP = 20
STEPS = 16  # enough to watch: more say the same
COPIES = ("Memcpy", "Memset")


def token_split(
    session: Session, prompt: Tensor, steps: int, *, step_us: float, place: Callable[..., Any] | None = None
) -> dict[str, Any] | None:
    """Decodes `steps` tokens after prompt [B, T]. step_us: what a decode step takes, timed without a profiler in the process.
    Microseconds per token: {wall_us = step_us = kernels_us + copies_us + gaps_us + host_us, by_kernel: the longest [{name,
    calls, us}]}, and what runs on the GPU for one token, whether a graph replays it or the host launches it: `kernels` and
    `copies` (with fills), from the token that is fed to the next one's arrival on the host. With `place`
    also, as `by_op`, what it makes of the kernels: place(kernels, steps=, without=). None where there is no GPU to profile."""
    if session.device.type != "cuda":
        return None
    session.decode_tokens(_prefilled(session, prompt), steps + 1)  # warm: lazy loading is no part of a token
    token = _prefilled(session, prompt)
    # Of a generation without a step: what starts a loop, and the first token's way to the host. It feeds nothing, so that the
    # whole one begins where it did.
    without, whole = (_profiled(session, token, count) for count in (1, steps + 1))
    session.reset()
    found = split(whole, wall_us=step_us * steps, steps=steps, without=without)
    return found | {"by_op": place(_kernels(whole), steps=steps, without=_kernels(without))} if place else found


def kernels_per_token(time_split: dict[str, Any] | None) -> float | None:
    """The record's `kernels_per_token`: kernels that run on the GPU for one token of the timed mode, sampling among them,
    whether a graph replays them or the host launches them. Copies and fills are counted in `time_split`."""
    if time_split is None:
        return None
    count = round(time_split["kernels"], 1)
    return int(count) if count == int(count) else count


def _profiled(session: Session, token: Tensor, new_tokens: int) -> list[Event]:
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        session.decode_tokens(token, new_tokens)
        torch.cuda.synchronize(session.device)
    return events_of(profiled)


def events_of(profiled: profile, device: DeviceType = DeviceType.CUDA) -> list[Event]:
    """What a profiler saw on a device, in no order."""
    return [
        (event.name, event.time_range.start, event.time_range.end) for event in profiled.events() if event.device_type == device
    ]


def split(events: Iterable[Event], *, wall_us: float, steps: int, without: Iterable[Event] = ()) -> dict[str, Any]:
    """The same from GPU events of `steps` steps that took `wall_us` in all. Time in which kernels overlap counts once,
    and a copy beside a kernel not at all. Events that come `without` any step as well are not counted as theirs."""
    events = sorted(events, key=lambda event: event[1])
    if not events:
        raise RuntimeError("the profiler saw no work on the GPU; is another profiler attached?")
    kernels = _kernels(events)
    kernel_us = _covered(kernels)
    copies_us = _covered(events) - kernel_us
    gaps_us, end = 0.0, events[0][2]
    for _, start, stop in events[1:]:
        if 0 < start - end <= LONGEST_GAP:
            gaps_us += start - end
        end = max(end, stop)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, start, stop in kernels:
        totals[name][0] += 1
        totals[name][1] += stop - start
    copies = len(events) - len(kernels)
    for name, start, stop in without:
        if name.startswith(COPIES):
            copies -= 1
        else:
            totals[name][0] -= 1
            totals[name][1] -= stop - start
    longest = sorted(((name, total) for name, total in totals.items() if total[0] > 0), key=lambda item: -item[1][1])

    def per_token(value: float) -> float:
        return round(value / steps, 3)

    return {
        "wall_us": per_token(wall_us),
        "kernels_us": per_token(kernel_us),
        "copies_us": per_token(copies_us),
        "gaps_us": per_token(gaps_us),
        "host_us": per_token(max(0.0, wall_us - kernel_us - copies_us - gaps_us)),
        "kernels": per_token(sum(calls for calls, _ in totals.values())),
        "copies": per_token(copies),
        "by_kernel": [
            {"name": name[:120], "calls": per_token(calls), "us": per_token(us)} for name, (calls, us) in longest[:TOP]
        ],
    }


def _kernels(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not event[0].startswith(COPIES)]


def _covered(events: list[Event]) -> float:
    """Length of the union of intervals, which are sorted by start."""
    total, end = 0.0, float("-inf")
    for _, start, stop in events:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _prefilled(session: Session, prompt: Tensor) -> Tensor:
    """The first token of a generation, and a GPU that is idle."""
    session.reset()
    token = session.sample(session.prefill(prompt))
    torch.cuda.synchronize(session.device)
    return token


TRACE_STEPS = 4


def write_trace(session: Session, prompt: Tensor, path: Path, *, new_tokens: int) -> dict[str, Any]:
    """prompt [B, T] int64. A generation of up to TRACE_STEPS tokens after the prompt, its prefill included; open the file in
    chrome://tracing or ui.perfetto.dev. Returns the record's `trace`."""
    steps = min(TRACE_STEPS + 1, new_tokens)
    session.generate(prompt, steps)
    synchronize(session.device)
    cuda = [ProfilerActivity.CUDA] if session.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiled:
        session.generate(prompt, steps)
        synchronize(session.device)
    profiled.export_chrome_trace(str(path))
    if not path.exists():  # of a full disk torch's writer says nothing, and leaves its part
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return {"file": path.name, "tokens": steps, "bytes": path.stat().st_size}
