"""An experiment that other processes can import. What a run does follows from its seed, while `sabotage` lies in the
current folder; each run leaves its seed in `ran`."""

import ctypes
import os
import shutil
import signal
import time
from pathlib import Path


def experiment(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True, "parts": [], "failures": []})
    with phases("benchmark"):
        record.latencies_ms += [1.0, 2.0]
        with open("ran", "a") as file:
            file.write(f"{cfg.seed}\n")
        if Path("sabotage").exists():
            _misbehave(cfg.seed, Path(run_dir, "record.json"))
    if cfg.seed == 30 or cfg.seed == 31:
        _meet(cfg.seed)
    record.set(decode_tok_s=10.0)


def _misbehave(seed, file):
    if seed == 1:
        raise RuntimeError("boom")
    if seed == 2:
        os._exit(3)
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 4:
        time.sleep(600)
    if seed == 5:
        ctypes.string_at(0)
    if seed == 7:
        os.kill(os.getpid(), signal.SIGRTMIN + 1)  # which has no name
    if seed == 8:
        shutil.rmtree(file.parent)
        os._exit(0)
    if seed == 20:
        file.write_text("{")
        os._exit(3)
    if seed == 6:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600)


def _meet(seed):
    """Ends only where the other of the two runs is there at the same time."""
    Path(f"gpu-{seed}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    deadline = time.monotonic() + 60
    while not Path(f"gpu-{61 - seed}").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("alone")
        time.sleep(0.05)


def ran():
    """The seeds that have run since the last call."""
    path = Path("ran")
    seeds = sorted(map(int, path.read_text().split())) if path.exists() else []
    path.unlink(missing_ok=True)
    return seeds
