"""What a snapshot asks `transformers.generate` for beside the ids that end a sequence: with some of it greedy decoding chooses
other tokens than those of the largest logits. None of it is applied here.

It stands where transformers reads it, see `end_of_sequence`. Temperature, top_k, top_p and their like are of sampling, and change
nothing that is greedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeexp.config.end_of_sequence import FILE, file_of
from moeexp.config.files import read_object, short

SettingKind = tuple[str, Callable[[Any], bool], Any]  # what it may be, in words and as a test, and what of it changes nothing


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: Any, test: Callable[[Any], bool] = _is_count) -> bool:
    return isinstance(value, list) and all(map(test, value))


def _is_pair(value: Any, first: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == 2 and first(value[0]) and _is_number(value[1])


NUMBER: SettingKind = ("a number", _is_number, 1)
FACTOR: SettingKind = ("a number above 0", lambda value: _is_number(value) and value > 0, 1)
COUNT: SettingKind = ("a whole number of at least 0", _is_count, 0)
BEAMS: SettingKind = ("a whole number of at least 1", lambda value: _is_count(value) and value >= 1, 1)
IDS: SettingKind = ("a list of token ids", _is_list, [])
ID: SettingKind = ("a token id", _is_count, None)
ENDS: SettingKind = ("a token id, or a list of them", lambda value: _is_count(value) or _is_list(value), [])
WORDS: SettingKind = ("a list of lists of token ids", lambda value: _is_list(value, _is_list), [])
DECAY: SettingKind = ("a list of a whole number and a number", lambda value: _is_pair(value, _is_count), None)
BIASES: SettingKind = (
    "a list of [token ids, number]",
    lambda value: _is_list(value, lambda one: _is_pair(one, _is_list)),
    [],
)
TABLE: SettingKind = ("a table", lambda value: isinstance(value, dict), None)

SETTINGS: dict[str, SettingKind] = {
    "repetition_penalty": FACTOR,
    "encoder_repetition_penalty": FACTOR,
    "guidance_scale": NUMBER,
    "no_repeat_ngram_size": COUNT,
    "encoder_no_repeat_ngram_size": COUNT,
    "min_length": COUNT,
    "min_new_tokens": COUNT,
    "exponential_decay_length_penalty": DECAY,
    "bad_words_ids": WORDS,
    "sequence_bias": BIASES,
    "suppress_tokens": IDS,
    "begin_suppress_tokens": IDS,
    "forced_bos_token_id": ID,
    "forced_eos_token_id": ENDS,
    "watermarking_config": TABLE,
    "num_beams": BEAMS,
}


def unapplied(folder: Path) -> dict[str, Any]:
    """{setting: value} of a snapshot, of those that would change greedy decoding. `ValueError`, one line, for a value that a
    setting cannot have."""
    path = file_of(folder)
    config = read_object(path)
    inner = config.get("text_config") if path.name != FILE else None
    found = {}
    for key, (allowed, is_valid, idle) in SETTINGS.items():
        value = config.get(key)
        if value is None and isinstance(inner, dict):
            value = inner.get(key)
        if value is None:
            continue
        if not is_valid(value):
            raise ValueError(f"{key}={short(value, 60)} in {path}; allowed: {allowed}, or null")
        if value != idle:
            found[key] = value
    return found
