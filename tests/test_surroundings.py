"""What a shell and its user hand us: dry runs however they are written, `~`, long texts, odd streams, caches, W&B's variables."""

import dataclasses
import io
import json
import os
import pwd
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from common import slow_after

from moeexp.cli import main
from moeexp.config import compose, schema
from moeexp.config.errors import Parser
from moeexp.record import streams, tracker
from moeexp.record.paths import expanded
from moeexp.record.record import MAX_BYTES, Record, full_config, plain, read_record
from moeexp.report.command_line import arguments_of, hydra_value
from moeexp.reproduce import main as reproduce
from moeexp.stack import caches
from moeexp.stack.compile_cache import cache_dir

QUIET = ["model=nano", "tracker=jsonl"]
HERE = "launcher.isolation=none"
RAN = []


def experiment(cfg, *, run_dir, record, phases):
    RAN.append(cfg)
    with phases("benchmark"):
        record.latencies_ms += [1.0] * 900
    record.set(check={"passed": True, "parts": [], "failures": []}, decode_tok_s=10.0)
    record.set(prompt_text=[cfg.prompt] * cfg.batch, generated_ids=[[1, 2]] * cfg.batch)
    if cfg.seed == 1:
        raise RuntimeError(f"cannot do {cfg.prompt}")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    RAN.clear()


def run(*arguments):
    return main([*arguments, *QUIET], experiment=experiment)  # Hydra takes all overrides after its flags


def records(folder="."):
    return [read_record(path) for path in sorted(Path(folder).rglob("record.json"))]


def config_folder(text, group="experiment"):
    path = Path("mine") / group / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n" + text)
    return ["--config-dir=mine", f"{group}=own"]


# Whether something runs is decided on the composed config.


@pytest.mark.parametrize("typed", ["dry_run=True", "dry_run=1", "++dry_run=true", "dry_run=yes", "dry_run=on", "dry_run='true'"])
def test_a_dry_run_runs_nothing(typed, capsys):
    assert run(typed) == 0
    assert RAN == [] and not records() and "1 cells, 1 to run" in capsys.readouterr().out


def test_a_dry_run_from_a_file(capsys):
    assert run(*config_folder("dry_run: true\n")) == 0
    assert RAN == [] and "1 cells, 1 to run" in capsys.readouterr().out


def test_a_dry_run_that_is_no_sweep_is_refused(capsys):
    assert run("dry_run=true", "hydra.mode=RUN") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leave hydra.mode out" in line and RAN == [] and not list(Path(".").iterdir())


def test_no_dry_run_runs():
    assert run("dry_run=no") == 0 and len(RAN) == 1 and records("outputs")


@pytest.mark.parametrize("typed", ["++launcher.strict=true", "launcher={strict: true}", "launcher.gpus=1"])
def test_a_setting_of_the_launcher_makes_a_sweep_of_one(typed):
    assert run(HERE, typed) == 0 and len(records("multirun")) == 1 == len(RAN)


def test_a_setting_of_the_launcher_from_a_file():
    assert run(*config_folder("launcher:\n  isolation: none\n")) == 0 and len(records("multirun")) == 1 == len(RAN)


# `~`.

# Every text of the schema: whether it names a file or folder.
PATHS = {"model.weights", "model.heldout", "tracker.path", "launcher.root", "artifact"}
NO_PATHS = {
    "model.name", "model.tokenizer", "quant.name", "sampler.name", "tracker.name", "tracker.project", "tracker.entity",
    "tracker.group", "tracker.mode", "launcher.isolation", "launcher.design", "dispatch", "state", "export", "dtype",
    "allocator", "check", "device", "prompt", "profile", "engine", "rerun",
}  # fmt: skip


def test_the_lists_are_complete():
    names = set()
    for name, hint in typing.get_type_hints(schema.Config).items():
        inner = typing.get_type_hints(hint).items() if dataclasses.is_dataclass(hint) and name != "ops" else [("", hint)]
        names |= {f"{name}.{field}".rstrip(".") for field, kind in inner if kind in (str, str | None)}
    assert names == PATHS | NO_PATHS


@pytest.mark.slow
def test_a_home_folder_in_what_is_written(tmp_path):
    assert run("tracker.path=~/t/runs.jsonl", "hydra.run.dir=~/run") == 0
    assert run("-m", HERE, "hydra.sweep.dir=~/sweep", "launcher.root=~/sweep", "tracker.path=~/t/runs.jsonl") == 0
    assert run("-m", HERE, "launcher.root=~/sweep", "tracker.path=~/t/runs.jsonl") == 0  # found there: reused
    assert run(*config_folder("hydra:\n  run:\n    dir: ~/from_file\n")) == 0
    home = tmp_path / "home"
    assert len((home / "t" / "runs.jsonl").read_text().splitlines()) == 2 and len(RAN) == 3
    assert all((home / name / "record.json").is_file() for name in ("run", "sweep/0", "from_file"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("setting", ["model.weights", "model.heldout", "artifact"])
def test_a_home_folder_in_what_is_read(setting, tmp_path, capsys):
    assert run(f"{setting}=~/nothing", "eval_bytes=8") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "home" / "nothing") in error or "~/nothing" in error
    assert not (tmp_path / "~").exists()


def test_a_home_folder_in_arguments_and_variables(tmp_path, monkeypatch):
    parser = Parser("x")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(["~/a", "--out=~/b"])
    assert options.folders == [tmp_path / "home" / "a"] and options.out == tmp_path / "home" / "b"
    monkeypatch.setenv("MOEEXP_CACHE_DIR", "~/c")
    assert cache_dir() == tmp_path / "home" / "c"
    monkeypatch.delenv("MOEEXP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/d")
    assert cache_dir() == tmp_path / "home" / "d" / "moeexp"
    (tmp_path / "home" / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "home" / "conf" / "experiment" / "own.yaml").write_text("# @package _global_\nbatch: 3\n")
    for flags in (["--config-dir=~/conf"], ["--config-dir", "~/conf"], ["-cd", "~/conf"]):
        assert run(*flags, "experiment=own") == 0
    assert [cfg.batch for cfg in RAN] == [3, 3, 3]


def test_a_home_folder_that_nobody_knows(capsys):
    with pytest.raises(ValueError, match="set HOME"):
        expanded("~nobody_of_that_name/x")
    parser = Parser("x")
    parser.add_argument("folder", type=Path)
    with pytest.raises(ValueError, match="argument folder: the home folder in ~nobody_of_that_name .* set HOME"):
        parser.parse_args(["~nobody_of_that_name"])
    assert run("hydra.run.dir=~nobody_of_that_name/x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the home folder in ~nobody_of_that_name/x is not known") and RAN == []


# Texts of any length.


@pytest.mark.parametrize("size", [30_000, 120_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_long_prompt_in_a_batch(size):
    prompt = ("many words " * (size // 11 + 1))[:size]
    assert run("batch=5", "max_seq_len=1000000", f"prompt={prompt}") == 0
    (record,) = records()
    (path,) = Path(".").rglob("record.json")
    assert record["status"] == "ok" and path.stat().st_size <= MAX_BYTES and RAN[0].prompt == prompt
    assert record["token_latencies_ms"]["n"] == 900 == len(record["token_latencies_ms"]["samples"])
    assert full_config(record, path)["prompt"] == prompt
    (line,) = Path("outputs/runs.jsonl").read_text().splitlines()
    assert len(line) <= MAX_BYTES


def test_a_config_that_was_cut_is_run_again_whole(monkeypatch, capsys):
    prompt = "several words " * 9000
    assert run(f"prompt={prompt}", "batch=2", "max_seq_len=1000000") == 0
    (path,) = Path(".").rglob("record.json")
    called = []
    monkeypatch.setattr("moeexp.reproduce.run_again", lambda record, folder, trust: called.append(record) or record)
    reproduce([str(path), "--out", "again"])
    assert called[0]["config"]["prompt"] == prompt
    assert f"prompt={hydra_value(prompt)}" in arguments_of(called[0])
    whole = path.with_name("config.json")
    whole.write_text(whole.read_text().replace("several", "other", 1))
    capsys.readouterr()
    assert reproduce([str(path), "--out", "again"]) == 2 and "its digest is another" in capsys.readouterr().err
    whole.unlink()
    assert reproduce([str(path), "--out", "again"]) == 2 and "config.json" in capsys.readouterr().err


def test_a_prompt_that_no_command_line_holds_is_refused_in_a_line(capsys):
    assert run(f"prompt={'w ' * 100_000}", "max_seq_len=1000000") == 0
    (path,) = Path(".").rglob("record.json")
    capsys.readouterr()
    assert reproduce([str(path), "--out", "again"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompt has" in line and "more than a command line can hold" in line


def test_any_key_of_a_record_can_be_long(tmp_path):
    long = "x" * 500_000
    config = plain(compose.compose(["model=nano"])) | {"prompt": long, "tags": [long] * 9, long: 1}
    run = Record(tmp_path / "record.json", id="a", config=config, command=[long], overrides=[long] * 9)
    run.set(design={"name": long}, prompt_text=[long] * 9, check={"passed": True, "failures": [long] * 9})
    run.set(tracker={"name": "jsonl", "path": long})
    run.latencies_ms += [1.0] * 50
    for index in range(999):
        run.note(f"{index} {long[:1000]}")
    run.finish("failed", error={"type": "x", "message": long, "phase": long, "traceback": long})
    assert run.path.stat().st_size <= MAX_BYTES and read_record(run.path)["status"] == "failed"


def test_two_long_texts_that_begin_alike_stay_two(tmp_path):
    shown = []
    for end in "ab":
        config = plain(compose.compose(["model=nano"])) | {"prompt": "x" * 300_000 + end}
        run = Record(tmp_path / "record.json", id="a", config=config, command=[])
        run.write()
        shown.append(read_record(run.path)["config"]["prompt"])
    assert shown[0] != shown[1]


@pytest.mark.parametrize("arguments", [["{}=1"], ["seed={}"], ["model={}"], ["prompt={}", "new_tokens=0"], ["prompt={}, b"],
                                       ["prompt={}", "seed=1"], ["--{}"], ["-m", "prompt={},a", "new_tokens=0"]])  # fmt: skip
@pytest.mark.parametrize("size", slow_after(1, [100_000, 3000]))
def test_a_refusal_is_a_line_of_at_most_400_characters(arguments, size, capsys):
    assert run(HERE, *[argument.replace("{}", "word" * (size // 4)) for argument in arguments]) in (0, 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines and max(map(len, lines)) <= 400


def test_the_end_of_a_long_line_stays():
    line = streams.fitted("error: " + "x " * 5000 + "set THIS_VARIABLE")
    assert len(line) <= 400 and line.startswith("error: x") and line.endswith("set THIS_VARIABLE")
    assert streams.fitted("a\nb") == "a b"


# Streams.


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_no_character_ends_a_command(encoding, monkeypatch):
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding=encoding))
    streams.prepare()
    print("1 → 2 × 3 日")
    sys.stdout.flush()
    text = bytes_out.getvalue().decode(encoding)
    assert text.startswith("1 -> 2 ") and "\\u65e5" in text


@pytest.mark.parametrize("arguments", [["moeexp", "--help"], ["moeexp.report", "--help"], ["moeexp.export", "--help"],
                                       ["moeexp.reproduce", "--help"], ["moeexp.compare", "nowhere\u2192", "x"]])  # fmt: skip
def test_commands_in_ascii(arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert b"UnicodeEncodeError" not in done.stderr and b"Traceback" not in done.stderr
    assert done.returncode == (2 if "moeexp.compare" in arguments else 0)


# Caches.


def test_a_cache_that_cannot_be_written_is_a_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "file"))
    for arguments in ([], ["-m", HERE, "seed=1,2"]):
        assert run(*arguments) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and line.endswith("set MOEEXP_CACHE_DIR to a folder that can be written")
    assert RAN == []
    assert run("export=eager") == 0, "nothing is compiled"


def test_no_home(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HOME")
    for name in ("MOEEXP_CACHE_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "HOME" in line and "MOEEXP_CACHE_DIR" in line and RAN == []
    monkeypatch.setenv("MOEEXP_CACHE_DIR", "cache")
    caches.prepare()
    cache = tmp_path / "cache"
    assert os.environ["TRITON_CACHE_DIR"] == f"{cache}/triton" and os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/inductor"


@pytest.mark.parametrize("name", ["a b", "it's", "a;b"])
def test_a_temporary_folder_that_breaks_compilers_commands(monkeypatch, tmp_path, name):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    caches.prepare()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path / "cache" / "tmp")
    assert (tmp_path / "cache" / "tmp").is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", name)
    with pytest.raises(ValueError, match="TORCHINDUCTOR_CACHE_DIR=.* without blanks"):
        caches.prepare()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / name))
    with pytest.raises(ValueError, match="set TMPDIR"):
        caches.prepare()


# W&B's variables.


@pytest.mark.parametrize("flags", [[], ["-m", HERE]])
def test_a_mistyped_mode_of_wandb_is_a_line(flags, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "oflline")
    assert main([*flags, "model=nano"], experiment=experiment) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "WANDB_MODE=oflline is not a mode; allowed: online, offline, disabled" in line and RAN == []
    assert run(*flags) == 0, "tracker=jsonl does not read it"


@pytest.mark.parametrize("mode, meant", [("dryrun", "offline"), ("run", "online"), ("disabled", "disabled")])
def test_what_wandb_takes_as_a_mode(mode, meant):
    assert tracker.wandb_mode({"mode": "auto"}, {"WANDB_MODE": mode}) == meant


def settled(*overrides):
    found = tracker.settled(dataclasses.asdict(compose.compose(["model=nano", *overrides]).tracker))
    return found["project"], found["entity"], found["group"], found["tags"]


def test_the_config_goes_before_wandbs_variables_and_they_before_ours(monkeypatch):
    for name in ("PROJECT", "ENTITY", "RUN_GROUP", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert settled() == ("moeexp", None, None, [])
    for name, value in {"PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "TAGS": "a, b,"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert settled() == ("p", "e", "g", ["a", "b"])
    set_here = ["tracker.project=moeexp", "tracker.entity=x", "tracker.group=y", "tracker.tags=[]"]
    assert settled(*set_here) == ("moeexp", "x", "y", [])


@pytest.mark.parametrize("given, variable, group", [(["tracker.group=mine"], "theirs", "mine"), ([], "theirs", "theirs"),
                                                     ([], None, "a sweep")])  # fmt: skip
def test_the_group_of_a_run_in_a_sweep(given, variable, group, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", variable or "")
    config = dataclasses.asdict(compose.compose(["model=nano", *given]))
    run = Record(tmp_path / "record.json", id="a", config=config, command=[])
    wandb = SimpleNamespace(init=lambda **settings: settings, Settings=lambda **settings: settings)
    made = tracker._init(wandb, run.data, tmp_path, "offline", "a sweep", "id1")
    assert made["group"] == group and made["project"] == "moeexp" and made["tags"] == ["running"]


def test_a_record_says_where_it_was_tracked(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert run() == 0
    (record,) = records()
    assert record["config"]["tracker"]["project"] == "theirs"
    assert json.loads(Path("outputs/runs.jsonl").read_text())["id"] == record["id"]
