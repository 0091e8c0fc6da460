"""A Chrome trace of a few decode steps, made apart from the timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeexp_runner.session import Session
from moeexp_runner.timing import synchronize
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

STEPS = 4


def write_trace(session: Session, prompt: Tensor, path: Path, *, new_tokens: int) -> dict[str, Any]:
    """prompt [B, T] int64. A generation of up to STEPS tokens after the prompt, its prefill included; open the file in
    chrome://tracing or ui.perfetto.dev. Returns the record's `trace`."""
    steps = min(STEPS + 1, new_tokens)
    session.generate(prompt, steps)
    synchronize(session.device)
    cuda = [ProfilerActivity.CUDA] if session.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiled:
        session.generate(prompt, steps)
        synchronize(session.device)
    profiled.export_chrome_trace(str(path))
    return {"file": path.name, "tokens": steps, "bytes": path.stat().st_size}
