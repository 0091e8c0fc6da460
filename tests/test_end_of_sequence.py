"""Where a sequence ends: the ids of a snapshot as transformers reads them, and rows that end before others."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from common import ODD, ODD_CONFIG, build_snapshot
from moeexp_runner import timing

from moeexp import cli
from moeexp.config.architecture import Architecture
from moeexp.config.schema import ModelConfig
from moeexp.model.config_agreement import check_agreement, differences, text_config
from moeexp.record.record import Record
from moeexp.report.intervals import speed_of
from moeexp.run import experiment

GENERATION = "generation_config.json"
NESTED = {"model_type": "qwen3_5_moe", "text_config": ODD_CONFIG | {"eos_token_id": 9}}


def write(folder, config, generation=None) -> ModelConfig:
    """`generation`: a dict, text as it is, or None for no file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / GENERATION).write_text(text)
    return ModelConfig("test", str(folder), None, 0, None, "none")


READ = [
    (ODD_CONFIG, None, (3, 60)),
    (ODD_CONFIG, {"eos_token_id": 7}, (7,)),
    (ODD_CONFIG, {"eos_token_id": [8, 7]}, (8, 7)),
    (ODD_CONFIG | {"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
    (ODD_CONFIG, {}, ()),  # and transformers stops at none
    (ODD_CONFIG, {"eos_token_id": None}, ()),
    (ODD_CONFIG, {"eos_token_id": []}, ()),
    (ODD_CONFIG, {"_from_model_config": True, "eos_token_id": 0}, (0,)),
    (NESTED, None, (9,)),
    (NESTED | {"eos_token_id": 7}, None, (7,)),
    (NESTED | {"eos_token_id": None}, None, (9,)),
    (NESTED | {"eos_token_id": 7}, {"eos_token_id": [1, 2]}, (1, 2)),
]


@pytest.mark.parametrize(("config", "generation", "ids"), READ)
def test_ids_are_those_of_transformers(tmp_path, config, generation, ids):
    model = write(tmp_path, config, generation)
    arch = Architecture.from_folder(tmp_path)
    assert arch.eos_token_ids == ids
    check_agreement(model)
    other = dataclasses.replace(arch, eos_token_ids=(5,))
    assert [key for key, *_ in differences(other, text_config(model))] == ["eos_token_id"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [8, 7]}])
def test_a_model_that_transformers_loads_has_the_same(tmp_path, nested, generation):
    from transformers import AutoModelForCausalLM

    build_snapshot(tmp_path, ODD, vision=nested, prefix="model.language_model." if nested else "model.")
    if generation is not None:
        (tmp_path / GENERATION).write_text(json.dumps(generation))
    found = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    found = () if found is None else (found,) if isinstance(found, int) else tuple(found)
    assert Architecture.from_folder(tmp_path).eos_token_ids == found


MALFORMED = [
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    ("version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
    ("[7]", r"must hold a JSON object, and holds \[7\]"),
    ({"eos_token_id": "7"}, "eos_token_id='7'.*allowed: a token id"),
    ({"eos_token_id": 1.5}, "eos_token_id=1.5.*allowed: a token id"),
    ({"eos_token_id": True}, "eos_token_id=True.*allowed: a token id"),
    ({"eos_token_id": [7, None]}, r"eos_token_id=\[7, None\].*allowed: a token id"),
    ({"eos_token_id": [[7]]}, r"eos_token_id=\[\[7\]\].*allowed: a token id"),
    ({"eos_token_id": {"id": 7}}, "eos_token_id={'id': 7}.*allowed: a token id"),
    ({"eos_token_id": "x" * 5000}, "eos_token_id='xxx.*allowed: a token id"),
]


@pytest.mark.parametrize(("generation", "message"), MALFORMED)
def test_what_is_no_id_is_refused_in_one_line(tmp_path, generation, message):
    write(tmp_path, ODD_CONFIG, generation)
    with pytest.raises(ValueError, match=message) as caught:
        Architecture.from_folder(tmp_path)
    assert str(tmp_path / GENERATION) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) - len(str(tmp_path)) < 300


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path, ODD_CONFIG)
    (tmp_path / GENERATION).symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(ValueError, match=f"{GENERATION} cannot be read"):
        Architecture.from_folder(tmp_path)


@pytest.mark.parametrize("value", ["7", [1.5], True])
@pytest.mark.parametrize("nested", [False, True])
def test_config_json_is_named_where_it_decides(tmp_path, nested, value):
    flat = ODD_CONFIG | {"eos_token_id": value}
    write(tmp_path, {"model_type": "qwen3_5_moe", "text_config": flat} if nested else flat)
    with pytest.raises(ValueError, match=r"must be a token or a list of tokens, or null .*config\.json") as caught:
        Architecture.from_folder(tmp_path)
    shown = "true" if value is True else repr(value)
    assert f"eos_token_id={shown}" in str(caught.value)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "snapshot"
    build_snapshot(folder, dataclasses.replace(ODD, eos_token_ids=()))
    monkeypatch.chdir(tmp_path)

    def run(*overrides, eos=None):
        (folder / GENERATION).write_text(json.dumps({"eos_token_id": eos}))
        command = ["model=tiny", f"model.weights={folder}", "model.heldout=null", "device=cpu", "export=eager", "quant=none"]
        command += ["tracker=jsonl", "batch=3", "prompt_len=9", "new_tokens=12", "max_seq_len=24", "dtype=float32"]
        command += ["repeats=2", "min_samples=1", "min_time_s=0", "eval_bytes=0"]
        code = cli.main([*command, *overrides])
        error = capsys.readouterr().err
        if code == 2:
            return code, error
        records = sorted(Path("outputs").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
        return code, json.loads(records[-1].read_text())

    return run


def test_rows_end_each_at_its_own_end(run):
    code, whole = run()
    assert (code, whole["status"]) == (0, "ok"), whole["check"]
    rows = whole["generated_ids"]
    assert [len(row) for row in rows] == [12] * 3
    # Stops at the first row's third token, the second's sixth; the third row may meet one of them, or none.
    stop = {rows[0][2], rows[1][5]}
    expected = [timing.cut(row, stop) for row in rows]
    lengths = [len(row) for row in expected]
    assert len(set(lengths)) > 1 and min(lengths) < 6, "else this shows nothing"
    code, record = run("eos=true", eos=sorted(stop))
    assert (code, record["status"]) == (0, "ok"), record["check"]
    assert record["generated_ids"] == expected
    assert record["config"]["model"]["architecture"]["eos_token_id"] == sorted(stop)
    steps, latencies = max(lengths) - 1, record["token_latencies_ms"]
    assert latencies["n"] == 2 * steps and record["bytes_per_token"]["counted_steps"] == steps
    tokens = sum(lengths) - 3
    assert [(one["n"], one["tokens"]) for one in record["rounds"]] == [(steps, tokens)] * 2
    assert record["decode_tok_s"] == pytest.approx(1e3 * tokens / steps / latencies["mean"], rel=1e-4)
    if steps >= 8:
        speed = speed_of(record)
        assert speed.interval.low is not None and speed.median_tok_s == pytest.approx(1e3 * tokens / steps / latencies["p50"])


def test_the_timed_rows_are_those_that_were_checked(tmp_path):
    def compared(checked, ids, eos):
        record = Record(tmp_path / "record.json", id="t", config=None, command=["test"])
        record.set(check={"generated_ids": checked, "passed": True, "failures": []})
        experiment._compare_ids(record, ids, eos)
        check = record.data["check"]
        assert "generated_ids" not in check and len(check["failures"]) == (not check["passed"])
        return check["passed"]

    assert compared([[1, 7, 2], [3, 4, 5]], [[1, 7], [3, 4, 5]], {7})
    assert not compared([[1, 7, 2], [3, 4, 5]], [[1, 7], [3, 4]], {7}), "cut, and it had not ended"
    assert not compared([[1, 7, 2], [3, 4, 5]], [[1, 7, 2], [3, 4, 5]], {7}), "not cut"
    assert not compared([[1, 7, 2]], [[1, 7]], None)


@pytest.mark.parametrize("beyond", [ODD.vocab_size, 248046, -1])
def test_an_end_that_cannot_come_is_refused(run, beyond):
    code, message = run("eos=true", eos=[3, beyond])
    assert code == 2
    assert all(part in message for part in (GENERATION, "eos_token_id", f"[{beyond}]", "0 to vocab_size - 1 = 60"))
    assert message.strip().count("\n") == 0


def test_without_an_end_to_stop_at_it_is_refused(run):
    code, message = run("eos=true")
    assert code == 2 and f"{GENERATION} names no eos_token_id" in message


@pytest.mark.slow
def test_transformers_stops_at_the_same_tokens(run, tmp_path):
    from transformers import AutoModelForCausalLM

    prompt = [5, 17, 42, 42, 1, 9]
    given = ["batch=1", "prompt_len=null", f"prompt_ids={json.dumps(prompt, separators=(',', ':'))}"]
    token = run(*given)[1]["generated_ids"][0][4]
    ours = run(*given, "eos=true", eos=token)[1]["generated_ids"][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "snapshot", dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([prompt])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ours == theirs[0, len(prompt) :].tolist() and len(ours) <= 5 and ours[-1] == token
