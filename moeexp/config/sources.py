"""The files that a config names: weights, held-out text, tokenizer, shapes."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from moeexp.config.architecture import Architecture
from moeexp.config.files import check_links, leads_nowhere, short
from moeexp.config.prequantised import check_plain
from moeexp.config.schema import ModelConfig
from moeexp.record.paths import expanded

SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"


def weights_folder(model: ModelConfig) -> Path | None:
    """The snapshot that holds the weights, None when a seed draws them. `ValueError` for a folder that is not there."""
    if model.weights == "random":
        return None
    folder = SHIPPED_CHECKPOINT if model.weights == "shipped" else expanded(model.weights)
    if leads_nowhere(folder):
        raise ValueError(f"model.weights={short(model.weights)} is a link that points to nothing: give the folder of a snapshot")
    if not os.path.isdir(folder):  # where a path that cannot be is none
        raise ValueError(
            f"model.weights={short(model.weights)} is not a folder: give the folder of a Hugging Face snapshot, or random"
            if model.weights != "shipped"
            else f"the shipped checkpoint is missing from {folder}: the installation is incomplete, reinstall moeexp"
        )
    return folder


def heldout_file(model: ModelConfig) -> Path | None:
    """The text that bits per byte are measured on. `ValueError` if it is named and does not exist."""
    if model.heldout is None:
        return None
    path = SHIPPED_CHECKPOINT / "heldout.txt" if model.heldout == "shipped" else expanded(model.heldout)
    if leads_nowhere(path):
        raise ValueError(f"model.heldout={short(model.heldout)} is a link that points to nothing: give a path to UTF-8 text")
    if not os.path.isfile(path):
        raise ValueError(f"model.heldout={short(model.heldout)} is not a file: give a path to UTF-8 text, or null for none")
    return path


def heldout_text(path: Path, size: int) -> str:
    """The first `size` bytes of a held-out text as they stand, without a character that the last of them cuts.

    `ValueError` if they are no UTF-8."""
    with open(path, "rb") as file:
        data = file.read(size + 1)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data[:size], final=len(data) <= size)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start} ({error.reason}): convert it, or set model.heldout=null"
        ) from error


def load_architecture(model: ModelConfig) -> Architecture:
    """Shapes from the snapshot's config.json where there is one, else from `model.architecture`."""
    folder = weights_folder(model)
    if folder is not None:
        check_links(folder)
        return Architecture.from_folder(folder)
    if model.architecture is None:
        raise ValueError(f"model.weights=random and no model.architecture for model={model.name}: give the shapes")
    for key, value in model.architecture.items():
        if isinstance(value, str):
            raise ValueError(f"model.architecture.{key}={value} is text; a number, list or boolean is needed")
    check_plain(model.architecture)
    return Architecture.from_hf(model.architecture)


def tokenizer_kind(model: ModelConfig, arch: Architecture) -> str:
    """`auto` -> the snapshot's own (`auto`) where it has one, `bytes` for a vocabulary of 256, else `none`."""
    if model.tokenizer != "auto":
        return model.tokenizer
    folder = weights_folder(model)
    if folder is not None:
        check_links(folder)
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return "auto"
    return "bytes" if arch.vocab_size == 256 else "none"
