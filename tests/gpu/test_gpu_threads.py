"""The choice of a CPU run's threads, on a machine with many cores: those that have a GPU. `-s` prints the speeds.

MOEEXP_THREADS_MODEL: another model than small, to try the test itself where there are few cores."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from io import StringIO

import common
import pytest
import torch
from rich.console import Console

from moeexp.config import threads
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.sources import load_architecture
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.stack.factory import build_model, build_stack

COUNTS = (1, 2, 4, 8, 16)
# With one thread a token of `small` takes a second.
ROUNDS, STEPS = 5, 4


@pytest.mark.alone
def test_a_run_on_the_cpu_is_within_5_percent_of_the_best_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.delenv(threads.OPENMP)  # which the tests set, and which wins over `auto`
    # One method, which compiles in half the time, and takes the prompt as well.
    model = os.environ.get("MOEEXP_THREADS_MODEL", "small")
    cfg = compose([f"model={model}", "device=cpu", "dispatch=token_by_token", "max_seq_len=128"])
    chosen, most = threads.choose("auto", load_architecture(cfg.model)), threads.granted().cores
    counts = sorted({count for count in COUNTS if count <= most} | {chosen.number})
    before = torch.get_num_threads()
    try:
        speeds = decode_speeds(resolve(replace(cfg, threads=1), cuda_available=False), counts, most, tmp_path)
    finally:
        torch.set_num_threads(before)
    print(f"\n{threads.granted()}\n{chosen}\n{threads.describe(chosen)['waiting']}")
    for count, speed in speeds.items():
        print(f"{count:3} threads {speed:9.2f} tok/s" + ("  chosen" if count == chosen.number else ""))
    assert speeds[chosen.number] >= 0.95 * max(speeds.values())


def decode_speeds(cfg, counts, most, folder):
    """Threads -> tokens per second of the median round; the numbers take turns."""
    phases = Phases(Record(folder / "record.json", id="threads", config=cfg, command=[]), Console(file=StringIO()))
    torch.set_num_threads(most)
    model, prompt, stacks = build_model(cfg, phases), common.random_tokens(1, 1), {}
    rounds = {count: [] for count in counts}
    for count in counts:  # each its own package: its kernels are written for that number
        torch.set_num_threads(count)
        stacks[count] = build_stack(replace(cfg, threads=count), model, phases)
        stacks[count].session.generate(prompt, 2)
    for _ in range(ROUNDS):
        for count, stack in stacks.items():
            torch.set_num_threads(count)
            stack.session.generate(prompt, 2)  # wakes its threads
            start = time.perf_counter()
            stack.session.generate(prompt, STEPS)
            rounds[count].append((prompt.shape[1] + STEPS - 1) / (time.perf_counter() - start))
    for stack in stacks.values():
        stack.close()
    return {count: statistics.median(values) for count, values in rounds.items()}
