"""At home in Hydra: users' own configs, help in words, tab completion, search and cluster configs."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moeexp import cli
from moeexp.config import axes as table
from moeexp.config import compose as config_compose
from moeexp.config import schema
from moeexp.record.objective import objective

ROOT = Path(__file__).resolve().parents[1]
NANO = ["model=nano", "export=eager", "tracker=jsonl", "new_tokens=4", "repeats=1", "prompt_len=9"]
# Extra of pyproject.toml -> the Hydra config that needs it, and its `_target_`'s class.
EXTRAS = {
    "optuna": ("hydra/sweeper=search", "sweeper", "OptunaSweeper"),
    "submitit": ("hydra/launcher=slurm", "launcher", "SlurmLauncher"),
    "ray": ("hydra/launcher=ray_cluster", "launcher", "RayLauncher"),
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def hydra_config(*overrides):
    """The whole config, Hydra's own part included."""
    schema.register()
    with initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def help_text(capsys):
    assert cli.main(["--help"]) == 0
    return capsys.readouterr().out


def test_help_names_every_axis_value(capsys):
    text = help_text(capsys)
    axes = text.split("== Axes ==")[1].split("== Fields")[0]
    for path, row in table.SETTINGS.items():
        if "." not in path or row.axis.values:
            for value in (path, *row.axis.values):
                assert str(value).lower() in axes, f"--help does not say {path}={value}"


def test_help_names_every_group_and_choice(capsys):
    text = help_text(capsys)
    for path in schema.conf_dir().glob("*/*.yaml"):
        assert path.stem in text and f"\n{path.parent.name}: " in text
    for field in fields(schema.Config):
        assert f"\n{field.name}:" in text


@pytest.mark.slow
def test_users_own_configs(tmp_path, capsys):
    folder = tmp_path / "mine" / "quant"
    folder.mkdir(parents=True)
    skip = "[embedding, router, shared_expert_gate, head]"
    (folder / "mine.yaml").write_text(f"name: mine\nbits: 8\ngroup_size: 16\nskip: {skip}\n")
    assert cli.main(["--config-dir", str(tmp_path / "mine"), "--cfg", "job", "quant=mine"]) == 0
    assert "group_size: 16" in capsys.readouterr().out
    assert cli.main(["--config-dir", str(tmp_path / "mine"), *NANO, "quant=mine"]) == 0
    (path,) = Path("outputs").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok" and record["config"]["quant"]["name"] == "mine"
    assert record["config"]["quant"]["group_size"] == 16 and "head" in record["config"]["quant"]["skip"]


def test_a_config_dir_that_is_not_there_is_one_line(capsys):
    assert cli.main(["--config-dir", "nowhere", "model=nano"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


def completions(line):
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-m", "moeexp", "-sc", "query=bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("moeexp quant=", {"quant=int4", "quant=int8", "quant=none"}),
        ("moeexp model=nano quant=i", {"quant=int4", "quant=int8"}),
        ("moeexp cuda_g", {"cuda_graph="}),
    ],
)
def test_tab_completion(line, expected):
    assert set(completions(line)) == expected


def test_tab_completion_is_installed_for_the_console_script(capsys):
    assert cli.main(["--shell-completion", "install=bash"]) == 0
    script = capsys.readouterr().out
    assert script.strip().endswith("-F hydra_bash_completion moeexp")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"moeexp": "moeexp.__main__:main"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_configs_for_optional_plugins_compose_without_them(extra):
    override, kind, target = EXTRAS[extra]
    node = hydra_config(override).hydra[kind]
    assert node._target_.endswith(f".{target}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(f"hydra-{extra}-" in requirement for requirement in extras[extra])


def test_the_search_maximises_over_valid_choices():
    config = hydra_config("experiment=optuna_search").hydra
    assert config.sweeper.direction == "maximize" and config.mode.name == "MULTIRUN"
    for key, space in config.sweeper.params.items():
        for choice in space.removeprefix("choice(").removesuffix(")").split(","):
            composed = config_compose.compose([f"{key}={choice}"])  # a choice that does not exist raises
            if key in table.SETTINGS and table.SETTINGS[key].axis.values:
                assert table.get(composed, key) in table.SETTINGS[key].axis.values


def missing(extra):
    return importlib.util.find_spec("hydra_plugins") is None or not importlib.util.find_spec(
        f"hydra_plugins.hydra_{extra}_{EXTRAS[extra][1]}"
    )


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_plugin_that_is_not_installed_is_one_line(extra, monkeypatch, capsys):
    if not missing(extra):
        pytest.skip(f"the {extra} plugin is installed")
    assert cli.main(["-m", *NANO, EXTRAS[extra][0], "quant=none,int4"]) == 2
    error = f"error: the Hydra plugin for {extra} is not installed here: pip install 'moeexp[{extra}]'\n"
    assert capsys.readouterr().err == error


def test_a_search_with_optuna():
    if missing("optuna"):
        pytest.skip("the optuna plugin is not installed")
    assert cli.main(["experiment=optuna_search", "hydra.sweeper.n_trials=2", *NANO]) == 0
    records = [json.loads(path.read_text()) for path in Path("multirun").rglob("record.json")]
    (results,) = Path("multirun").rglob("optimization_results.yaml")
    best = float(results.read_text().split("best_value:")[1])
    assert len(records) == 2 and best == max(record["decode_tok_s"] or 0.0 for record in records)


@pytest.mark.parametrize("extra", ["submitit"])
def test_a_sweep_whose_jobs_are_composed_in_other_processes(extra):
    if missing(extra):
        pytest.skip(f"the {extra} plugin is not installed")
    command = [sys.executable, "-m", "moeexp", "-m", "hydra/launcher=submitit_local", *NANO, "quant=none,int4"]
    subprocess.run(command, check=True)
    records = [json.loads(path.read_text()) for path in Path("multirun").rglob("record.json")]
    assert sorted(record["config"]["quant"]["name"] for record in records) == ["int4", "none"]
    assert {record["status"] for record in records} == {"ok"}


@pytest.mark.parametrize(
    ("status", "check", "speed", "value"),
    [
        ("ok", {"passed": True}, 123.4, 123.4),
        ("ok", {"passed": True}, None, 0.0),  # one new token: nothing was decoded
        ("ok", None, None, 0.0),  # check=off
        ("ok", None, 99.0, 0.0),
        ("incorrect", {"passed": False}, 99.0, 0.0),
        ("failed", None, None, 0.0),
        ("unsupported", None, None, 0.0),
        ("timeout", {"passed": True}, 99.0, 0.0),
    ],
)
def test_only_a_checked_speed_counts(status, check, speed, value):
    assert objective({"status": status, "check": check, "decode_tok_s": speed}) == value
