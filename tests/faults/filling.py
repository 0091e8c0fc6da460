"""Experiments that other processes can import: one fills the disk under its folder, others do as they would on any."""

from pathlib import Path


def experiment(cfg, *, run_dir, record, phases):
    """A run with seed 1 fills the disk, while `fill` lies in the current folder; its file stays."""
    record.set(check={"passed": True, "parts": [], "failures": []})
    with phases("benchmark"):
        record.latencies_ms += [1.0, 2.0]
        if cfg.seed == 1 and Path("fill").exists():
            fill(run_dir.parent / "filling")
        Path("ran").touch()
    record.set(decode_tok_s=10.0)


def fill(path, leave=0):
    """All but `leave` bytes, in steps that end in the last one."""
    with open(path, "ab", buffering=0) as file:
        try:
            for size in (65536, 4096, 512, 1):
                while file.write(bytes(size)) == size:
                    pass
        except OSError:
            if leave:
                file.truncate(max(0, file.tell() - leave))
                return
            raise


def filled_for_tracking(cfg, *, run_dir, record, phases):
    """Of the disk there is room for the record, and for little more."""
    record.set(check={"passed": True, "parts": [], "failures": []}, decode_tok_s=10.0)
    with phases("benchmark"):
        fill(run_dir.parent / "filling", leave=16384)
    (run_dir / ".space-for-the-record").unlink()
    fill(run_dir.parent / "filling", leave=16384)
