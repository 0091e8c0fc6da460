"""Settings of a snapshot that would change greedy decoding: those of transformers, and a run says that it applies none."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from common import ODD, build_snapshot

from moeexp import cli
from moeexp.config.generation_settings import SETTINGS, unapplied

GENERATION = "generation_config.json"
PROMPT, NEW = [5, 17, 42, 42, 1, 9], 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "snapshot"
    build_snapshot(path, dataclasses.replace(ODD, eos_token_ids=()))
    return path


@pytest.fixture(scope="module")
def generate(folder):
    """What transformers makes of a prompt with a generation config, greedily."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def generate(prompt, **settings):
        (folder / GENERATION).write_text(json.dumps(settings))
        config, ids = GenerationConfig.from_pretrained(folder), torch.tensor([prompt])
        config.update(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found[0, len(prompt) :].tolist()

    return generate


CHANGING = {
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "guidance_scale": 9.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 20,
    "min_new_tokens": NEW,
    "exponential_decay_length_penalty": [1, 9.0],
    "bad_words_ids": [["first"]],
    "sequence_bias": [[[7], 50.0]],
    "suppress_tokens": ["first"],
    "begin_suppress_tokens": ["first"],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "watermarking_config": {"bias": 50.0},
    "num_beams": 4,
}
# Nearly all tokens, for what is about repeating one.
ALL = list(range(ODD.vocab_size - 1))
REPEATING = ("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
PROMPTS = {"forced_bos_token_id": PROMPT[:1]} | dict.fromkeys(REPEATING, ALL)


def test_every_setting_is_tried():
    assert CHANGING.keys() == SETTINGS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", CHANGING)
def test_what_changes_the_tokens_of_transformers_is_told(folder, generate, key):
    prompt = PROMPTS.get(key, PROMPT)
    plain = generate(prompt)
    end = {"eos_token_id": plain[3]} if key.startswith(("min_", "exponential")) else {}
    value = json.loads(json.dumps(CHANGING[key]).replace('"first"', f"{plain[0]}"))
    assert generate(prompt, **end, **{key: value}) != generate(prompt, **end)
    (folder / GENERATION).write_text(json.dumps({key: value}))
    assert unapplied(folder) == {key: value}


IDLE = [
    {"temperature": 0.3, "top_k": 3, "top_p": 0.2, "min_p": 0.5, "typical_p": 0.4, "do_sample": True},
    {"repetition_penalty": 1, "encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beams": 1},
    {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0},
    {"suppress_tokens": [], "begin_suppress_tokens": []},
    dict.fromkeys(SETTINGS),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", IDLE, ids=lambda settings: next(iter(settings)))
def test_what_changes_nothing_is_not_told(folder, generate, settings):
    assert generate(PROMPT, **settings) == generate(PROMPT)
    (folder / GENERATION).write_text(json.dumps(settings))
    assert unapplied(folder) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
def test_config_json_is_read_where_transformers_reads_it(tmp_path, nested):
    from transformers import AutoModelForCausalLM

    build_snapshot(tmp_path, ODD, vision=nested, prefix="model.language_model." if nested else "model.")
    config = json.loads((tmp_path / "config.json").read_text())
    (config["text_config"] if nested else config)["repetition_penalty"] = 9.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    for found in ({"repetition_penalty": 9.0}, {}):
        penalty = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.repetition_penalty
        assert penalty == found.get("repetition_penalty") and unapplied(tmp_path) == found
        (tmp_path / GENERATION).write_text("{}")


MALFORMED = [
    *(("repetition_penalty", value) for value in ("1.1", True, 0, -1.0, [1.1], float("nan"), float("inf"), "x" * 5000)),
    *(("no_repeat_ngram_size", value) for value in (1.5, -1, "3", False)),
    *(("suppress_tokens", value) for value in (7, ["7"], [[7]], [True], {"7": 1}, [-1])),
    *(("bad_words_ids", value) for value in ([7], [["a"]], 7)),
    *(("sequence_bias", value) for value in ([[7, 1.0]], [[[7], "1"]], {"7": 1.0})),
    ("exponential_decay_length_penalty", [1.5, 1.1]), ("exponential_decay_length_penalty", [1]), ("forced_bos_token_id", [7]),
    ("forced_eos_token_id", [[7]]), ("watermarking_config", True), ("num_beams", 0), ("guidance_scale", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), MALFORMED, ids=lambda value: str(value)[:20])
def test_a_value_that_cannot_be_is_one_line(tmp_path, key, value):
    (tmp_path / GENERATION).write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=f"^{key}=.*; allowed: .*, or null$") as caught:
        unapplied(tmp_path)
    assert str(tmp_path / GENERATION) in str(caught.value) and len(str(caught.value)) - len(str(tmp_path)) < 200


def test_a_run_says_what_it_does_not_apply(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["model=tiny", f"model.weights={folder}", "model.heldout=null", "device=cpu", "export=eager", "quant=none", "check=off"]
    run += ["tracker=jsonl", "prompt_len=9", "new_tokens=2", "max_seq_len=24", "repeats=1", "min_samples=1", "min_time_s=0"]

    def said(settings, code=0):
        (folder / GENERATION).write_text(json.dumps(settings))
        assert cli.main([*run, f"hydra.run.dir={code}{len(settings)}"]) == code
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning", "error"))]

    assert said({"temperature": 0.6}) == []
    (line,) = said({"repetition_penalty": 1.1, "suppress_tokens": list(range(60)), "temperature": 0.6})
    start = "the snapshot's generation config sets repetition_penalty=1.1, suppress_tokens=[0, 1, 2,"
    assert line.startswith(f"warning: {start}") and "temperature" not in line and len(line) <= 400
    notes = [json.loads(Path(name, "record.json").read_text())["notes"] for name in ("01", "03")]
    assert notes[0] == [] and [note for note in notes[1] if note.startswith(start)] == [line.removeprefix("warning: ")]
    (line,) = said({"repetition_penalty": "1.1"} | {"num_beams": 1, "min_length": 0, "top_k": 1}, code=2)
    assert line == f"error: repetition_penalty='1.1' in {folder / GENERATION}; allowed: a number above 0, or null"
