"""Names of earlier versions: refused in one line wherever a user writes them, read anew in records; what is gone likewise."""

import copy
import json
import re
from pathlib import Path

import pytest
import synthetic
import yaml
from test_cli import experiment

from moeexp.cli import main
from moeexp.config.compose import compose
from moeexp.record import renamed
from moeexp.record.record import full_config, read_record
from moeexp.report.command_line import arguments_of, given_of
from moeexp.report.runs import runs_of

DATA = Path(__file__).with_name("data")


def answer(capsys, *arguments):
    code = main([*arguments, "model=nano", "tracker=jsonl"], experiment=experiment)
    (line,) = capsys.readouterr().err.splitlines()
    return code, line


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "write"),
    [
        (["overlap=true"], "pdl=true"), (["overlap=false"], "pdl=false"), (["+overlap=true"], "pdl=true"),
        (["++overlap=null"], "pdl=null"), (["~overlap"], "pdl=…"), (["-m", "overlap=true,false"], "pdl=true,false"),
        (["overlap=" + "x" * 500], "pdl=…"), (["overlap=a\nb"], r"pdl=a\nb"),
    ],
)  # fmt: skip
def test_on_the_command_line(capsys, arguments, write):
    assert answer(capsys, *arguments) == (2, f"error: overlap is now named pdl: write {write}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"overlap": True}, "In 'experiment/own': overlap is now named pdl: write pdl"),
        ({"launcher": {"design": "d", "cells": [{"name": "a", "set": ["overlap=false"]}]}},
         "overlap is now named pdl: write pdl=false"),
        ({"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"overlap": "true,false"}}}},
         "overlap is now named pdl: write pdl=true,false"),
    ],
    ids=["setting", "cell", "sweeper"],
)  # fmt: skip
def test_in_a_users_own_files(tmp_path, capsys, content, said):
    path = tmp_path / "conf" / "experiment" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + yaml.safe_dump(content))
    assert answer(capsys, f"--config-dir={tmp_path / 'conf'}", "experiment=own") == (2, f"error: {said}")


GONE = "l2_prefetch was removed: it showed no gain (docs/log.md); leave it out"


@pytest.mark.parametrize(
    "arguments",
    [["l2_prefetch=true"], ["l2_prefetch=false"], ["+l2_prefetch=true"], ["~l2_prefetch"], ["-m", "l2_prefetch=true,false"]],
)
def test_a_setting_that_is_gone(capsys, arguments):
    assert answer(capsys, *arguments) == (2, f"error: {GONE}")


@pytest.mark.parametrize(
    ("content", "where"),
    [({"l2_prefetch": True}, "In 'experiment/own': "),
     ({"launcher": {"design": "d", "cells": [{"name": "a", "set": ["l2_prefetch=false"]}]}}, "")],
    ids=["setting", "cell"],
)  # fmt: skip
def test_a_setting_that_is_gone_in_a_users_own_files(tmp_path, capsys, content, where):
    path = tmp_path / "conf" / "experiment" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + yaml.safe_dump(content))
    assert answer(capsys, f"--config-dir={tmp_path / 'conf'}", "experiment=own") == (2, f"error: {where}{GONE}")


def test_a_record_with_a_setting_that_is_gone_is_read_and_repeated_where_it_was_off(tmp_path):
    record = read_record(written(tmp_path, with_old_names()))
    assert record["config"]["l2_prefetch"] is False
    assert not [one for one in arguments_of(record) if "l2_prefetch" in one]
    record["config"]["l2_prefetch"] = True
    with pytest.raises(ValueError, match=f"^the record's {re.escape(GONE)}$"):
        arguments_of(record)
    record["command"].append("l2_prefetch=true")
    assert "l2_prefetch=true" in given_of(record), "a report shows it as it was given"
    record["config"]["l2_prefetch"] = "x"
    with pytest.raises(ValueError, match="l2_prefetch='x' is not of type bool"):
        arguments_of(record)


def test_a_setting_that_is_gone_is_what_runs_before_and_since_differ_in():
    since = synthetic.record("cuda_graph=false")
    before = [since | {"id": str(on), "config": since["config"] | {"l2_prefetch": on}} for on in (True, False)]
    assert [run.settings for run in runs_of([since, before[0]])] == [{"l2_prefetch": "false"}, {"l2_prefetch": "true"}]
    assert [run.settings for run in runs_of([since, before[1]])] == [{}, {}]


def test_a_cell_of_the_ladder(capsys):
    given = ["-m", "experiment=ladder", "quant=int4", "launcher.only=['kernels start early']"]
    said = "error: launcher.only=kernels start early: that cell is now named pdl: write launcher.only=[pdl]"
    assert answer(capsys, *given) == (2, said)


def test_what_only_resembles_one_is_left_alone(tmp_path, capsys):
    assert compose(["prompt=overlap"]).prompt == "overlap" and compose(["model=nano", "pdl=false"]).pdl is False
    (tmp_path / "overlap").mkdir()
    assert main(["--config-dir", "overlap", "model=nano", "tracker=jsonl"], experiment=experiment) == 0


def with_old_names(**changes):
    """A run of schema 2 that used every name that has changed since."""
    old = json.loads((DATA / "record_2.json").read_text())
    old["config"] |= {"overlap": False, "cuda_graph": True, "device": "cuda"}
    old["config"]["launcher"]["cells"] = [{"name": "a", "set": ["overlap=false", "batch=1"]}]
    old["overrides"] = [*old["overrides"], "overlap=false", "cuda_graph=true"]
    old["command"] = [*old["command"], "overlap=false", "prompt=overlap=1"]
    old["check"]["apart"] = {"from": "a", "sequence": 0, "position": 5, "other_choice_from": None}
    old["check"]["failures"] = ["tokens: tokens.deficit at batch 0: 2 > 1 (it trails)"]
    old |= {"design": {"name": "ladder", "cell": "kernels start early", "index": 11}, "not_applicable": ["overlap", "allocator"]}
    return old | changes


def written(tmp_path, data, name="record.json"):
    (tmp_path / name).write_text(json.dumps(data))
    return tmp_path / name


def test_an_old_record_is_read_under_the_names_of_today(tmp_path):
    old = with_old_names()
    kept = copy.deepcopy(old)
    record = read_record(written(tmp_path, old))
    assert record["config"]["pdl"] is False and "overlap" not in record["config"]
    assert record["config"]["launcher"]["cells"] == [{"name": "a", "set": ["pdl=false", "batch=1"]}]
    assert record["overrides"][-2:] == ["pdl=false", "cuda_graph=true"] and record["not_applicable"] == ["pdl", "allocator"]
    assert record["command"][-2:] == ["pdl=false", "prompt=overlap=1"], "what a user wrote is his"
    assert record["design"]["cell"] == "pdl" and record["ops"]["pdl_edges"] is None
    check = record["check"]
    assert check["first_divergence"]["position"] == 5 and check["failures"] == [
        "tokens: tokens.logit_margin at batch 0: 2 > 1 (it trails)"
    ]
    (tokens,) = [part for part in check["parts"] if part["name"] == "tokens"]
    assert [row["tolerance"] for row in tokens["tolerances"]] == ["tokens.logit_margin"] and "gates" not in tokens
    assert tokens["report"]["largest_logit_margin"] == 0.0
    assert old == kept and renamed.record(renamed.record(old)) == renamed.record(old), "pure, and once is enough"


def test_an_old_record_is_repeated_under_the_names_of_today(tmp_path):
    record = read_record(written(tmp_path, with_old_names()))
    assert "pdl=false" in arguments_of(record) and not [one for one in arguments_of(record) if "overlap" in one]
    assert "pdl=false" in given_of(record)


def test_the_whole_config_beside_an_old_record_too(tmp_path):
    import hashlib

    config = with_old_names()["config"]
    path = written(tmp_path, config, "config.json")
    known = {"full_config": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    record = read_record(written(tmp_path, with_old_names(**known)))
    assert full_config(record, tmp_path / "record.json")["pdl"] is False


@pytest.mark.parametrize(
    "damage", [None, [], 3, "x", [None], {"parts": None}, {"parts": [None, 3, {"gates": [None, {"gate": []}]}]}]
)
@pytest.mark.parametrize("key", ["config", "check", "overrides", "design", "ops", "not_applicable"])
def test_a_damaged_old_record_is_one_line(tmp_path, key, damage):
    try:
        read_record(written(tmp_path, with_old_names(**{key: damage})))
    except ValueError as error:
        assert "\n" not in str(error) and "no whole record" in str(error)


def test_both_names_in_one_config_are_refused(tmp_path):
    both = with_old_names()
    both["config"]["pdl"] = True
    with pytest.raises(ValueError, match="'overlap', which is no setting"):
        arguments_of(read_record(written(tmp_path, both)))
