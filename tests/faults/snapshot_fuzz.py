"""Damaged snapshots: what to start from, what is changed in them, and what a run reads of them, in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record_fuzz
from common import EVEN, build_snapshot

from moeexp.config import resolve
from moeexp.config.compose import compose
from moeexp.model.inputs import check_inputs
from moeexp.run.identity import Identities

VALUES: tuple[Any, ...] = (
    *record_fuzz.VALUES, "false", "NaN", float("nan"), float("inf"), -0.5, 4096, 10**9, 2**31 - 1, 2**31, 2**63, [1, 2, 3], [[1]],
    ["full_attention"] * 3, "\x1b[31m\n", "../x",
)  # fmt: skip
# What transformers or we read, and the shapes of tests do not set.
MORE = (
    "quantization_config", "compression_config", "rope_scaling", "full_attention_interval", "architectures", "dtype",
    "attn_implementation", "auto_map", "id2label", "num_labels", "vision_config", "norm_topk_prob", "pad_token_id",
    "original_max_position_embeddings", "generation_config", "per_layer_config", "hidden_act", "attention_bias", "model_type",
    "repetition_penalty", "sequence_bias",
)  # fmt: skip
SECONDS = 20


def build(folder: Path) -> list[Path]:
    """A flat config with an index of two shards, and a nested one beside a single file."""
    build_snapshot(folder / "flat", EVEN, shards=2)
    build_snapshot(folder / "nested", EVEN, vision=True, layout="per_expert", prefix="model.language_model.")
    return [folder / "flat", folder / "nested"]


def overrides(folder: Path) -> list[str]:
    more = ["model.heldout=null", "model.tokenizer=none", "export=eager", "quant=none", "device=cpu"]
    return ["model=tiny", f"model.weights={folder}", *more]


def refusal(folder: Path, what: str) -> str | None:
    """The line with which a run refuses it before it begins, None where it does not. Anything else fails."""
    with record_fuzz.in_time(what, SECONDS):
        try:
            cfg = resolve.resolved(compose(overrides(folder)), cuda_available=False)
            Identities().files(cfg)
            check_inputs(cfg)
        except ValueError as error:
            said = str(error)
            assert len(said) <= 400 and said.isprintable(), (what, said)
            return said
    return None


def places(config: dict[str, Any]) -> list[tuple]:
    """Every key of a config.json, and of one inside it, those that it lacks included."""
    found = [place for place in record_fuzz.nodes(config) if place and isinstance(place[-1], str)]
    levels = [(), ("text_config",)] if "text_config" in config else [()]
    return list(dict.fromkeys([*found, *((*level, key) for level in levels for key in MORE)]))


def configs(folder: Path) -> Iterator[tuple[str, bytes]]:
    """A value of every kind at every place."""
    config = json.loads((folder / "config.json").read_text())
    for place in places(config):
        for value in VALUES:
            yield (
                f"{folder.name}: {'.'.join(place)} = {value!r:.60}",
                record_fuzz.dumped(record_fuzz.replaced(config, place, value)),
            )


def broken(data: bytes, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file's bytes, cut, changed, or with something in them that is no JSON."""
    while True:
        cut, at, byte = generator.randrange(len(data)), generator.randrange(len(data)), generator.randrange(256)
        yield f"cut to {cut} bytes", data[:cut]
        yield f"byte {at} = {byte}", data[:at] + bytes([byte]) + data[at + 1 :]
        raw = generator.choice(record_fuzz.RAW)
        yield f"{raw[:20]!r} at {at}", data[:at] + raw + data[at:]
