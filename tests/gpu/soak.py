"""A session that decodes for long: `make soak`. Prompts of many lengths, a reset before each, the step captured anew every so
often. Memory must not grow after the first tenth, latencies must stay, and the last prompt's tokens must be those of a fresh
process. Writes soak.json and soak.svg to --out; exit code 1 where something does not hold.

    python tests/gpu/soak.py --minutes 8 --steps 200000 --out results/soak_h100 [override …]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / room) for room in ("", "kernels", "runner")]
CONFIG = ["model=qwen3_5_35b_a3b", "quant=int4", "export=eager", "cuda_graph=loop", "max_seq_len=1024"]
PROMPTS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 511, 512, 700)
NEW_TOKENS = (1, 2, 9, 64, 128, 256, 300, 320, 255, 257)
RECAPTURE = 40  # prompts from one capture to the next
MIB = 2**20
# What may differ after the first tenth. Device memory is counted by torch to the byte; the driver's and the host's count holds
# what other threads do.
GROWTH = {"allocated": 0, "reserved": 0, "driver": 2 * MIB, "host": 32 * MIB}
DRIFT = 0.05  # of the median latency of a tenth of the run, against that of the whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="at least so long")
    parser.add_argument("--steps", type=int, default=200_000, help="and at least so many decode steps")
    parser.add_argument("--out", type=Path, default=Path("outputs/soak"), help="folder for soak.json and soak.svg (outputs/soak)")
    parser.add_argument("--only", type=int, help="decode this prompt alone and print its tokens")
    parser.add_argument("overrides", nargs="*", help=f"of the config; by default {' '.join(CONFIG)}")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: a soak is of a captured step on a GPU", file=sys.stderr)
        return 2
    stack = build(arguments.overrides or CONFIG)
    if arguments.only is not None:
        print(json.dumps(decode(stack, arguments.only)[0]))
        return 0
    rows, ids, seconds = soak(stack, arguments.minutes, arguments.steps)
    again = [sys.executable, __file__, "--only", str(rows[-1]["prompt"]), *arguments.overrides]
    stack.close()
    del stack
    torch.cuda.empty_cache()
    fresh = subprocess.run(again, capture_output=True, text=True)
    found = summary(rows, seconds, ids == (json.loads(fresh.stdout.splitlines()[-1]) if fresh.returncode == 0 else fresh.stderr))
    found |= {"config": arguments.overrides or CONFIG, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(found | {"prompts": rows[:: max(1, len(rows) // 400)]}, indent=1) + "\n")
    (arguments.out / "soak.svg").write_text(plot(rows))
    print(json.dumps({name: value for name, value in found.items() if name != "tenths"}, indent=1))
    return 0 if found["holds"] else 1


def build(overrides):
    from rich.console import Console

    from moeexp.config.compose import compose
    from moeexp.config.resolve import resolve
    from moeexp.config.validate import validate
    from moeexp.record.phases import Phases
    from moeexp.record.record import Record
    from moeexp.stack.factory import build_model, build_stack

    cfg = compose(overrides)
    validate(cfg, cuda_available=True)
    cfg = resolve(cfg, cuda_available=True)
    record = Record(Path(tempfile.mkdtemp()) / "record.json", id="soak", config=cfg, command=[])
    phases = Phases(record, Console(file=StringIO()))
    return build_stack(cfg, build_model(cfg, phases), phases)


def decode(stack, prompt):
    """Prompt number `prompt`: (its new tokens, milliseconds from token to token)."""
    import torch

    length, new_tokens = PROMPTS[prompt % len(PROMPTS)], NEW_TOKENS[prompt % len(NEW_TOKENS)]
    session, generator = stack.session, torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, session.vocab_size, (session.batch, length), generator=generator).to(session.device)
    times: list[float] = []
    found = session.generate(ids, new_tokens, on_token=lambda ids, index: times.append(time.perf_counter()))
    return found, [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]


def soak(stack, minutes, least):
    rows, steps, prompt, start = [], 0, 0, time.monotonic()
    while True:
        if prompt and prompt % RECAPTURE == 0:
            stack.session.loop.graph.invalidate()  # and the next reset captures it anew
        ids, latencies = decode(stack, prompt)
        steps += len(latencies)
        rows.append(
            {"prompt": prompt, "at_s": round(time.monotonic() - start, 2), "steps": steps, **memory(), **middle(latencies)}
        )
        if rows[-1]["at_s"] >= 60 * minutes and steps >= least:
            return rows, ids, time.monotonic() - start
        prompt += 1


def middle(latencies):
    """Median and 99th percentile of a prompt's steps in ms; of a few steps none."""
    if len(latencies) < 50:
        return {"p50_ms": None, "p99_ms": None}
    ordered = sorted(latencies)
    return {"p50_ms": round(statistics.median(ordered), 4), "p99_ms": round(ordered[int(0.99 * len(ordered))], 4)}


def memory():
    import psutil
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "driver": total - free,
        "host": psutil.Process().memory_info().rss,
    }  # fmt: skip


def summary(rows, seconds, same_tokens):
    """What holds, of the first tenth against the rest, and of each tenth's latency against the whole."""
    end = rows[-1]["at_s"]
    tenths = [[row for row in rows if end * i / 10 < row["at_s"] <= end * (i + 1) / 10] for i in range(10)]
    rest = [row for tenth in tenths[1:] for row in tenth]
    grown = {name: max(row[name] for row in rest) - max(row[name] for row in tenths[0]) for name in GROWTH}
    p50 = [statistics.median(row["p50_ms"] for row in tenth if row["p50_ms"]) for tenth in tenths]
    p99 = [statistics.median(row["p99_ms"] for row in tenth if row["p99_ms"]) for tenth in tenths]
    drift = max(abs(value / statistics.median(p50) - 1) for value in p50)
    wrong = [f"{name} grew by {grown[name]} bytes, {limit} are allowed" for name, limit in GROWTH.items() if grown[name] > limit]
    if drift > DRIFT:
        wrong.append(f"the median latency of a tenth is off by {drift:.1%}, {DRIFT:.0%} is allowed")
    if not same_tokens:
        wrong.append("a fresh process chose other tokens for the last prompt")
    return {
        "holds": not wrong, "wrong": wrong, "minutes": round(seconds / 60, 2), "prompts_decoded": len(rows),
        "decode_steps": rows[-1]["steps"], "recaptures": (len(rows) - 1) // RECAPTURE, "grown_bytes": grown,
        "same_tokens_as_a_fresh_process": same_tokens, "p50_ms": statistics.median(p50), "drift": round(drift, 4),
        "tenths": {"p50_ms": p50, "p99_ms": p99},
    }  # fmt: skip


def plot(rows):
    """Three curves over time, each in its own panel, as SVG."""
    width, height, left = 860, 150, 90
    curves = [
        ("latency of a step, p50 and p99 of each prompt, ms", ["p50_ms", "p99_ms"], 1),
        ("device memory in use, GiB", ["driver", "allocated"], 2**30),
        ("host memory of the process, GiB", ["host"], 2**30),
    ]
    end, parts = rows[-1]["at_s"], []
    for panel, (title, names, unit) in enumerate(curves):
        top = panel * (height + 46) + 28
        values = {name: [(row["at_s"], row[name] / unit) for row in rows if row[name] is not None] for name in names}
        high = 1.1 * max(value for points in values.values() for _, value in points)
        parts.append(f'<text x="{left}" y="{top - 8}">{title}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width - left - 10}" height="{height}" fill="none" stroke="#bbb"/>')
        for value in (0, high / 2, high):
            y = top + height * (1 - value / high)
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for name, colour in zip(names, ("#1f6feb", "#d1762b"), strict=False):
            line = " ".join(
                f"{left + (width - left - 10) * at / end:.1f},{top + height * (1 - value / high):.1f}"
                for at, value in values[name]
            )
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1"><title>{name}</title></polyline>'
            )
    bottom = 3 * (height + 46) + 10
    parts.append(f'<text x="{left}" y="{bottom}">0 to {end / 60:.1f} minutes, {rows[-1]["steps"]:,} decode steps</text>')
    size = f'width="{width}" height="{bottom + 14}" viewBox="0 0 {width} {bottom + 14}"'
    style = 'font-family="sans-serif" font-size="13"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    raise SystemExit(main())
