"""Every file under conf/ is composed and validated; every experiment runs on nano on the CPU, or says why it cannot."""

import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from moeexp.cli import main
from moeexp.config import compose, resolve, schema
from moeexp.record.record import read_record

CONF = schema.conf_dir()
GROUPS = ("model", "quant", "ops", "sampler", "tracker")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
# One that brings a sweeper of its own needs that installed.
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if "/hydra/sweeper" not in path.read_text())


def cell_count(name):
    """From the file itself: the design's cells, or the product of the grid's axes."""
    content = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    cells = OmegaConf.select(content, "launcher.cells")
    axes = OmegaConf.select(content, "hydra.sweeper.params") or {}  # a recipe of a single run has none
    return len(cells) if cells else math.prod(len(str(v).split(",")) for v in axes.values())


@pytest.mark.parametrize("group, name", CHOICES)
def test_every_choice_composes(group, name):
    config = compose.compose([f"{group}={name}"])
    assert resolve.resolved(config, cuda_available=True).device == "cuda"


# Of whose cells none runs on a CPU.
NEED_A_GPU = {"fullsize", "profile"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_listed_with_a_reason_for_what_cannot_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", f"experiment={name}", "model=nano", "dry_run=true", "device=cpu"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total.startswith(f"{cell_count(name)} cells, ") and len(lines) == cell_count(name)
    for line in lines:
        assert "  to run  " in line or "CUDA" in line or "Triton" in line, line
    assert any("  to run  " in line for line in lines) or name in NEED_A_GPU


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_on_the_cpu(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["model=nano", "tracker=jsonl", "export=eager", "new_tokens=4", "min_time_s=0", "min_samples=1", "repeats=1"]
    assert main(["-m", f"experiment={name}", "device=cpu", *quick]) == 0, capsys.readouterr().err
    records = [read_record(path) for path in Path("multirun").rglob("record.json")]
    assert len(records) == cell_count(name)
    assert {record["status"] for record in records} <= {"ok", "unsupported"}
    for record in records:
        assert record["status"] == "ok" or record["error"]["message"], record["id"]
