"""Checks a case, then times it; likewise its peers. Nothing gets a time whose check is red."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field

from moeexp_kernels.bench.case import Case, red
from moeexp_kernels.bench.peers import SOURCES, Peer, Unavailable
from moeexp_kernels.bench.peers.peer import WHOLE
from moeexp_kernels.bench.timing import Reader, calls_for, graph_samples
from moeexp_kernels.parts import tuning


@dataclass
class PeerTiming:
    source: str
    name: str
    covers: str
    us: float | None = None
    problem: str | None = None  # why there is no time

    @property
    def part(self) -> bool:
        """Its time is of less work than our op's."""
        return self.covers != WHOLE


@dataclass
class OpTiming:
    op: str
    shape: str
    phase: str
    tokens: int
    moved: int
    flops: int
    check: list
    problem: str | None = None
    us: float | None = None
    samples: list[float] = field(default_factory=list)
    read_us: float | None = None  # a plain read of as many bytes
    share: float | None = None  # of the read bandwidth measured in this run
    tables: dict[str, str] = field(default_factory=dict)  # op of the tuning table -> the table that answered
    peers: list[PeerTiming] = field(default_factory=list)

    def plain(self) -> dict:
        return asdict(self)


def measure(case: Case, reader: Reader, arch: str) -> OpTiming:
    results = case.check()
    row = OpTiming(
        op=case.op, shape=case.shape, phase=case.phase, tokens=case.tokens, moved=case.moved, flops=case.flops,
        check=[list(result) for result in results], problem=red(results),
        tables={op: tuning.source(op, key, arch) for op, key in case.tuned},
    )  # fmt: skip
    if row.problem is not None:
        return row
    row.samples = graph_samples(
        lambda copy: case.call(**copy), case.copies, calls=calls_for(case.phase, len(case.copies))
    )  # fmt: skip
    row.us = statistics.median(row.samples)
    row.read_us = reader.microseconds(case.moved)
    row.share = case.moved / row.us * 1e6 / reader.bandwidth
    return row


def measure_peer(source: str, peer: Peer, phase: str) -> PeerTiming:
    row = PeerTiming(source, peer.name, peer.covers)
    row.problem = red(peer.check())
    if row.problem is None:
        samples = graph_samples(peer.call, peer.copies, calls=calls_for(phase, len(peer.copies)))
        row.us = statistics.median(samples)
    return row


def unavailable_sources() -> dict[str, str]:
    """Sources of peers that are not here -> why."""
    found = {}
    for name, module in SOURCES.items():
        try:
            module.available()
        except Unavailable as reason:
            found[name] = " ".join(str(reason).split())
    return found


def measure_peers(case: Case, absent: dict[str, str]) -> list[PeerTiming]:
    """One row per peer that does the case. Someone else's code that raises is a row that says so: it must not end ours."""
    rows = []
    for source, module in SOURCES.items():
        if source in absent:
            continue
        for make in module.OPS.get(case.op, []):
            try:
                peer = make(case)
                if peer is not None:
                    rows.append(measure_peer(source, peer, case.phase))
            except Exception as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                rows.append(PeerTiming(source, make.__name__, "", problem=problem))
    return rows
