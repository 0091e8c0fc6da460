"""The command that runs a record's config again: what it composes to, what it refuses, and who may say what runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import synthetic

from moeexp import reproduce
from moeexp.config.architecture import Architecture
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.record.record import plain, read_record
from moeexp.report import command_line
from moeexp.report.html import page

RESULTS = sorted((Path(__file__).parents[1] / "results").rglob("record.json"))
# Rungs of the published ladder, by implementations that were removed since; and what had a setting on that is gone.
OF_OLDER_CODE = [path for path in RESULTS if path.parts[-3].startswith("ladder_qwen") and path.parts[-2] in ("13", "14")]
PREFETCHED = [path for path in RESULTS if json.loads(path.read_text())["config"].get("l2_prefetch") and path not in OF_OLDER_CODE]

CONFIGS = [
    [],
    ["model=nano", "quant=none", "export=eager"],
    ["model=nano", "quant.group_size=16", "ops=reference", "ops.gdn_decode=einsum"],
    ["model=nano", "batch=2", "prompt_len=5", "new_tokens=3", "check=off", "repeats=2"],
    ["model=nano", "prompt_ids=[5,17]", "quant.skip=[head,embedding,router,shared_expert_gate]"],
    ["model=tiny", 'prompt="say \\"no\\", it\'s {a: [b]} = 5 %"', "eval_bytes=64"],
    ["model=tiny", "prompt=null", "prompt_len=7", "model.heldout=null"],
]


@pytest.mark.parametrize("overrides", CONFIGS, ids=lambda overrides: " ".join(overrides)[:40] or "defaults")
def test_the_derived_command_resolves_to_the_same_config(overrides):
    config = resolve(compose(overrides), cuda_available=False)
    derived = command_line.overrides_of(plain(config))
    again = compose(derived)
    validate(again, cuda_available=False)
    assert plain(resolve(again, cuda_available=False)) == plain(config)


def test_the_command_can_be_pasted_into_a_shell():
    record = synthetic.record('prompt="it\'s"', "launcher.strict=true", "tracker=jsonl")
    words = shlex.split(command_line.command_of(record))
    assert words[:3] == ["python", "-m", "moeexp"] and 'prompt="it\'s"' in words and "model=nano" in words
    assert not [word for word in words if word.startswith(("launcher", "tracker"))]


def test_on_a_gpu_too():
    config = resolve(compose(["model=nano", "cuda_graph=true"]), cuda_available=True)
    derived = command_line.overrides_of(plain(config))
    again = compose(derived)
    validate(again, cuda_available=True)
    assert plain(resolve(again, cuda_available=True)) == plain(config) and "dtype=bfloat16" in derived


def test_a_users_own_config_folder_goes_with_it(tmp_path):
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "mine.yaml").write_text("name: mine\nbits: 8\ngroup_size: 32\nskip: [embedding, router]\n")
    record = synthetic.record("quant=none")
    record["config"]["quant"] = {"name": "mine", "bits": 8, "group_size": 16, "skip": ["embedding", "router"]}
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        record["command"] = ["python", "-m", "moeexp", *flag, "quant=mine"]
        arguments = command_line.arguments_of(record, trust=True)
        assert arguments[:2] == ["--config-dir", str(tmp_path)]
        assert "quant=mine" in arguments and [a for a in arguments if a.startswith("quant.")] == ["quant.group_size=16"]


@pytest.mark.parametrize("path", OF_OLDER_CODE, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_record_of_an_implementation_that_was_removed_is_read_and_not_run_again(path, capsys, tmp_path):
    record = read_record(path)
    assert record["decode_tok_s"] > 800
    assert reproduce.main([str(path), "--out", str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: ops\.(router=in_moe|gdn_decode=with_out) was removed: .*; use ops\.\w+=triton$", line)
    assert " was removed: it made no step faster" in page.page([record], title="t") and not (tmp_path / "again").exists()


@pytest.mark.parametrize("path", PREFETCHED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_record_with_a_setting_on_that_is_gone_is_read_and_not_run_again(path, capsys, tmp_path):
    assert reproduce.main([str(path), "--out", str(tmp_path / "again")]) == 2
    gone = "l2_prefetch was removed: it showed no gain (docs/log.md); leave it out"
    assert capsys.readouterr().err == f"error: the record's {gone}\n" and not (tmp_path / "again").exists()
    report = page.page([read_record(path)], title="t")
    assert gone in report and "As it was given; " in report


@pytest.mark.parametrize(
    "path",
    [path for path in RESULTS if path not in [*OF_OLDER_CODE, *PREFETCHED]],
    ids=lambda path: "/".join(path.parts[-3:-1]),
)
def test_the_published_records_give_commands_that_compose_to_their_configs(path):
    record = read_record(path)
    arguments = command_line.arguments_of(record)  # compares each field
    assert shlex.split(command_line.command_of(record))[3:] == arguments
    config, cuda = compose(arguments), record["config"]["device"] == "cuda"
    validate(config, cuda_available=cuda)
    again, then = plain(resolve(config, cuda_available=cuda)), dict(record["config"])
    for left_out in ("tracker", "launcher"):
        again.pop(left_out), then.pop(left_out)
    assert then.pop("l2_prefetch", False) is False
    assert _shapes(again) == _shapes(then)
    assert {key: again[key] for key in then} == then, "a setting that is younger than a record has its default"


def _shapes(config):
    """Taken out: `resolve` leaves those of random weights as they were given."""
    config["model"] = dict(config["model"])
    return Architecture.from_hf(config["model"].pop("architecture"))


def test_there_are_published_records():
    assert len(RESULTS) >= 22 and len(OF_OLDER_CODE) == 2 and len(PREFETCHED) == 3


def test_a_config_that_is_not_what_its_command_composes_to_is_refused(monkeypatch):
    """Whatever goes wrong in writing the command, nothing runs but the record's config."""
    record = synthetic.record("export=eager")
    monkeypatch.setattr(command_line, "hydra_value", lambda value: "7" if value == "eager" else str(value))
    with pytest.raises(ValueError, match="^export='eager' of the record composes to '7': it cannot be run as it was$"):
        command_line.arguments_of(record)


def test_what_an_artifact_fixes_is_left_to_it(tmp_path):
    """Its weights are its own: told again, they would be refused as others."""
    record = synthetic.record("model=tiny", "export=aoti", "new_tokens=5")
    record["config"]["artifact"] = str(tmp_path)
    record["config"]["model"]["weights"] = str(tmp_path / "model")
    arguments = command_line.arguments_of(record, trust=True)
    assert f'artifact="{tmp_path}"' in arguments and "new_tokens=5" in arguments
    assert not [one for one in arguments if one.startswith(("model", "quant", "export", "dtype", "device"))]


def test_a_default_op_that_is_no_group_is_set():
    record = synthetic.record("ops.default=einsum", "ops.linear=reference")
    assert {"ops.default=einsum", "ops.linear=reference"} <= set(command_line.arguments_of(record))
