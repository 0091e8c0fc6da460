"""`python -m moeexp.sync [DIR…] [--dry-run]`: hands runs that W&B logged offline to `wandb sync`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeexp.config.errors import Parser, answered
from moeexp.record import streams
from moeexp.record.record import read_record
from moeexp.record.text import visible
from moeexp.record.tracker import SERVICE, ended_within, wandb_mode
from moeexp.run import signals

DEFAULT_FOLDERS = ("outputs", "multirun")
AT_ONCE = 50  # runs that one `wandb sync` is given
SECONDS = 60  # for each run; `wandb sync` waits for ever for a server that does not answer


@dataclass(frozen=True)
class OfflineRun:
    """`folder` is W&B's: …/wandb/offline-run-<time>-<id>, in the folder of the run that it belongs to."""

    folder: Path

    @property
    def synced(self) -> bool:
        """W&B leaves a marker beside the log that it has uploaded."""
        logs = list(self.folder.glob("*.wandb"))
        return bool(logs) and all(log.with_suffix(".wandb.synced").exists() for log in logs)

    @property
    def what(self) -> str:
        """The id and status in the run's record, where there is one."""
        path = self.folder.parent.parent / "record.json"
        try:
            record = read_record(path)
        except FileNotFoundError:
            return "no record"
        except ValueError as error:  # W&B's files are whole in themselves
            return f"its record is damaged: {error}"
        return f"{record['id']} {record['status']}"


def find(folders: Sequence[Path]) -> list[OfflineRun]:
    """Every offline run under the folders, oldest first. `ValueError` for a folder that is not there."""
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give run or sweep folders, or run from where outputs/ lies")
        inside = [folder] if folder.name.startswith("offline-run-") else folder.rglob("offline-run-*")
        found |= dict.fromkeys(path for path in inside if path.is_dir() and any(path.glob("*.wandb")))
    return [OfflineRun(path) for path in sorted(found, key=lambda path: path.name)]


def upload(runs: Sequence[OfflineRun], *, seconds: float) -> list[OfflineRun]:
    """Calls `wandb sync`, for at most `seconds` a run, and returns the runs that it did not upload. What it prints goes to
    the terminal."""
    for start in range(0, len(runs), AT_ONCE):
        batch = [str(run.folder) for run in runs[start : start + AT_ONCE]]
        command = [sys.executable, "-m", "wandb", "sync", *batch]
        # Never a question: nobody may be there to answer. A session of its own: W&B starts a helper that outlives it. And a
        # service of its own: one that the environment names may be gone.
        environment = {name: value for name, value in os.environ.items() if name != SERVICE}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)
        if not ended_within(process, seconds * len(batch)):
            print(f"W&B did not answer within {seconds:g} s a run (--timeout)", file=sys.stderr)
    return [run for run in runs if not run.synced]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all is uploaded, 1 something is not, 2 invalid input or not logged in, 130 interrupted."""
    with signals.handled():  # SIGTERM as Ctrl-C
        return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser("python -m moeexp.sync", description="Upload runs that W&B logged offline.")
    parser.add_argument("folders", nargs="*", metavar="DIR", type=Path, help="default: outputs and multirun, if there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded and stop")
    parser.add_argument("--timeout", type=float, default=SECONDS, metavar="SECONDS", help="for each run (default: 60)")
    default = [Path(name) for name in DEFAULT_FOLDERS if Path(name).is_dir()]
    options = parser.parse_args(arguments)
    runs = find(options.folders or default)
    waiting = [run for run in runs if not run.synced]
    for run in runs:
        state = "synced already" if run.synced else "would be uploaded" if options.dry_run else "to upload"
        print(f"{state:<18} {visible(str(run.folder))}  ({streams.fitted(run.what)})", flush=True)
    print(f"{len(runs)} offline runs, {len(runs) - len(waiting)} of them synced already", flush=True)
    if options.dry_run or not waiting:
        return 0
    # Whoever calls this wants to be online, whatever the runs' own mode was.
    if wandb_mode({"mode": "auto"}, {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}) != "online":
        raise ValueError("not logged in to W&B: run `wandb login`, or set WANDB_API_KEY")
    left = upload(waiting, seconds=options.timeout)
    for run in left:
        print(f"error: {run.folder} was not uploaded; its record is whole, try again", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
