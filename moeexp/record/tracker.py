"""Hands a finished record to W&B or to a JSON-lines file. The record on disk is whole before and whatever happens here.

W&B runs in a process of its own (`python -m moeexp.record.tracker RUN_DIR`): that bounds its time also where a server accepts
connections and never answers, and keeps its hooks and output away from the run. Where online logging comes to nothing, a second
process logs the run offline, under the same id, for `python -m moeexp.sync`.
"""

from __future__ import annotations

import errno
import json
import netrc
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from moeexp.record.paths import expanded
from moeexp.record.process_group import kill_group
from moeexp.record.record import SAMPLES, read_record, shorten
from moeexp.record.wandb_place import settled

ANSWER = "moeexp-tracker: "
OFFLINE_S = 60.0  # to log offline what could not be logged online
SERVICE = "WANDB_SERVICE"  # how a process of W&B's tells its children where its service listens
# What W&B takes, and what it means.
WANDB_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
# Where `wandb login` goes without a server of one's own, by version.
CLOUD_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
SUMMARY_KEYS = ("decode_tok_s", "prefill_tok_s", "ttft_s", "bandwidth_share", "joules_per_token")


def track(record: dict[str, Any], *, run_dir: Path, exit_code: int, group: str | None) -> dict[str, Any]:
    """What becomes `record["tracker"]`: {name, mode, path, url, warning}; `warning` is None or one line to show.

    Raises nothing that concerns the tracker: a measured run is not lost to an unreachable server."""
    settings = record["config"]["tracker"]
    if settings["name"] == "jsonl":
        return _append(shorten(record), expanded(settings["path"]))
    mode, timeout_s, run_id = wandb_mode(settings, os.environ), settings["timeout_s"], secrets.token_hex(4)
    found = _wandb_process(run_dir, exit_code, group, mode, run_id, timeout_s)
    if mode != "online" or not found["warning"]:
        return found
    kept = _wandb_process(run_dir, exit_code, group, "offline", run_id, OFFLINE_S)
    if kept["warning"]:
        return found | {"warning": f"{found['warning']}; nor was it logged offline: {kept['warning']}"}
    return kept | {"warning": f"{found['warning']}; logged offline, upload it with: python -m moeexp.sync {kept['path']}"}


def _result(name: str, **known: Any) -> dict[str, Any]:
    return {"name": name, "mode": None, "path": None, "url": None, "warning": None} | known


def _append(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """One line, in one write, so that concurrent runs do not mix; without raw samples, which the record has."""
    latencies = {key: _statistics(record[key]) for key in SAMPLES}
    line = json.dumps(record | latencies, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            before, data = file.tell(), line.encode()
            if (written := file.write(data)) < len(data):  # a part, where the disk has no room for all
                if os.fstat(file.fileno()).st_size == before + written:
                    file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        return _result("jsonl", path=str(path), warning=f"tracker=jsonl could not write {path}: {error.strerror}")
    return _result("jsonl", path=str(path))


def _wandb_process(run_dir: Path, exit_code: int, group: str | None, mode: str, run_id: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "moeexp.record.tracker", str(run_dir), str(exit_code), group or "", mode, run_id]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    # A service of W&B that runs already (a notebook's, an agent's) outlives this process, and keeps the id of a run that it could
    # not upload: what is then logged offline under that id would be refused.
    environment.pop(SERVICE, None)
    try:
        # Files, not pipes: W&B's own helper process inherits them, and a pipe stays open until that one ends too.
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
            )
            if not ended_within(process, timeout_s):
                late = f"W&B did not answer within tracker.timeout_s={timeout_s:g}; the record is whole"
                return _result("wandb", warning=late)
            output.seek(0)
            errors.seek(0)
            answers, complaints = output.read().splitlines(), errors.read().split("\n")
    except OSError as error:  # no folder for temporary files, or no room in it; no process to be had
        return _result("wandb", warning=f"W&B could not be started, the record is whole: {error}")
    for line in answers:
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    reason = next((line for line in reversed(complaints) if line.strip()), f"exit code {process.returncode}")
    return _result("wandb", warning=f"W&B failed, the record is whole: {' '.join(reason.split())[:200]}")


def ended_within(process: subprocess.Popen, seconds: float) -> bool:
    """Waits for a process that leads a session of its own; whatever ends the waiting early ends that session, too."""
    try:
        process.wait(seconds)
    except BaseException as error:  # also Ctrl-C, which does not reach a session of its own
        kill_group(process)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return False
    return True


def wandb_mode(settings: dict[str, Any], environment: dict[str, str] | os._Environ) -> str:
    """online | offline | disabled. `auto` is WANDB_MODE where that is set, else online when logged in. `ValueError` where that
    is no mode of W&B's."""
    if settings["mode"] != "auto":
        return settings["mode"]
    if own := environment.get("WANDB_MODE"):
        if own not in WANDB_MODES:
            raise ValueError(f"the environment's WANDB_MODE={own} is not a mode; allowed: {', '.join(WANDB_MODES)}")
        return WANDB_MODES[own]
    return "online" if _logged_in(environment) else "offline"


def check_environment(settings: dict[str, Any]) -> None:
    """Before a run: what tracking will read of the environment, and whether it can write. `ValueError`, one line."""
    if settings["name"] == "wandb":
        wandb_mode(settings, os.environ)
        return
    if settings["path"] is None:
        raise ValueError("tracker.name=jsonl has no tracker.path: give the file to append to, or use tracker=jsonl")
    path = expanded(settings["path"])
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK) or place.is_dir() == (place == path):
        raise ValueError(f"tracker.path={path} cannot be written ({place}): give another file, or make it writable")


def _logged_in(environment: dict[str, str] | os._Environ) -> bool:
    """Where `wandb login` leaves a key: the environment or the netrc file."""
    if environment.get("WANDB_API_KEY"):
        return True
    own = environment.get("WANDB_BASE_URL")
    hosts = [urlparse(own).hostname or ""] if own else CLOUD_HOSTS
    candidates = [environment["NETRC"]] if environment.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, candidates):
        if os.path.isfile(path):
            try:
                keys = netrc.netrc(path)
                return any(keys.authenticators(host) is not None for host in hosts)
            except netrc.NetrcParseError:
                return False
    return False


def _log_to_wandb(run_dir: Path, exit_code: int, group: str | None, mode: str, run_id: str) -> dict[str, Any]:
    """In the process of its own: one W&B run from one record."""
    if mode == "disabled":
        return _result("wandb", mode=mode)
    import wandb

    record = read_record(run_dir / "record.json")
    try:
        run = _init(wandb, record, run_dir, mode, group, run_id)
    except wandb.errors.Error as error:
        return _result("wandb", warning=f"W&B could not be reached ({' '.join(str(error).split())[:160]})")
    folder = Path(run.dir).parent
    try:
        latencies = record["token_latencies_ms"] or {}
        for token, milliseconds in enumerate(latencies.get("samples", [])):
            run.log({"token_latency_ms": milliseconds}, step=token)
        run.summary.update(_summary(record))
        run.save(str(run_dir / "record.json"), base_path=str(run_dir), policy="now")
    finally:
        run.finish(exit_code=exit_code)
    url = run.url if mode == "online" else None
    return _result("wandb", mode=mode, path=os.path.relpath(folder), url=url)


def _init(wandb: Any, record: dict[str, Any], run_dir: Path, mode: str, group: str | None, run_id: str) -> Any:
    settings = record["config"]["tracker"]
    where = settled(settings)  # also of a run that was killed before its config was resolved
    config = {key: value for key, value in record["config"].items() if key != "tracker"}
    return wandb.init(
        id=run_id,
        project=where["project"],
        entity=where["entity"],
        group=where["group"] or group,
        tags=[*where["tags"], record["status"]],
        name=record["id"],
        config=config | {"config_hash": record["config_hash"], "environment": record["environment"]},
        dir=str(run_dir),
        mode=mode,
        # A third of the time for init leaves time to upload.
        settings=wandb.Settings(silent=True, console="off", init_timeout=settings["timeout_s"] / 3, x_disable_stats=True),
    )


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    summary = {key: record[key] for key in SUMMARY_KEYS if record[key] is not None}
    token, prefill, ttft = (_statistics(record[key]) for key in SAMPLES)
    latencies = {"latency_ms": token, "prefill_latency_ms": prefill, "ttft_latency_ms": ttft}
    check = {"passed": (record["check"] or {}).get("passed")}
    for part in (record["check"] or {}).get("parts", []):
        check[part["name"]] = {row["tolerance"]: row["value"] for row in part["tolerances"]}
    nested = {"check": check} | latencies | {key: record[key] for key in ("stalls", "phases_s", "memory_gib")}
    summary |= {"status": record["status"]} | {"bits_per_byte": record["bits_per_byte"]}
    return summary | {key: value for key, value in nested.items() if value}


def _statistics(latencies: dict[str, Any] | None) -> dict[str, Any] | None:
    return latencies and {key: value for key, value in latencies.items() if key != "samples"}


if __name__ == "__main__":
    folder, code, group_name, *how = sys.argv[1:]
    print(ANSWER + json.dumps(_log_to_wandb(Path(folder), int(code), group_name or None, *how)))
