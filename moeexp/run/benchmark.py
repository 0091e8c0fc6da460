"""The timing of one session, in rounds that several sessions can take in turn."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from moeexp_runner import energy, stalls, timing
from moeexp_runner.session import Session
from torch import Tensor

from moeexp.config.schema import Config
from moeexp.record.record import Record

# On a GPU, whose clocks rise when it works.
WARM_UP_S = 0.5
# Prefills in one round: as many as fit a quarter of it, so that long prompts do not crowd out the decoding.
MAX_PREFILLS = 10
PREFILL_SHARE = 0.25
# Of a generation's time, below which its energy says nothing of decoding. Prefills of one prompt have differed by 0.3 %.
DECODE_SHARE = 0.05


@dataclass
class Benchmark:
    """A round times prefills, then whole generations for `min_time_s / repeats`. Raw samples go into the record after
    every prefill and generation, so that an interrupted run keeps what it has measured.

    Of a round, `prefill_s`, `ttft_s` and `decode_ms_p50` are medians, latencies; what its throughput needs are sums: `n`
    steps in `decode_s`, which made `tokens`, and `prefills` in `prefills_s`. With `eos` a sequence that has ended runs along
    until all have: its steps take their time, and what they make is no token of an answer and not counted.

    With `verify_tokens` a round begins with steps of so many tokens over what the generation before it chose, in `verify_s`.

    prompt [B, T] int64, on the session's device; `eos`: ids that end a generation, or None."""

    cfg: Config
    session: Session
    prompt: Tensor
    eos: set[int] | None
    record: Record
    samples: timing.Samples = field(default_factory=timing.Samples)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)  # of the last generation
    verify_s: list[float] = field(default_factory=list)  # of each pass over a generation
    verify_steps: int = 0  # of all passes
    seconds: float = 0.0

    def warm_up(self) -> None:
        """Times nothing that counts."""
        unused, start = timing.Samples(), time.perf_counter()
        timing.time_prefill(self.session, self.prompt, unused)
        timing.time_generation(self.session, self.prompt, min(self.cfg.new_tokens, 8), unused)
        if count := self.cfg.verify_tokens:
            timing.time_verify(self.session, self.prompt, [self.prompt.new_zeros(self.cfg.batch, count)])
        while self.session.device.type == "cuda" and time.perf_counter() - start < WARM_UP_S:
            timing.time_generation(self.session, self.prompt, self.cfg.new_tokens, unused)

    def round(self) -> None:
        samples, cfg = self.samples, self.cfg
        if cfg.verify_tokens and self.ids:
            self._verify()
        prefills, firsts, tokens = len(samples.prefill_s), len(samples.ttft_s), len(samples.token_s)
        start, least = time.perf_counter(), cfg.min_time_s / cfg.repeats
        for _ in range(MAX_PREFILLS):
            timing.time_prefill(self.session, self.prompt, samples)
            self.record.prefill_ms.append(1e3 * samples.prefill_s[-1])
            if time.perf_counter() - start >= PREFILL_SHARE * least:
                break
        while len(samples.ttft_s) == firsts or time.perf_counter() - start < least:
            self._generate()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        new, fed = samples.token_s[tokens:], samples.prefill_s[prefills:]
        self.rounds.append(
            {
                "at": round(time.time() - seconds, 3),  # seconds since 1970: rounds of other runs lie between these
                "seconds": round(seconds, 4),
                "n": len(new),
                "tokens": sum(samples.tokens[tokens:]),
                "decode_s": round(math.fsum(new), 7),
                "decode_ms_p50": round(1e3 * statistics.median(new), 5) if new else None,
                "prefills": len(fed),
                "prefills_s": round(math.fsum(fed), 7),
                "prefill_s": round(statistics.median(fed), 7),
                "ttft_s": round(statistics.median(samples.ttft_s[firsts:]), 7),
            }
        )

    def enough(self) -> bool:
        """Rounds, samples and time, all three."""
        cfg = self.cfg
        if cfg.verify_tokens and len(self.rounds) < 2:  # the first has none to verify
            return False
        count = max(len(self.samples.token_s), len(self.samples.ttft_s))
        return len(self.rounds) >= cfg.repeats and count >= cfg.min_samples and self.seconds >= cfg.min_time_s

    def values(self) -> dict[str, Any]:
        """Record keys; throughputs are tokens over time, over all samples."""
        samples, cfg = self.samples, self.cfg
        found: dict[str, Any] = {
            "prefill_tok_s": timing.throughput(cfg.batch * self.prompt.shape[1] * len(samples.prefill_s), samples.prefill_s),
            "ttft_s": statistics.median(samples.ttft_s),
            "rounds": self.rounds,
        }
        if self.verify_s:
            found["verify"] = self._verified()
        if samples.token_s:
            latencies = [1e3 * value for value in samples.token_s]
            ahead = cfg.loop_ahead if cfg.cuda_graph in ("loop", "all") else 1
            tokens = sum(samples.tokens)
            found["decode_tok_s"] = timing.throughput(tokens, samples.token_s)
            found["stalls"] = stalls.find(latencies, samples.lengths, ahead, tokens / len(latencies))
        return found

    def step_s(self) -> float | None:
        """The mean time of a decode step, of all sequences; None without one."""
        return statistics.fmean(self.samples.token_s) if self.samples.token_s else None

    def energy(self) -> dict[str, Any]:
        """Record keys, of decoding alone: from generations of their own, none of them timed. Nothing where no GPU tells, or, with
        a note, where a generation is nearly all prefill: what is left of it then is no more than two prefills differ by."""
        share = self._decode_share()
        if share is not None and share < DECODE_SHARE:
            self.record.note(
                f"joules_per_token: not measured, as decoding is {share:.1%} of a generation's time, too little to tell from its "
                f"prefill (at least {DECODE_SHARE:.0%})"
            )
            return {}

        def generate(new_tokens: int) -> int:
            unused = timing.Samples()
            timing.time_generation(self.session, self.prompt, new_tokens, unused, stop_ids=self.eos)
            timing.synchronize(self.session.device)
            return sum(unused.tokens)

        read = energy.counter(self.session.device)
        found = energy.of_decoding(generate, self.cfg.new_tokens, read=read)
        return {} if found is None else {"energy": found, "joules_per_token": found["joules"] / found["tokens"]}

    def _decode_share(self) -> float | None:
        """Of the time of a generation; None without a step."""
        samples = self.samples
        if not samples.token_s:
            return None
        decoding = math.fsum(samples.token_s)
        return decoding / (decoding + math.fsum(samples.ttft_s))

    def _verify(self) -> None:
        count, fed = self.cfg.verify_tokens, min(map(len, self.ids)) - 1  # the last token of a generation is not fed
        tokens = torch.tensor([row[:fed] for row in self.ids], device=self.session.device)
        steps = [tokens[:, i : i + count].contiguous() for i in range(0, fed - count + 1, count)]
        if steps:
            self.verify_s.append(timing.time_verify(self.session, self.prompt, steps))
            self.verify_steps += len(steps)

    def _verified(self) -> dict[str, Any]:
        """The record's `verify`: the mean time of a step over all passes, and how many decode steps take as long."""
        step_s, own = math.fsum(self.verify_s) / self.verify_steps, self.step_s()
        return {
            "tokens": self.cfg.verify_tokens, "passes": len(self.verify_s), "steps": self.verify_steps,
            "step_ms": round(1e3 * step_s, 5), "decode_steps": None if own is None else round(step_s / own, 4),
        }  # fmt: skip

    def _generate(self) -> None:
        samples, record = self.samples, self.record
        tokens, firsts = len(samples.token_s), len(samples.ttft_s)
        try:
            self.ids = timing.time_generation(self.session, self.prompt, self.cfg.new_tokens, samples, stop_ids=self.eos)
        finally:
            record.latencies_ms.extend(value * 1e3 for value in samples.token_s[tokens:])
            record.ttft_ms.extend(value * 1e3 for value in samples.ttft_s[firsts:])
