"""Prompts to tokens."""

import json
from dataclasses import replace

import pytest
import torch
from common import ODD

from moeexp.config.compose import compose
from moeexp.model.prompt import Text, prompt_tokens, text_of

BYTES = Text("bytes", None)


@pytest.fixture(scope="module")
def cfg():
    return compose(["model=nano", "new_tokens=4", "max_seq_len=20"])


def test_bytes_round_trip_and_are_utf8():
    assert BYTES.encode("Aé") == [65, 0xC3, 0xA9]
    assert BYTES.decode(BYTES.encode("Aé – ω")) == "Aé – ω"
    assert BYTES.decode([0xC3, 65, 300]) == "\ufffdA", "half a character and an id beyond the bytes must not raise"


def test_no_text_where_the_model_has_none():
    text = Text("none", None)
    assert text.encode is None and text.decode is None


def test_the_snapshots_own_tokenizer(tmp_path, cfg):
    """Byte-level BPE, as the hub's snapshots bring it, with one merge and a special token at the start that we leave out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"in": 256, "<s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("i", "n")]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe_text", **ODD.to_hf()}))
    text = text_of(replace(cfg, model=replace(cfg.model, weights=str(tmp_path), tokenizer="auto")))
    assert text.encode("inn") == [256, vocab["n"]]
    assert text.decode(text.encode("within é – ω")) == "within é – ω"
    assert text.decode([257, 256]) == "<s>in", "special tokens that a model generates are shown"
    ids, sizes = text.measure("within é – 你<s>")
    assert ids == text.encode("within é – 你<s>") and sizes == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3]
    assert max(sizes[5:-1]) == 1, "letters of two and three bytes, split over tokens"
    assert text.measure("") == ([], [])


def test_a_snapshots_own_python_is_never_run(tmp_path, cfg, monkeypatch):
    """Nor is there a question on the terminal whether it may."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    config = {"model_type": "stranger", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="custom code|trust_remote_code"):
        text_of(replace(cfg, model=replace(cfg.model, weights=str(tmp_path), tokenizer="auto")))
    assert not (tmp_path / "ran").exists()


def test_text_and_given_ids_are_repeated_in_every_row(cfg):
    tokens = prompt_tokens(replace(cfg, prompt="abc", batch=2), ODD, BYTES)
    assert tokens.tolist() == [[97, 98, 99]] * 2 and tokens.dtype == torch.int64 and tokens.is_contiguous()
    assert prompt_tokens(replace(cfg, prompt_ids=[5, 0], batch=3), ODD, BYTES).tolist() == [[5, 0]] * 3


def test_random_rows_differ_and_repeat_by_seed(cfg):
    def draw(**changes):
        return prompt_tokens(replace(cfg, prompt_len=16, batch=2, **changes), ODD, BYTES)

    tokens = draw(seed=1)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < ODD.vocab_size
    assert torch.equal(draw(seed=1), tokens) and not torch.equal(draw(seed=2), tokens)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("prompt", [{"prompt": "x" * 17}, {"prompt_ids": [1] * 17}, {"prompt_len": 17}])
def test_must_leave_room_for_the_new_tokens(cfg, prompt):
    ((name, value),) = prompt.items()
    shorter = {name: 16 if name == "prompt_len" else value[:-1]}
    assert prompt_tokens(replace(cfg, **shorter), ODD, BYTES).shape == (1, 16)
    with pytest.raises(ValueError, match="max_seq_len=20"):
        prompt_tokens(replace(cfg, **prompt), ODD, BYTES)
