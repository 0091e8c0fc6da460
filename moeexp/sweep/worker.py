"""The process of its own that a sweep's run has:

    python -m moeexp.sweep.worker FILE      FILE holds a list of jobs; several are runs that share weights, interleaved

Whatever a run that crashes leaves, `moeexp.sweep.sweep` finishes its record.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from moeexp.record import streams
from moeexp.record.process_group import die_with_parent
from moeexp.run import signals
from moeexp.run.job import INTERRUPTED, Job, TimeUp, default_experiment, run_job


def main(path: str) -> int:
    """Its exit code is the worst of its jobs'; the records say the rest."""
    # A background job ignores SIGINT, with which the parent stops this.
    streams.prepare()
    with signals.handled(even_if_ignored=(signal.SIGINT,)):
        return run(path)


def run(path: str) -> int:
    faulthandler.enable()
    content = json.loads(Path(path).read_text())
    die_with_parent(content["parent"])  # a sweep that is killed leaves no run behind that holds a GPU
    jobs = [Job(**job) for job in content["jobs"]]
    limit = (jobs[0].timeout_s or 0) * len(jobs)

    def time_is_up(number: int, frame: Any) -> None:
        raise TimeUp(f"the run took longer than launcher.timeout_s ({limit:g} s)")

    # The parent watches the clock and sends this; see `moeexp.sweep.process`.
    signal.signal(signal.SIGALRM, time_is_up)
    module, _, name = content["experiment"].partition(":")
    experiment = getattr(importlib.import_module(module), name)
    if len(jobs) > 1:
        assert experiment is default_experiment, "a group's runs take turns step by step; only run_experiment has steps"
        from moeexp.run.group import run_group

        return run_group(jobs)
    return run_job(jobs[0], jobs[0].composed(), experiment)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except KeyboardInterrupt:  # after the records were complete
        sys.exit(INTERRUPTED)
