"""A run on the GPU that is told to end, at any moment of its capture; rows that end before others under the loop graph."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import EVEN, build_snapshot
from moeexp_runner import timing

from moeexp import cli
from moeexp.record.record import read_record

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.3, 1.0, 2.0])
def test_sigterm_from_capture_on(tmp_path, delay):
    """The moments reach from before the first kernel of the capture to the timing."""
    command = [
        sys.executable,
        "-m",
        "moeexp",
        "model=tiny",
        "cuda_graph=loop",
        "export=eager",
        "tracker=jsonl",
        "min_time_s=60",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    seen = []
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as run:
        for line in run.stdout:
            seen.append(line)
            if line.startswith("capture ..."):
                break
        time.sleep(delay)
        run.send_signal(signal.SIGTERM)
        rest, _ = run.communicate(timeout=120)
    said = "".join(seen) + rest
    assert run.returncode == 130, said
    assert "Traceback" not in said and "terminate called" not in said and "interrupted; what was measured is in" in said
    (path,) = tmp_path.rglob("record.json")
    assert read_record(path)["status"] == "interrupted"


@pytest.mark.parametrize("mode", ["cuda_graph=loop", "cuda_graph=all prefill_graph_lengths=[16]"])
def test_rows_of_a_batch_end_each_at_its_own_end(tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    build_snapshot(Path("weights"), dataclasses.replace(EVEN, eos_token_ids=()))

    def run(*more):
        here = Path(f"out-{len(more)}")
        words = [
            "model=nano",
            "model.weights=weights",
            "model.heldout=null",
            "model.tokenizer=none",
            "quant=none",
            "export=eager",
            "tracker=jsonl",
        ]
        words += ["batch=3", "prompt_len=9", "new_tokens=24", "max_seq_len=64", "dtype=float32"]
        words += ["repeats=2", "min_samples=1", "min_time_s=0", "eval_bytes=0", *mode.split(), *more]
        assert cli.main([*words, f"hydra.run.dir={here}"]) == 0
        return json.loads((here / "record.json").read_text())

    rows = run()["generated_ids"]
    # Stops at the first row's third token and the second's sixth; the loop has enqueued steps beyond them by then.
    stop = {rows[0][2], rows[1][5]}
    expected = [timing.cut(row, stop) for row in rows]
    assert len({len(row) for row in expected}) > 1, "else this shows nothing"
    Path("weights/generation_config.json").write_text(json.dumps({"eos_token_id": sorted(stop)}))
    ended = run("eos=true")
    assert ended["generated_ids"] == expected
    assert [one["tokens"] for one in ended["rounds"]] == [sum(map(len, expected)) - 3] * len(ended["rounds"])
