"""Every file under conf/ is composed and validated; every experiment runs on nano on the CPU, or says why it cannot."""

from pathlib import Path

import pytest

from moeexp import schema, validate
from moeexp.cli import main
from moeexp.record import read_record

CONF = schema.conf_dir()
GROUPS = ("model", "quant", "ops", "sampler", "tracker")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
# One that brings a sweeper of its own needs that installed.
EXPERIMENTS = sorted(
    path.stem for path in (CONF / "experiment").glob("*.yaml") if "/hydra/sweeper" not in path.read_text()
)
CELLS = {"full_factorial": 64, "ladder": 11, "leave_one_out": 7, "one_factor": 7, "quantisation": 3}


@pytest.mark.parametrize("group, name", CHOICES)
def test_every_choice_composes(group, name):
    config = schema.compose([f"{group}={name}"])
    try:
        resolved = validate.resolved(config, cuda_available=True)
    except ValueError as refusal:
        assert "not built yet" in str(refusal)
    else:
        assert resolved.device == "cuda"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_listed_with_a_reason_for_what_cannot_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", f"experiment={name}", "model=nano", "dry_run=true", "device=cpu"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total.startswith(f"{CELLS.get(name, len(lines))} cells, ") and len(lines) == CELLS.get(name, len(lines))
    for line in lines:
        assert "  to run  " in line or "CUDA" in line or "not built yet" in line or "Triton" in line, line
    # Once every axis of it is built, something of each design runs on a CPU.
    assert any("  to run  " in line or "not built yet" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_on_the_cpu(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["model=nano", "tracker=jsonl", "export=eager", "new_tokens=4", "min_time_s=0", "min_samples=1", "repeats=1"]
    assert main(["-m", f"experiment={name}", "device=cpu", *quick]) == 0, capsys.readouterr().err
    records = [read_record(path) for path in Path("multirun").rglob("record.json")]
    assert len(records) == CELLS.get(name, len(records))
    assert {record["status"] for record in records} <= {"ok", "unsupported"}
    for record in records:
        assert record["status"] == "ok" or record["error"]["message"], record["id"]
