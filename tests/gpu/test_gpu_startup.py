"""A Triton that cannot be imported, where a GPU is there to run on."""

import os
import subprocess
import sys
from pathlib import Path

from moeexp.record.record import read_record


def test_a_broken_triton_stops_a_run_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken" / "triton").mkdir(parents=True)
    (tmp_path / "broken" / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), os.environ["PYTHONPATH"]])}
    for graph in ("false", "true"):
        arguments = ["model=nano", "device=cuda", "tracker=jsonl", f"cuda_graph={graph}", f"hydra.run.dir={graph}"]
        command = [sys.executable, "-m", "moeexp", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert done.returncode == 1 and line.startswith("error: ImportError: libtriton.so: undefined symbol"), done.stderr
        record = read_record(Path(graph) / "record.json")
        assert record["status"] == "failed" and record["decode_tok_s"] is None and "weights" not in record["phases_s"]
