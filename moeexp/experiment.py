"""One run: weights, methods, check, benchmark, quality, all into the record."""

from __future__ import annotations

import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from moeexp_kernels import registry, user_ops
from moeexp_runner import timing
from torch import Tensor

from .evaluate import bits_per_byte
from .factory import Stack, build_model, build_stack, check_coverage
from .floor import bytes_per_step
from .phases import Phases
from .prompts import Text, prompt_tokens, text_of
from .record import Record
from .schema import Config, QuantConfig
from .validate import heldout_file, load_architecture
from .verification import verify
from .weights import NEVER_QUANTISED


def run_experiment(cfg: Config, *, run_dir: Path, record: Record, phases: Phases) -> None:
    """`cfg` is validated and resolved. Fills the record; a failed check is a result, not an exception."""
    arch = load_architecture(cfg.model)
    text = text_of(cfg)
    prompt = prompt_tokens(cfg, arch, text)
    eos = _eos(cfg, arch)
    on_cuda = cfg.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with phases("weights"):
        model = build_model(cfg, phases)
    share = check_coverage(model, bits=cfg.quant.bits, default_skip=_default_skip(cfg.quant))
    stack = build_stack(cfg, model, phases)
    try:
        record.set(
            quantised_coverage=round(share, 6),
            ops=_ops(stack),
            prompt_text=[text.decode(row) for row in prompt.tolist()]
            if text.decode and cfg.prompt is not None
            else None,
        )
        passed = None
        if cfg.check != "off":
            record.set(check=verify(cfg, stack, prompt, phases))
            passed = record.data["check"]["passed"]
        with phases("benchmark"):
            ids = _benchmark(cfg, stack, prompt.to(stack.device), record, eos)
        _compare_ids(record, ids, stopped_early=eos is not None)
        record.set(generated_ids=ids, generated_text=[text.decode(row) for row in ids] if text.decode else None)
        heldout = heldout_file(cfg.model)
        wanted = bool(cfg.eval_bytes) and heldout is not None and cfg.model.weights != "random"
        if wanted and text.encode is None:
            record.note("no bits per byte: the snapshot brings no tokenizer, so held-out text has no tokens")
        elif wanted and passed is not False:
            with phases("bits per byte"):
                quality = _quality(cfg, stack, heldout, text)
                record.set(bits_per_byte=quality["bits_per_byte"], evaluation=quality)
        record.set(memory_gib=_memory(stack))
    finally:
        stack.close()


def _benchmark(cfg: Config, stack: Stack, prompt: Tensor, record: Record, eos: set[int] | None) -> list[list[int]]:
    """Warm-up, then `repeats` prefills and generations; speeds are medians. Returns the ids of the last generation."""
    session, samples = stack.session, timing.Samples()
    warm_up = timing.Samples()
    timing.time_prefill(session, prompt, warm_up)
    timing.time_generation(session, prompt, min(cfg.new_tokens, 8), warm_up)
    for _ in range(cfg.repeats):
        timing.time_prefill(session, prompt, samples)
    joules_before = timing.energy_joules(stack.device)
    ids: list[list[int]] = []
    try:
        for _ in range(cfg.repeats):
            ids = timing.time_generation(session, prompt, cfg.new_tokens, samples, stop_ids=eos)
    finally:  # an interrupted run keeps what it has measured
        record.latencies_ms.extend(value * 1e3 for value in samples.token_s)
    joules = timing.energy_joules(stack.device)
    tokens = len(samples.ttft_s) + len(samples.token_s)
    bandwidth = timing.read_bandwidth(stack.device)
    floor = bytes_per_step(stack.model, batch=cfg.batch, length=prompt.shape[1] + cfg.new_tokens // 2)
    values: dict[str, Any] = {
        "prefill_tok_s": cfg.batch * prompt.shape[1] / statistics.median(samples.prefill_s),
        "ttft_s": statistics.median(samples.ttft_s),
        "bytes_per_token": floor | {"read_bandwidth_gb_s": round(bandwidth / 1e9, 2)},
        "kernels_per_token": timing.kernels_per_step(session, prompt),
    }
    if samples.token_s:
        step = statistics.median(samples.token_s)
        values["decode_tok_s"] = cfg.batch / step
        values["bandwidth_share"] = floor["total"] / step / bandwidth
    if joules is not None and joules_before is not None:
        values["joules_per_token"] = (joules - joules_before) / (tokens * cfg.batch)
    record.set(**values)
    return ids


def _compare_ids(record: Record, ids: list[list[int]], *, stopped_early: bool) -> None:
    """What was timed must be what was checked: the same tokens."""
    check = record.data["check"]
    if check is None:
        return
    checked = check.pop("generated_ids")
    same = all(a[: len(b)] == b if stopped_early else a == b for a, b in zip(checked, ids, strict=True))
    if not same:
        check["passed"] = False
        check["failures"].append("benchmark: the timed generation chose other tokens than the checked one")


def _quality(cfg: Config, stack: Stack, heldout: Path, text: Text) -> dict[str, Any]:
    assert text.encode is not None and text.decode is not None, "held-out text needs a model with text"
    decode, piece = text.decode, heldout.read_bytes()[: cfg.eval_bytes].decode(errors="ignore")
    count = len if cfg.model.tokenizer == "bytes" else lambda ids: len(decode(ids).encode())
    result = bits_per_byte(stack.session, text.encode(piece), count)
    return result | {"file": heldout.name, "eval_bytes": len(piece.encode())}


def _ops(stack: Stack) -> dict[str, Any]:
    """Each op's implementation, and those that call back into Python when a method runs."""
    opaque = {op: name for op, name in stack.ops.items() if (op, name) in registry.OPAQUE}
    return {
        "implementations": stack.ops,
        "user": {
            op: {"files": [path.name for path in user_ops.sources(name)], "sha256": user_ops.digest(name)}
            for op, name in stack.ops.items()
            if user_ops.is_user_op(name)
        },
        "python_callbacks": {
            "prefill": sorted(op for op in opaque if not op.endswith("_decode")),
            "decode": sorted(op for op in opaque if not op.endswith("_prefill")),
        },
        "compiled": {
            name: {"key": artifact.key, "cached": artifact.cached, "compile_s": round(artifact.compile_s, 2)}
            for name, artifact in stack.artifacts.items()
        },
    }


def _memory(stack: Stack) -> dict[str, float]:
    gib = 2.0**30
    seen: dict[int, int] = {}
    state = {tensor.data_ptr() for tensor in stack.arena.tensors.values()}
    for buffer in stack.model.buffers():
        if buffer.data_ptr() not in state:
            seen[buffer.data_ptr()] = buffer.nbytes
    memory = {"weights": sum(seen.values()) / gib, "state": stack.arena.nbytes() / gib}
    if stack.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory |= {
            "peak_allocated": torch.cuda.max_memory_allocated() / gib,
            "peak_reserved": torch.cuda.max_memory_reserved() / gib,
            "device_in_use": (total - free) / gib,
        }
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    memory["peak_host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / gib
    return {name: round(value, 5) for name, value in memory.items()}


def _default_skip(quant: QuantConfig) -> bool:
    return set(quant.skip) == set(NEVER_QUANTISED)


def _eos(cfg: Config, arch) -> set[int] | None:
    if not cfg.eos:
        return None
    if not arch.eos_token_ids:
        raise ValueError("eos=true, and the model's config names no eos_token_id: use eos=false")
    return set(arch.eos_token_ids)
