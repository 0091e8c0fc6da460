"""Runs that share weights, in one process: their rounds of timing take turns (A B C A B C …), so that a machine that
gets warmer or slower does so for all of them alike. Each has its own record."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from moeexp_runner import timing
from rich.console import Console

from moeexp.check.verify import References
from moeexp.record.phases import Phases
from moeexp.record.telemetry import watch
from moeexp.run import signals
from moeexp.run.experiment import Experiment
from moeexp.run.identity import confirm
from moeexp.run.job import INTERRUPTED, Job, conclude, open_record, prepare, status_of, verdict
from moeexp.stack.compilers import Compilers
from moeexp.stack.factory import build_model

LEAST_ROUNDS = 5


class Member:
    """One run of the group. A step that fails ends this run and no other; an interrupt ends all."""

    def __init__(self, job: Job):
        self.job = job
        self.record = open_record(job)
        self.phases = Phases(self.record, Console(stderr=True))
        self.config: Any = None
        self.run: Experiment | None = None
        self.exit_code: int | None = None

    @property
    def alive(self) -> bool:
        return self.exit_code is None

    def step(self, action: Callable[[Member], None]) -> None:
        if not self.alive:
            return
        try:
            action(self)
        except Exception as error:
            self.end(error)

    def end(self, error: BaseException | None, *, begun: bool = False) -> None:
        """begun: the error is that of work which all share, so that none was refused before it."""
        if not self.alive:
            return
        sweep = self.job.sweep and not begun
        status = verdict(self.config, self.record) if error is None else status_of(error, sweep=sweep)
        self.exit_code = INTERRUPTED  # it has ended, also where its tracking is interrupted
        self.exit_code = conclude(self.job, self.record, self.phases, self.config, status, error)
        if self.run is not None:
            self.run.close()
            self.run = None
        gc.collect()  # what the traceback held of a run that failed for want of memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def run_group(jobs: Sequence[Job]) -> int:
    """Returns the worst exit code. The jobs agree in all that shared weights hang on (`axes.shares_weights`)."""
    with signals.deferred():  # between a record's first and its last writing nothing ends without a word
        members = [Member(job) for job in jobs]
        try:
            with signals.allowed():
                _run(members)
                signals.raise_if_received()
        except BaseException as error:
            for member in members:
                member.end(error, begun=True)
            if not isinstance(error, (KeyboardInterrupt, Exception)):
                raise
    return max(member.exit_code or 0 for member in members)


def _run(members: list[Member]) -> None:
    for member in members:
        member.step(_prepare)
    ready = [member for member in members if member.alive]
    if not ready:
        return
    if ready[0].config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    references = References()
    with Compilers([member.config for member in ready]) as compilers:
        with ready[0].phases("weights"):
            model = build_model(ready[0].config, ready[0].phases)
        for member in ready:
            member.step(lambda member: confirm(member.config, member.record.data["identity"]))
        for member in ready:
            member.step(lambda member: _run_of(member).build(model, compilers.join))
            if member.alive and member.config.check == "inline":
                member.step(lambda member: _check(member, references))
    _take_turns([member for member in ready if member.alive])
    for member in ready:
        member.step(lambda member: _finish(member, references))
        member.end(None)


def _prepare(member: Member) -> None:
    member.config = prepare(member.job.composed(), member.record, member.phases)
    member.run = Experiment(member.config, Path(member.job.run_dir), member.record, member.phases)


def _check(member: Member, references: References) -> None:
    try:
        _run_of(member).check(references)
    finally:
        references.put_away()  # what one run leaves on the device is memory of the others


def _take_turns(members: list[Member]) -> None:
    """All take part in every round, until each has enough: what is compared was measured in the same rounds."""
    if not members:
        return
    for member in members:
        member.step(_warm_up)
    rounds, order = 0, [member.job.id for member in members]
    with watch(members[0].config.device) as telemetry:
        while any(member.alive and not _has_enough(member, rounds) for member in members):
            for member in members:
                member.step(_round)
            rounds += 1
    for member in members:  # before a check or a profile of any of them
        member.step(lambda member: _run_of(member).after_timing())
    bandwidth = timing.read_bandwidth(members[0].run.stack.device) if members[0].run else None
    for member in members:
        member.step(
            lambda member: _run_of(member).publish(telemetry, bandwidth or timing.read_bandwidth(_run_of(member).stack.device))
        )
        member.record.set(group={"id": order[0], "order": order, "rounds": rounds, "schedule": "in turn"})


def _warm_up(member: Member) -> None:
    _run_of(member).look_for_others()
    with member.phases("benchmark"):
        _run_of(member).benchmark.warm_up()


def _round(member: Member) -> None:
    run = _run_of(member)
    with member.phases("benchmark", quiet=True):
        run.benchmark.round()


def _has_enough(member: Member, rounds: int) -> bool:
    return rounds >= LEAST_ROUNDS and _run_of(member).benchmark.enough()


def _finish(member: Member, references: References) -> None:
    run = _run_of(member)
    member.record.note("memory_gib: peaks and device memory in use are those of the whole group's process")
    member.record.note("first_token_s: from the start of the group's process, in which other runs may have been built before")
    if member.config.check == "separate":
        _check(member, references)
    run.finish()


def _run_of(member: Member) -> Experiment:
    assert member.run is not None
    return member.run
