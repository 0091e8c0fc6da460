"""A sweep on a GPU: an illegal access ends one run; the parent stays free of CUDA; the GPU is watched while it is timed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeexp.cli import main
from moeexp.record.gpus import others_on, visible_gpus
from moeexp.record.record import read_record

QUICK = ["model=nano", "tracker=jsonl", "export=eager", "new_tokens=8", "min_time_s=0.5", "repeats=2"]


def illegal_access(cfg, *, run_dir, record, phases):
    """Seed 1 reads beyond every tensor; the error is sticky, so that nothing in its process can use the GPU again."""
    with phases("benchmark"):
        if cfg.seed == 1:
            index = torch.full((1,), 2**40, device="cuda")
            torch.ops.aten._index_put_impl_(torch.zeros(1, device="cuda"), [index], torch.ones(1, device="cuda"), False, True)
            torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    record.set(check={"passed": True, "parts": [], "failures": []})


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def records():
    return {record["config"]["seed"]: record for record in map(read_record, Path("multirun").rglob("record.json"))}


def test_an_illegal_access_ends_one_run_only():
    assert main(["-m", "model=nano", "tracker=jsonl", "seed=1,2"], experiment=illegal_access) == 1
    found = records()
    assert found[1]["status"] == "failed" and found[2]["status"] == "ok", found
    assert found[1]["error"]["phase"] == "benchmark"


@pytest.mark.alone
def test_the_parent_holds_no_context_and_its_hash_is_the_run_s():
    code = (
        "import sys; from moeexp.cli import main\n"
        f"code = main(['-m', *{QUICK!r}, 'seed=3'])\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
        f"assert main(['-m', *{QUICK!r}, 'seed=3']) == 0\n"
        "sys.exit(code)"
    )
    others = others_on(visible_gpus()[0].id, own=0)  # this process, if it has a context
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {})
    assert done.returncode == 0, done.stderr
    assert "1 of 1 cells had run before" in done.stdout, "the parent found the run by the hash that it computed itself"
    record = records()[3]
    assert record["status"] == "ok" and record["environment"]["gpu_other_processes"] in (others, None)
    assert record["telemetry"]["kind"] == "cuda" and record["telemetry"]["sm_mhz"]["max"] > 0
    assert record["joules_per_token"] > 0


@pytest.mark.alone
def test_another_process_on_the_gpu_is_seen():
    gpu = visible_gpus()[0]
    code = "import torch; x = torch.zeros(1, device='cuda'); print('ready', flush=True); input()"
    before = others_on(gpu.id, own=0)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        seen = others_on(gpu.id, own=0)
        other.communicate("\n")
    # In some containers the driver lists no process at all; then both are 0 and a record says null.
    assert seen == before + 1 or seen == before == 0
