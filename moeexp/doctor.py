"""`python -m moeexp.doctor`: is this machine ready? Versions, and the known traps with their remedies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moeexp.config.errors import Parser, answered
from moeexp.probes import ANSWER, PROBES, Finding
from moeexp.record.process_group import signal_name
from moeexp.record.tracker import wandb_mode
from moeexp.run import signals

SECONDS = 300  # that a probe may take: compiling is slow where a machine is busy
STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def probe(name: str) -> Finding:
    """Runs one probe in a process with this one's import path. A crash is a finding."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "moeexp.probes", "--json", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("broken", f"no answer within {SECONDS} s", "try again when the machine is less busy")
    for line in done.stdout.splitlines():
        if line.startswith(ANSWER):
            return Finding(**json.loads(line.removeprefix(ANSWER)))
    if done.returncode < 0:
        died = f"killed by {signal_name(done.returncode)}"
    else:
        died = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
    return Finding("broken", died, f"to see more: python -m moeexp.probes '{name}'")


def versions() -> dict[str, Any]:
    """What a record says of its environment, with the compiler, the caches and the login that a run would use."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from moeexp.record import environment
    from moeexp.stack.caches import cache_dir

    facts = environment.collect("cuda" if torch.cuda.is_available() else "cpu")
    mode = _or_broken(lambda: wandb_mode({"mode": "auto"}, os.environ))
    return {
        "python": facts["python"],
        "platform": facts["platform"],
        **facts["versions"],
        "cuda": facts["cuda"] or "not in this torch",
        "gpu": facts["gpu"] and f"{facts['gpu']['name']}, sm_{facts['gpu']['capability'].replace('.', '')}",
        "driver": facts["gpu"] and facts["gpu"]["driver"],
        "cpu": f"{facts['cpu']['name']}, {facts['cpu']['cores']} cores",
        "CXX": _or_broken(_compiler),
        "compiled methods": _or_broken(cache_dir),
        "inductor's cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _or_broken(default_cache_dir),
        "wandb runs": {"online": "online: logged in", "offline": "offline: not logged in, or WANDB_MODE"}.get(mode, mode),
    }


def _compiler() -> str:
    from moeexp.stack.compile_cache import toolchain

    return str(toolchain("cpu")["cxx"])


def _or_broken(fact: Callable[[], Any]) -> str:
    """What a run would be refused for is a fact here: no compiler, no home folder, no name of the user, a mistyped variable."""
    try:
        return str(fact())
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        return f"broken: {error}"


def show(facts: dict[str, Any], findings: dict[str, Finding], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(f"[dim]{key}[/]", "none" if value is None else escape(str(value)))
    console.print(table)
    table = Table("probe", "verdict", "found", "what to do", title="Known traps", title_justify="left")
    for name, finding in findings.items():
        verdict = f"[{STYLES[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(name, verdict, escape(finding.detail), escape(finding.remedy))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 nothing that a run needs is broken, 1 something is, 2 invalid arguments."""
    with signals.handled():  # SIGTERM as Ctrl-C
        return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser("python -m moeexp.doctor", description="Versions and known traps of this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    findings, seconds = {}, {}
    for name in PROBES:
        start = time.perf_counter()
        with console.status(name):
            findings[name] = probe(name)
        seconds[name] = round(time.perf_counter() - start, 2)
    broken = [name for name, finding in findings.items() if finding.verdict == "broken"]
    # Importing torch is a probe's business until it is known to work.
    facts = versions() if findings["torch"].verdict != "broken" else {"python": sys.version.split()[0]}
    if options.json:
        probes = [{"name": name, **asdict(finding), "seconds": seconds[name]} for name, finding in findings.items()]
        print(json.dumps({"versions": facts, "probes": probes, "broken": broken}, indent=1))
    else:
        show(facts, findings, Console())
        print(f"broken: {', '.join(broken)}" if broken else "nothing that a run needs is broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
