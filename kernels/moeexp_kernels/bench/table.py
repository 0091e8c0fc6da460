"""The bench's result as a Markdown table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from moeexp_kernels.bench.measure import OpTiming, PeerTiming

SCHEMA = 1
HEADER = "| op | shape | tokens | µs | MB | TB/s | share of read bandwidth | plain read, µs | peers, µs |"
RULE = "|---|---|---|---|---|---|---|---|---|"


def peer_text(peer: PeerTiming) -> str:
    name = f"{peer.source} `{peer.name}`"
    if peer.us is None:
        return f"{name}: no time ({peer.problem})"
    return f"{name} {peer.us:.1f}{' (part)' if peer.part else ''}"


def line(row: OpTiming) -> str:
    tokens = f"{row.tokens}" if row.phase == "decode" else f"{row.tokens} prefill"
    if row.us is None:
        return f"| {row.op} | {row.shape} | {tokens} | no time: {row.problem} | | | | | |"
    assert row.share is not None and row.read_us is not None
    peers = ", ".join(map(peer_text, sorted(row.peers, key=lambda peer: peer.part)))  # those of the same work first
    speed = f"{row.moved / row.us * 1e-6:.2f}"
    share, plain = f"{100 * row.share:.0f} %", f"{row.read_us:.1f}"
    if row.phase == "prefill" and row.flops:  # there the tensor cores are the limit, not the memory
        share, plain = f"{row.flops / row.us * 1e-6:.0f} TFLOP/s", ""
    return (
        f"| {row.op} | {row.shape} | {tokens} | {row.us:.1f} | {row.moved * 1e-6:.1f} | {speed} | {share} | {plain} | {peers} |"
    )


def markdown(rows: list[OpTiming], environment: dict, absent: dict[str, str]) -> str:
    text = [
        f"{environment['gpu']}, driver {environment['driver']}, torch {environment['torch']}, triton "
        f"{environment['triton']}, tuning table {environment['table']}; a large read runs at "
        f"{environment['read_tb_s']:.2f} TB/s; median under CUDA-graph replay, cold L2, PDL between "
        f"the kernels of one op, as in a decode step; `{environment['command']}`",
        "", HEADER, RULE, *map(line, rows), "",
    ]  # fmt: skip
    timed = [peer for row in rows for peer in row.peers if peer.us is not None]
    covers = {f"{peer.source} `{peer.name}`": peer.covers for peer in timed if peer.part}
    if covers:
        text += ["(part): that peer does only this of the op's work; a time without the mark is of all of it.", ""]
    text += [f"* {name} does {what}." for name, what in sorted(covers.items())]
    text += [f"* {name} is not here: {reason}." for name, reason in sorted(absent.items())]
    return "\n".join(text)


def write_json(path: Path, rows: list[OpTiming], environment: dict, absent: dict[str, str]) -> None:
    """Whole or not at all."""
    document = {
        "schema": SCHEMA, "environment": environment, "absent_peers": absent, "rows": [row.plain() for row in rows],
    }  # fmt: skip
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
