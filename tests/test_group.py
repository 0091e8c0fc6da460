"""Runs of one model that take turns in one process, on the CPU with eager methods."""

import dataclasses
import re
from pathlib import Path

import pytest

from moeexp.check import verify
from moeexp.cli import main
from moeexp.config.axes import shares_weights
from moeexp.config.compose import compose
from moeexp.record.record import read_record
from moeexp.run import group
from moeexp.run.benchmark import Benchmark
from moeexp.run.job import Job

QUICK = ["model=nano", "tracker=jsonl", "export=eager", "new_tokens=5", "prompt_len=9"]
QUICK += ["repeats=1", "min_samples=1", "min_time_s=0"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jobs(*cells):
    found = []
    for number, overrides in enumerate(cells):
        folder = Path(f"{number}")
        folder.mkdir()
        config = dataclasses.asdict(compose([*QUICK, *overrides]))
        found.append(Job(f"ab.{number}", str(folder), config, [*QUICK, *overrides], ["python"], sweep=True))
    return found


def records(count):
    return [read_record(Path(str(number)) / "record.json") for number in range(count)]


@pytest.mark.slow
def test_members_take_turns_and_each_has_its_record():
    assert group.run_group(jobs([], ["ops.gdn_decode=einsum"], ["batch=2"])) == 0
    found = records(3)
    assert [record["status"] for record in found] == ["ok"] * 3
    for record in found:
        assert record["group"] == {
            "id": "ab.0", "order": ["ab.0", "ab.1", "ab.2"], "rounds": group.LEAST_ROUNDS, "schedule": "in turn",
        }  # fmt: skip
        assert len(record["rounds"]) == group.LEAST_ROUNDS and record["decode_tok_s"] > 0 and record["check"]["passed"]
    # A B C A B C …
    starts = sorted((entry["at"], number) for number, record in enumerate(found) for entry in record["rounds"])
    assert [number for _, number in starts] == [0, 1, 2] * group.LEAST_ROUNDS
    assert found[0]["generated_ids"] == found[1]["generated_ids"] == found[2]["generated_ids"][:1]
    # The same tokens and experts: one reference serves both, and another batch has its own.
    assert [record["check"]["reused"] for record in found] == [[], ["reference"], []]
    assert found[0]["phases_s"]["weights"] > 0 and "weights" not in found[1]["phases_s"], "the weights are made once"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_one_that_fails_or_may_not_run_stops_no_other(monkeypatch, kind):
    real = group.Experiment.check

    def check(self, references):
        if self.cfg.batch == 2:
            raise kind("boom")
        real(self, references)

    monkeypatch.setattr(group.Experiment, "check", check)
    assert group.run_group(jobs([], ["batch=2"], ["new_tokens=0"])) == 2
    first, second, third = records(3)
    assert [record["status"] for record in (first, second, third)] == ["ok", "failed", "unsupported"]
    assert second["error"]["message"] == "boom" and second["rounds"] is None
    assert first["group"]["order"] == ["ab.0"]


def test_weights_that_cannot_be_read_fail_all_members(monkeypatch):
    def build_model(*_):
        raise ValueError("no such tensor")

    monkeypatch.setattr(group, "build_model", build_model)
    assert group.run_group(jobs([], ["ops.gdn_decode=einsum"])) != 0
    assert [record["status"] for record in records(2)] == ["failed", "failed"]


def test_an_interrupt_ends_all_and_keeps_what_was_measured(monkeypatch):
    real, calls = Benchmark.round, []

    def round(self):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Benchmark, "round", round)
    assert group.run_group(jobs([], ["ops.gdn_decode=einsum"])) == 130
    first, second = records(2)
    assert [record["status"] for record in (first, second)] == ["interrupted"] * 2
    assert first["token_latencies_ms"]["n"] == 8 and second["token_latencies_ms"]["n"] == 4


def test_who_shares_weights():
    def key(*overrides):
        return shares_weights(compose(["model=nano", *overrides]))

    assert key() == key("batch=2") == key("ops.gdn_decode=einsum") == key("state=explicit") == key("cuda_graph=true")
    others = [key("quant=none"), key("dtype=bfloat16"), key("model.seed=1"), key("engine=transformers")]
    assert len({key(), *others}) == 5


@pytest.mark.slow
def test_groups_of_a_sweep_and_their_repetition(capsys):
    arguments = ["-m", *QUICK, "quant=none,int4", "ops.gdn_decode=reference,einsum", "launcher.isolation=group"]
    assert main(arguments) == 0
    found = {record["id"].split(".")[1]: record for record in map(read_record, Path("multirun").rglob("record.json"))}
    assert [len(found[number]["group"]["order"]) for number in "0123"] == [2] * 4
    assert found["0"]["group"]["id"] == found["1"]["group"]["id"] != found["2"]["group"]["id"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "4 of 4 cells had run before" in capsys.readouterr().out
    # One of a group is gone: its group runs again as a whole, the other is reused.
    (gone,) = (path for path in Path("multirun").rglob("record.json") if not path.is_symlink() and path.parent.name == "1")
    gone.unlink()
    assert main(arguments) == 0
    assert re.search(r"2 of 4 cells had run before", capsys.readouterr().out)


@pytest.mark.slow
def test_a_bfloat16_run_shares_its_references_and_not_what_its_ops_compute():
    cells = [["dtype=bfloat16"], ["dtype=bfloat16", "state=explicit"], ["dtype=bfloat16", "ops.gdn_decode=einsum"]]
    assert group.run_group(jobs(*cells, cells[0])) == 0
    found = records(4)
    assert [record["status"] for record in found] == ["ok"] * 4
    reused = [set(record["check"]["reused"]) for record in found]
    assert {"reference", "bf16 baseline", "bf16 reference"} <= reused[1]
    assert ["float32" in names for names in reused] == [False, False, False, True]


@pytest.mark.slow
def test_the_same_tokens_in_another_shape_are_another_prompt():
    cells = [["prompt_ids=[5,6,5,6]", "prompt_len=null"], ["prompt_ids=[5,6]", "prompt_len=null", "batch=2"]]
    assert group.run_group(jobs(*cells)) == 0
    assert [record["status"] for record in records(2)] == ["ok"] * 2


def test_references_that_are_not_kept_are_made_again(monkeypatch):
    monkeypatch.setattr(verify, "KEPT_BYTES", 0)
    assert group.run_group(jobs([], [])) == 0
    found = records(2)
    assert [(record["status"], record["check"]["reused"]) for record in found] == [("ok", [])] * 2


def test_a_run_whose_tracking_is_interrupted_stays_complete(monkeypatch):
    def finished(members):
        for member in members:
            group._prepare(member)
            member.record.set(check={"passed": True, "parts": [], "failures": []}, decode_tok_s=5.0)
            member.end(None)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(group, "_run", finished)
    monkeypatch.setattr("moeexp.record.tracker.track", interrupted)
    assert group.run_group(jobs([], [])) == 130
    first, second = records(2)
    assert first["status"] == "ok" and first["decode_tok_s"] == 5.0 and second["status"] == "interrupted"
