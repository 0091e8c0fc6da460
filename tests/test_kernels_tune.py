"""The tuner without its clock: which candidate wins, that a wrong one cannot, and what is written when."""

from __future__ import annotations

import json
import math
import time

import kernels_common  # noqa: F401  before triton
import pytest
import torch
from moeexp_kernels.bench import tune as tuner
from moeexp_kernels.bench.candidates import Target
from moeexp_kernels.bench.cases import Spec
from moeexp_kernels.parts import tuning

OP, KEY, ARCH = "router_gemv", "plain16/256x2048", "sm_90"
FIRST = {"BLOCK_N": 2, "TILES": 1, "CACHE": "", "num_warps": 4, "TOGETHER": 1, "VECTOR": 4}


class FakeCase:
    """Its result is wrong, or its launch impossible, at the given BLOCK_N; its time is the table's."""

    shape, phase, copies = "fake", "decode", [{}]

    def __init__(self, times: dict[int, float], wrong: int = 0, refused: int = 0):
        self.times, self.wrong, self.refused = times, wrong, refused

    def row(self) -> dict:
        return tuning.lookup(OP, KEY, ARCH)

    def check(self):
        if self.row()["BLOCK_N"] == self.refused:
            raise ValueError("too large")
        return [("output", 0.5 if self.row()["BLOCK_N"] == self.wrong else 0.0, 1e-3, 0.0)]

    def call(self, **_):
        """Timed by `timed`."""


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A tuner whose clock is a table: call it with {BLOCK_N: microseconds} and get (row, lines)."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    tuning.write_table(tuning.DEFAULT, {OP: {"": FIRST}}, {})

    def choose(times, *, wrong=0, refused=0, deadline=math.inf):
        case = FakeCase(times, wrong, refused)
        monkeypatch.setattr(tuner, "build", lambda *_: case)
        monkeypatch.setattr(tuner, "graph_samples", lambda *_, **__: [case.times[case.row()["BLOCK_N"]]])
        candidates = tuple({"BLOCK_N": block} for block in times)
        target = Target(OP, KEY, (Spec("router", "decode", 1),), candidates)
        return target, lambda: tuner.choose(target, ARCH, 0, deadline)

    yield choose
    tuning.forget()


def test_the_fastest_wins_and_keeps_what_it_does_not_name(tuned):
    row, lines = tuned({2: 5.0, 4: 3.0, 8: 4.0})[1]()
    assert row == {**FIRST, "BLOCK_N": 4}
    assert len(lines) == 3 and "best" in lines[1] and "best" not in lines[2]


def test_a_wrong_or_impossible_candidate_cannot_win(tuned):
    row, lines = tuned({2: 5.0, 4: 1.0, 8: 2.0, 16: 4.0}, wrong=4, refused=8)[1]()
    assert row["BLOCK_N"] == 16
    assert "wrong at fake: output" in lines[1] and "ValueError: too large" in lines[2]


def test_a_gain_within_the_noise_changes_nothing(tuned):
    row, _ = tuned({2: 5.0, 4: 4.99})[1]()
    assert row == FIRST


def test_a_wrong_row_is_replaced_even_by_a_slower_one(tuned):
    row, lines = tuned({2: 1.0, 4: 9.0}, wrong=2)[1]()
    assert row["BLOCK_N"] == 4 and "wrong" in lines[0]


class FakeChain:
    """Its time by BLOCK_N, each the next of a list."""

    def __init__(self, times: dict[int, list[float]]):
        self.times = times

    def microseconds(self) -> float:
        times = self.times[tuning.lookup(OP, KEY, ARCH)["BLOCK_N"]]
        return times.pop(0) if len(times) > 1 else times[0]


def test_in_a_chain_its_time_decides_and_must_show_twice(tuned):
    target, _ = tuned({2: 5.0, 4: 9.0, 8: 1.0})  # by themselves 8 would win
    row, _ = tuner.choose(target, ARCH, 0, math.inf, FakeChain({2: [30.0], 4: [29.0], 8: [29.5]}))
    assert row["BLOCK_N"] == 4
    row, _ = tuner.choose(target, ARCH, 0, math.inf, FakeChain({2: [30.0], 4: [29.0, 30.1], 8: [31.0]}))
    assert row["BLOCK_N"] == 2, "what was faster once and then not is noise"


def test_a_row_that_is_wrong_has_no_time_in_a_chain(tuned):
    target, _ = tuned({2: 5.0, 4: 9.0}, wrong=4)
    assert tuner.choose(target, ARCH, 0, math.inf, FakeChain({2: [30.0], 4: [1.0]}))[0]["BLOCK_N"] == 2


def test_nothing_right_is_an_error(tuned):
    with pytest.raises(RuntimeError, match="no candidate of router_gemv"):
        tuned({2: 1.0}, wrong=2)[1]()


def test_time_that_is_up_is_said(tuned):
    row, lines = tuned({2: 5.0, 4: 3.0}, deadline=time.monotonic() - 1)[1]()
    assert row == FIRST and "out of time" in lines[-1]


def test_tune_writes_the_row_into_the_architecture_s_table(tuned, monkeypatch, tmp_path, capsys):
    target, _ = tuned({2: 5.0, 4: 3.0})
    tuning.write_table(ARCH, {"sample": {"": {"BLOCK": 1}}}, {"device": "before"})
    monkeypatch.setattr(tuner, "targets", lambda ops: [target])
    monkeypatch.setattr(tuner, "cold_bytes", lambda device: 0)
    monkeypatch.setattr(tuning, "current_architecture", lambda: ARCH)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert tuner.tune(["router"], processes=1, budget=60.0, command="tune router") == 0
    written = json.loads((tmp_path / f"{ARCH}.json").read_text())
    assert written[OP] == {KEY: {**FIRST, "BLOCK_N": 4}}
    assert written["sample"] == {"": {"BLOCK": 1}}, "rows of other ops stay"
    about = written["_about"]
    assert (about["device"], about["command"]) == ("a GPU", "tune router") and about["before"] == [{"device": "before"}]
    assert tuner.tune(["router"], processes=1, budget=60.0, command="tune again") == 0
    again = json.loads((tmp_path / f"{ARCH}.json").read_text())["_about"]
    assert [run.get("command") for run in (again, *again["before"])] == ["tune again", "tune router", None]
    assert tuning.source(OP, KEY, ARCH) == ARCH
    assert str(tmp_path) in capsys.readouterr().out


def test_a_run_without_time_writes_nothing(tuned, monkeypatch, tmp_path, capsys):
    target, _ = tuned({2: 5.0, 4: 3.0})
    monkeypatch.setattr(tuner, "targets", lambda ops: [target])
    monkeypatch.setattr(tuner, "cold_bytes", lambda device: 0)
    monkeypatch.setattr(tuning, "current_architecture", lambda: ARCH)
    assert tuner.tune(["router"], processes=1, budget=-1.0, command="") == 0
    assert not (tmp_path / f"{ARCH}.json").exists()
    out = capsys.readouterr().out
    assert "out of time before router_gemv" in out and "nothing written" in out
