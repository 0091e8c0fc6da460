"""Every limit of the correctness check, in one table, each with its reason, and the result of a part of the check.

Loosening a limit needs numbers before and after.

"RMSE ratio": `moeexp_kernels.parts.deviation`. "Worst row" is the largest one over the rows of a tensor: a position of the
logits, a head and position of a cache, a head of a recurrent state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tolerance:
    """`value <= limit` passes; a value that is not finite fails."""

    limit: float
    what: str
    reason: str


CALIBRATED = 128  # tokens for which `tokens.noise` stands
TOLERANCES: dict[str, Tolerance] = {
    "trace.complete": Tolerance(
        0.0,
        "tensors of a trace that are missing, surplus or of a wrong shape",
        "a tensor that is not compared is not checked",
    ),
    "trace.finite": Tolerance(0.0, "values that are not finite", "one NaN is a bug, and NaN compares false with any limit"),
    "trace.experts": Tolerance(
        0.0,
        "positions whose expert ids are out of range or repeated",
        "the reference replays these ids: a broken list would be replayed as if it were a choice",
    ),
    "weights.names": Tolerance(
        0.0,
        "parameters or tensors of the snapshot that transformers' loader and ours do not both place",
        "a tensor that is not compared is not checked",
    ),
    "weights.exact": Tolerance(
        0.0,
        "elements of an unquantised tensor that are not the snapshot's, rounded to the dtype of the run",
        "nothing may be lost but that rounding, which is the same everywhere; a swapped or shifted slice differs",
    ),
    "weights.step": Tolerance(
        0.51,
        "distance of a dequantised weight from the nearest value that its group can express, in steps of the group, the worst",
        "hqq rounds last, so half a step; 0.4999 is the worst of tiny and of four other distributions of weights",
    ),
    "weights.clipped": Tolerance(
        2.0,
        "how far a weight of the snapshot lies beyond the outermost value of its group, in steps of the group, the worst",
        "hqq moves the range to fit most weights better: by 1.00 step at most on tiny at 4 bits, 0.6 at 8, no more with heavy "
        "tails, outliers or sparse rows; another tensor's weights lie 5 and more steps beyond",
    ),
    "float32.logits": Tolerance(
        1e-4,
        "RMSE ratio of all logits",
        "two float32 implementations of these layers agree to 1e-6..1e-5; an op off by 1 % shows as 1e-3 or more",
    ),
    "float32.position": Tolerance(
        1e-3,
        "worst row of the logits",
        "one bad row among thousands vanishes in an aggregate (one zeroed row of 32,768: 0.0047)",
    ),
    "float32.decode_step": Tolerance(
        1e-4,
        "RMSE ratio of the logits of one decode step, the worst",
        "decode steps run other kernels than the prompt does and are few beside it, so each answers for itself",
    ),
    "float32.state": Tolerance(
        1e-4,
        "RMSE ratio of one state tensor after the last token, the worst",
        "an error in the state shows in the logits only tokens later, beyond the end of a short check",
    ),
    "float32.state_row": Tolerance(1e-3, "worst row of one state tensor", "as for positions: one head, one cache slot"),
    "float32.choice": Tolerance(
        1e-3,
        "expert choice that the reference did not make: its router-logit gap / sd of that layer's router logits",
        "float32 noise of 1e-6..1e-5 flips ties of that size; 1e-3 is the noise that one position may have by the tolerance "
        "above; neighbouring experts among 256 lie 0.05 sd apart, so a wrong choice exceeds it",
    ),
    "timed.logits": Tolerance(
        1.5,
        "RMSE ratio of all logits / that of transformers in bfloat16",
        "another order of rounding is as good as transformers' own; half as much again is not rounding",
    ),
    "timed.position": Tolerance(
        1.5,
        "worst row of the logits / that of transformers in bfloat16",
        "as above, for the one bad row that an aggregate hides",
    ),
    "timed.choice": Tolerance(
        4.0,
        "expert choice that the reference did not make: its router-logit gap / bfloat16 noise there, which is the rms "
        "error of that layer's router logits in transformers, of that position where that is larger",
        "rounding swaps experts whose logits lie within its noise, and no others; noise differs by position (up to 4 x "
        "the layer's on random weights), so that in units of the layer's alone transformers itself reaches 4 to 17",
    ),
    "timed.choice_own": Tolerance(
        1.5,
        "or so many times what the worst choice of transformers in bfloat16 itself reaches in these units",
        "the largest of 100,000 near-ties: transformers itself reaches 2.1 to 4.3 (12 layers, 160 positions, 8 to 256 "
        "random experts), another order of rounding the same within 1.4 x",
    ),
    "replay.bitwise": Tolerance(
        0.0,
        "elements that a graph replay computes otherwise than the same method run eagerly",
        "the same kernels on the same inputs at the same addresses: anything else is a missed dependency",
    ),
    "generate.tokens": Tolerance(
        0.0,
        "tokens that differ from transformers.generate in float32",
        "float32 leaves near-ties of 1e-5; a trained model's argmax is seldom that close",
    ),
    "tokens.logit_margin": Tolerance(
        1.0,
        "how far a generated token trails the reference's argmax / what is allowed there",
        "greedy decoding may only differ from the reference at a near-tie",
    ),
    "tokens.noise": Tolerance(
        4.0,
        "allowed margin / rms error of transformers in bfloat16 at that position (in float32: of the logits tolerance), of up to "
        "128 tokens; of more see `token_noise`",
        "the difference of two noisy logits has sd 1.4 x that error; the largest of many candidates lies at about 3 sd",
    ),
    "tokens.cap": Tolerance(
        0.05,
        "allowed margin / sd of that position's logits, at most",
        "where bfloat16 is very noisy a wrong token must not pass as a near-tie",
    ),
    "tokens.cap_own": Tolerance(
        1.5,
        "or so many times the largest such margin of transformers' own bfloat16 argmax over all positions",
        "random weights: transformers itself trails by 0.06 to 0.66 sd where its noise is 3 to 10 % (1 to 17 of 160 "
        "positions over 0.05, none over 4 x the noise); trained weights stay below the cap",
    ),
}


@dataclass
class Part:
    """One part of the check. `tolerances`: {tolerance, value, limit, passed, where}; a value that is not finite is None."""

    name: str
    passed: bool
    tolerances: list[dict[str, Any]]
    report: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "tolerances": self.tolerances, "report": self.report}

    def failures(self) -> list[str]:
        """One line for each tolerance that failed."""
        lines = []
        for row in self.tolerances:
            if not row["passed"]:
                value = "not finite" if row["value"] is None else f"{row['value']:.3g}"
                what = TOLERANCES[row["tolerance"]].what
                lines.append(f"{row['tolerance']} at {row['where']}: {value} > {row['limit']:g} ({what})")
        return lines


def worst_rows(name: str, values: Iterable[tuple[float, str]], limit: float | None = None) -> list[dict[str, Any]]:
    """A row for each value over the limit (32 at most), or one for the largest; none where there are no values."""
    rows = [measured(name, *value, limit) for value in values]
    rows.sort(key=lambda row: math.inf if row["value"] is None else row["value"], reverse=True)
    return [row for row in rows if not row["passed"]][:32] or rows[:1]


def measured(name: str, value: float, where: str, limit: float | None = None) -> dict[str, Any]:
    """`limit` only where the table says that it depends on the run."""
    limit = TOLERANCES[name].limit if limit is None else limit
    passed = math.isfinite(value) and value <= limit
    return {"tolerance": name, "value": json_number(value), "limit": limit, "passed": passed, "where": where}


def own_limit(name: str, own: float) -> float:
    """The limit of a tolerance that lets pass what transformers itself does (`own`), with the margin of its `_own` row."""
    limit = TOLERANCES[name].limit
    return max(limit, TOLERANCES[f"{name}_own"].limit * own) if math.isfinite(own) else limit


def token_noise(tokens: int) -> float:
    """`tokens.noise` for a run of so many tokens: as much more as the largest of more draws of the same noise lies further out.

    A tail of exp(-z^2 / 2) at z = limit / sqrt(2), times the number of tokens, stays what it is for 128. By simulation, of runs
    in which 248,320 logits have noise of 2 to 10 % of their sd and no fault, 1 to 6 % exceed 4 with 128 tokens, 5 to 21 % with
    512 and 20 to 60 % with 2,048; this limit 1 to 3 % and 1 to 5 %."""
    limit = TOLERANCES["tokens.noise"].limit
    return math.sqrt(limit**2 + 4.0 * math.log(max(tokens, CALIBRATED) / CALIBRATED))


def make_part(name: str, tolerances: list[dict[str, Any]], report: dict[str, Any]) -> Part:
    return Part(name, all(row["passed"] for row in tolerances), tolerances, report)


def json_number(value: float) -> float | None:
    """JSON knows no NaN or infinity."""
    return float(value) if math.isfinite(value) else None
