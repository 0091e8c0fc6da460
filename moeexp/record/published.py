"""What a record may say of how fast a run was: without a check that passed no speed, and nothing that tells one."""

from __future__ import annotations

from typing import Any

# Of a run that is ok and whose check passed.
SPEEDS = (
    "decode_tok_s", "prefill_tok_s", "ttft_s", "bandwidth_share", "joules_per_token", "stalls", "energy", "verify",
)  # fmt: skip

# What a speed can be worked out from. Where the check passed it stays, also of a run that was interrupted then.
TIMES = (
    "token_latencies_ms", "prefill_latencies_ms", "ttft_latencies_ms", "rounds", "time_split", "step_budget",
)  # fmt: skip


def withheld(record: dict[str, Any]) -> dict[str, None]:
    """The keys that the record's status and check do not allow, each with None. Records that an earlier version finished, and
    those of runs that still go on, may have values there."""
    passed = bool((record["check"] or {}).get("passed"))
    kept = passed and record["status"] == "ok"
    return dict.fromkeys(() if kept else SPEEDS if passed else (*SPEEDS, *TIMES))
