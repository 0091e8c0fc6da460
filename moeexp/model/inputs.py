"""What a config names besides settings, looked at before any of it is read: headers of weights, the tokenizer, tokens."""

from __future__ import annotations

from moeexp.config import generation_settings
from moeexp.config.architecture import Architecture
from moeexp.config.files import short
from moeexp.config.schema import Config
from moeexp.config.sources import heldout_file, heldout_text, load_architecture, weights_folder
from moeexp.model.checkpoint import Snapshot
from moeexp.model.config_agreement import check_agreement
from moeexp.model.prompt import Text, check_tokens, prompt_tokens, text_of


def check_inputs(cfg: Config) -> None:
    """`ValueError`, one line, for a snapshot that cannot be loaded, a setting of its generation config that has a value which it
    cannot have, and a tokenizer that cannot serve. `cfg` is resolved.

    Of weights only the headers are read; values that are not finite are found as each tensor is loaded."""
    folder = weights_folder(cfg.model)
    if folder is None:
        return
    arch = load_architecture(cfg.model)
    generation_settings.unapplied(folder)
    if cfg.artifact is None:  # whose weights are in files of its own
        check_agreement(cfg.model, arch)
        Snapshot(folder, arch)
    if cfg.prompt is not None:  # given ids need no tokenizer so early: the run itself loads it, before weights
        text = text_of(cfg)
        prompt_tokens(cfg, arch, text)
        check_heldout(cfg, arch, text)


def check_heldout(cfg: Config, arch: Architecture, text: Text) -> None:
    """`ValueError` where held-out text has a token that the model does not know."""
    heldout = heldout_file(cfg.model)
    if cfg.model.weights != "random" and cfg.eval_bytes and heldout is not None and text.own and text.measure is not None:
        ids, _ = text.measure(heldout_text(heldout, cfg.eval_bytes))
        check_tokens(ids, arch, f"held-out text {heldout.name}")


def note_of_generation(cfg: Config) -> str | None:
    """For the record and the user, where the snapshot asks for tokens that a run does not choose."""
    folder = weights_folder(cfg.model)
    found = {} if folder is None else generation_settings.unapplied(folder)
    if not found:
        return None
    listed = ", ".join(f"{key}={short(value, 30)}" for key, value in found.items())
    return (
        f"the snapshot's generation config sets {listed}: not applied here, where tokens are chosen by the logits alone; "
        "transformers' generate may choose others"
    )


def note_of_context(cfg: Config) -> str | None:
    """For the record, where positions go beyond those that the model was made for, or that its yarn stretches it to."""
    arch = load_architecture(cfg.model)
    most, yarn = arch.context, arch.rope_scaling
    if cfg.max_seq_len <= most:
        return None
    if yarn is None:
        limit = f"the model's max_position_embeddings={most}, and its config sets no yarn"
    else:
        limit = (
            f"the {most} positions that the model's yarn reaches (factor={yarn.factor:g} times "
            f"original_max_position_embeddings={yarn.original_max_position_embeddings})"
        )
    return (
        f"max_seq_len={cfg.max_seq_len} is beyond {limit}: what it generates from position {most} on is not what it was made for"
    )
