"""The W&B Report: its specification offline, and what happens where it cannot be saved."""

import json

import pytest
import synthetic

from moeexp.report import __main__ as report_command
from moeexp.report import wandb


@pytest.fixture(autouse=True)
def logged_out(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


def records():
    return synthetic.grid({("quant=none", "export=eager"): 4.0, ("quant=int4", "export=aoti", "batch=2"): 1.0})


def panels(specification, kind):
    grid = next(block for block in specification["blocks"] if block["type"] == "panels")
    return [panel for panel in grid["panels"] if panel["type"] == kind]


def test_the_specification_names_runs_and_metrics_as_they_are_tracked():
    made = wandb.specification(records(), title="a sweep")
    assert made == json.loads(wandb.dump(made))
    assert made["project"] == "moeexp" and made["entity"] is None and made["run_set"]["runs"] == ["ab.0", "ab.1"]
    bars = {panel["metric"] for panel in panels(made, "bar")}
    assert {"decode_tok_s", "latency_ms.p99", "memory_gib.device_in_use"} <= bars and "bits_per_byte" not in bars
    (coordinates,) = panels(made, "parallel_coordinates")
    keys = [(column["from"], column["key"]) for column in coordinates["columns"]]
    assert keys[:3] == [("config", "batch"), ("config", "quant.name"), ("config", "export")]
    assert ("summary", "decode_tok_s") in keys
    assert len(panels(made, "run_comparer")) == 1
    assert "| ok |" in made["blocks"][0]["text"]


def test_the_metrics_are_keys_that_the_tracker_writes():
    from moeexp.record.tracker import _summary

    one = records()[0] | {"bits_per_byte": 1.0, "joules_per_token": 1.0, "stalls": synthetic.stalls(1, 2.0, 9.0)}
    summary = _summary(one)
    for _, key in wandb.METRICS:
        value = summary
        for name in key.split("."):
            value = value[name]
        assert value is not None


def test_runs_of_two_projects_need_one_named():
    one, two = records()
    two["config"]["tracker"]["project"] = "other"
    with pytest.raises(ValueError, match="name one with --project"):
        wandb.specification([one, two], title="t")
    assert wandb.specification([one, two], title="t", project="p")["project"] == "p"


def test_runs_that_wandb_did_not_see_are_refused():
    with pytest.raises(ValueError, match="no run of these was tracked by W&B"):
        wandb.specification([synthetic.record("tracker=jsonl")], title="t")


def test_logged_out_it_says_what_to_do_and_writes_the_specification(tmp_path, capsys):
    folder, out = synthetic.write(tmp_path / "sweep", records()), tmp_path / "spec.json"
    assert report_command.main([str(folder), "--to", "wandb"]) == 2
    error = capsys.readouterr().err
    assert "`wandb login` first, or write the specification with --out FILE" in error and error.count("\n") == 1
    assert report_command.main([str(folder), "--to", "wandb", "--out", str(out), "--entity", "me"]) == 0
    assert json.loads(out.read_text())["entity"] == "me"


def test_without_the_package_it_says_which(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(RuntimeError, match="pip install wandb-workspaces"):
        wandb.save(wandb.specification(records(), title="t"))


def test_the_report_object_is_built_from_the_specification():
    reports = pytest.importorskip("wandb_workspaces.reports.v2", reason="wandb-workspaces is not installed")
    made = wandb.build(wandb.specification(records(), title="t", entity="me"), reports)
    grid = next(block for block in made.blocks if isinstance(block, reports.PanelGrid))
    models = [panel._to_model().model_dump(by_alias=True) for panel in grid.panels]
    kinds = [model["viewType"] for model in models]
    assert kinds.count("Bar Chart") == len(kinds) - 2 and kinds[-2:] == ["Parallel Coordinates Plot", "Run Comparer"]
    assert "config:quant.value.name" in [column["accessor"] for column in models[-2]["config"]["columns"]]
    assert grid.runsets[0].filters == "Metric(\"Name\") in ['ab.0', 'ab.1']"
