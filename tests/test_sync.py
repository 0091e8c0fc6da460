"""Offline W&B runs: found, told apart, handed to `wandb sync`."""

import os
from pathlib import Path

import pytest
import wandb

from moeexp import sync
from moeexp.config.compose import compose
from moeexp.record.record import Record, plain

# Uploads as far as the test is concerned: leaves W&B's marker, except for runs named `refused`.
WANDB = """
import os, pathlib, sys, time
assert sys.argv[1] == "sync" and "WANDB_SERVICE" not in os.environ
for folder in map(pathlib.Path, sys.argv[2:]):
    print("uploading", folder.name, flush=True)
    if "hanging" in folder.name:
        time.sleep(600)
    for log in folder.glob("*.wandb"):
        if "refused" not in folder.name:
            log.with_suffix(".wandb.synced").touch()
"""


@pytest.fixture(autouse=True)
def logged_in_to_a_fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").touch()
    (tmp_path / "fake" / "wandb" / "__main__.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


def offline_run(run: str, name: str, *, synced=False) -> Path:
    folder = Path(run) / "wandb" / f"offline-run-{name}"
    folder.mkdir(parents=True)
    (folder / f"run-{name}.wandb").touch()
    if synced:
        (folder / f"run-{name}.wandb.synced").touch()
    record = Record(Path(run) / "record.json", id=f"id-{name}", config=plain(compose(["model=nano"])), command=[])
    record.finish("failed")
    return folder


def test_what_is_waiting_is_uploaded_once(capfd):
    offline_run("multirun/today/0", "2")
    offline_run("outputs/run", "1")
    offline_run("outputs/other", "0", synced=True)
    assert sync.main([]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("synced already") and "(id-0 failed)" in out[0]
    assert out[1].startswith("to upload") and "outputs/run/wandb/offline-run-1" in out[1]
    assert out[3:] == [
        "3 offline runs, 1 of them synced already",
        "uploading offline-run-1",
        "uploading offline-run-2",
    ]
    assert sync.main([]) == 0
    assert capfd.readouterr().out.splitlines()[3:] == ["3 offline runs, 3 of them synced already"]


def test_a_service_that_is_gone_is_not_asked(monkeypatch):
    """As below a notebook that has ended: `wandb sync` itself fails there."""
    monkeypatch.setenv("WANDB_SERVICE", "3-99999-tcp-localhost-59999")
    offline_run("outputs/run", "1")
    assert sync.main([]) == 0


def test_dry_run_uploads_nothing_and_needs_no_login(monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", os.devnull)
    run = offline_run("outputs/run", "1")
    assert sync.main(["--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("would be uploaded")
    assert not sync.OfflineRun(run).synced


def test_not_logged_in_is_one_line(monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", os.devnull)
    offline_run("outputs/run", "1")
    assert sync.main([]) == 2
    assert capfd.readouterr().err == "error: not logged in to W&B: run `wandb login`, or set WANDB_API_KEY\n"


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_login_of_any_wandb_counts(tmp_path, monkeypatch, host):
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine {host}\n login user\n password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    offline_run("outputs/run", "1")
    assert sync.main([]) == 0
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    offline_run("outputs/run", "2")
    assert sync.main([]) == 2


def test_one_that_is_not_uploaded_fails(capfd):
    offline_run("outputs/a", "refused")
    offline_run("outputs/b", "taken")
    assert sync.main(["outputs"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "offline-run-refused was not uploaded" in line


def test_a_server_that_does_not_answer_is_not_waited_for(capfd):
    run = offline_run("outputs/a", "hanging")
    assert sync.main(["--timeout", "1"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "W&B did not answer within 1 s a run (--timeout)",
        f"error: {run} was not uploaded; its record is whole, try again",
    ]


def test_many_are_handed_over_in_batches(monkeypatch, capfd):
    monkeypatch.setattr(sync, "AT_ONCE", 2)
    for number in range(5):
        offline_run(f"outputs/{number}", str(number))
    assert sync.main([]) == 0
    assert all(run.synced for run in sync.find([Path("outputs")]))


def test_nothing_to_do_and_no_such_folder(capfd):
    assert sync.main([]) == 0
    assert sync.main(["nowhere"]) == 2
    assert "nowhere is not a folder" in capfd.readouterr().err


def test_a_run_that_wandb_itself_wrote_is_found(tmp_path):
    run = wandb.init(project="moeexp", dir=str(tmp_path / "outputs"), mode="offline", settings={"silent": True})
    run.log({"x": 1})
    run.finish()
    (found,) = sync.find([tmp_path / "outputs"])
    assert found.folder == Path(run.dir).parent and not found.synced and found.what == "no record"


def test_an_unknown_argument_is_one_line(capsys):
    assert sync.main(["--banana"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--banana" in line and "python -m moeexp.sync --help" in line
