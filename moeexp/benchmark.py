"""The timing of one session, in rounds that several sessions can take in turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from moeexp_runner import timing
from moeexp_runner.session import Session
from torch import Tensor

from .record import Record
from .schema import Config

# On a GPU, whose clocks rise when it works.
WARM_UP_S = 0.5
# Prefills in one round: as many as fit a quarter of it, so that long prompts do not crowd out the decoding.
MAX_PREFILLS = 10
PREFILL_SHARE = 0.25


@dataclass
class Benchmark:
    """A round times prefills, then whole generations for `min_time_s / repeats`. Raw token latencies go into the record
    after every generation, so that an interrupted run keeps what it has measured.

    prompt [B, T] int64, on the session's device; `eos`: ids that end a generation, or None."""

    cfg: Config
    session: Session
    prompt: Tensor
    eos: set[int] | None
    record: Record
    samples: timing.Samples = field(default_factory=timing.Samples)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # of the last generation
    joules: float | None = 0.0
    seconds: float = 0.0

    def warm_up(self) -> None:
        """Times nothing that counts."""
        unused, start = timing.Samples(), time.perf_counter()
        timing.time_prefill(self.session, self.prompt, unused)
        timing.time_generation(self.session, self.prompt, min(self.cfg.new_tokens, 8), unused)
        while self.session.device.type == "cuda" and time.perf_counter() - start < WARM_UP_S:
            timing.time_generation(self.session, self.prompt, self.cfg.new_tokens, unused)

    def round(self) -> None:
        samples, cfg = self.samples, self.cfg
        prefills, firsts, tokens = len(samples.prefill_s), len(samples.ttft_s), len(samples.token_s)
        start, least = time.perf_counter(), cfg.min_time_s / cfg.repeats
        for _ in range(MAX_PREFILLS):
            timing.time_prefill(self.session, self.prompt, samples)
            if time.perf_counter() - start >= PREFILL_SHARE * least:
                break
        joules = timing.energy_joules(self.session.device)
        while len(samples.ttft_s) == firsts or time.perf_counter() - start < least:
            self._generate()
        self._count_energy(joules)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        new = samples.token_s[tokens:]
        self.rounds.append(
            {
                "at": round(time.time() - seconds, 3),  # seconds since 1970: rounds of other runs lie between these
                "seconds": round(seconds, 4),
                "n": len(new),
                "decode_ms_p50": round(1e3 * statistics.median(new), 5) if new else None,
                "prefill_s": round(statistics.median(samples.prefill_s[prefills:]), 7),
                "ttft_s": round(statistics.median(samples.ttft_s[firsts:]), 7),
            }
        )

    def enough(self) -> bool:
        """Rounds, samples and time, all three."""
        cfg = self.cfg
        count = max(len(self.samples.token_s), len(self.samples.ttft_s))
        return len(self.rounds) >= cfg.repeats and count >= cfg.min_samples and self.seconds >= cfg.min_time_s

    def values(self) -> dict[str, Any]:
        """Record keys; speeds are medians over all samples."""
        samples, batch = self.samples, self.cfg.batch
        found: dict[str, Any] = {
            "prefill_tok_s": batch * self.prompt.shape[1] / statistics.median(samples.prefill_s),
            "ttft_s": statistics.median(samples.ttft_s),
            "rounds": self.rounds,
        }
        if samples.token_s:
            # The tokens of a loop arrive in bursts, of which the median would show the fast ones alone.
            middle = statistics.fmean if self.cfg.cuda_graph in ("loop", "all") else statistics.median
            found["decode_tok_s"] = batch / middle(samples.token_s)
        if self.joules is not None:
            found["joules_per_token"] = self.joules / (batch * (len(samples.ttft_s) + len(samples.token_s)))
        return found

    def _generate(self) -> None:
        before = len(self.samples.token_s)
        try:
            self.ids = timing.time_generation(
                self.session, self.prompt, self.cfg.new_tokens, self.samples, stop_ids=self.eos
            )
        finally:
            self.record.latencies_ms.extend(value * 1e3 for value in self.samples.token_s[before:])

    def _count_energy(self, before: float | None) -> None:
        after = timing.energy_joules(self.session.device)
        known = self.joules is not None and before is not None and after is not None
        self.joules = self.joules + after - before if known else None  # type: ignore[operator]
