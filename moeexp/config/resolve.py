"""The config that runs: every `auto` and null replaced by what it means here."""

from __future__ import annotations

from dataclasses import asdict, replace

from moeexp.config import threads
from moeexp.config.axes import meant
from moeexp.config.quantisation import default_group_size
from moeexp.config.schema import Config, TrackerConfig
from moeexp.config.sources import load_architecture, tokenizer_kind, weights_folder
from moeexp.config.validate import DEFAULT_PROMPT, DEFAULT_PROMPT_LEN, device_of, validate
from moeexp.record.wandb_place import settled


def resolve(cfg: Config, *, cuda_available: bool, at_once: int = 1) -> Config:
    """The validated config with every `auto` and null that has a meaning replaced by it; `cuda_graph` is then False or
    a string, and exactly one of prompt, prompt_ids and prompt_len is set. `at_once`: runs that share the machine."""
    arch, given = load_architecture(cfg.model), cfg.model.architecture
    device = device_of(cfg, cuda_available)
    tokenizer = tokenizer_kind(cfg.model, arch)
    prompt, prompt_len = cfg.prompt, cfg.prompt_len
    if prompt is None and prompt_len is None and cfg.prompt_ids is None:
        prompt, prompt_len = (None, DEFAULT_PROMPT_LEN) if tokenizer == "none" else (DEFAULT_PROMPT, None)
    group_size = None
    if cfg.quant.bits != 16:
        group_size = cfg.quant.group_size or default_group_size(arch, cfg.quant)
    return replace(
        cfg,
        # What a user gave stays as it is: transformers' reading of it is compared with ours.
        model=replace(cfg.model, architecture=arch.to_hf() if weights_folder(cfg.model) else given, tokenizer=tokenizer),
        quant=replace(cfg.quant, group_size=group_size),
        tracker=TrackerConfig(**settled(asdict(cfg.tracker))),
        cuda_graph=meant("cuda_graph", cfg.cuda_graph),
        prefill_graph_lengths=_graph_lengths(cfg),
        device=device,
        # On a GPU the host's threads load weights and decode nothing: how many there are is no setting of the result.
        threads=threads.choose(cfg.threads, arch, at_once=at_once).number if device == "cpu" else cfg.threads,
        dtype=cfg.dtype if cfg.dtype != "auto" else {"cuda": "bfloat16", "cpu": "float32"}[device],
        prompt=prompt,
        prompt_len=prompt_len,
    )


def _graph_lengths(cfg: Config) -> list[int]:
    """Ascending, and as long as the context at most: beyond it there is no prompt."""
    return sorted({min(length, cfg.max_seq_len) for length in cfg.prefill_graph_lengths})


def resolved(cfg: Config, *, cuda_available: bool, at_once: int = 1) -> Config:
    """Both: the config that runs, or `ValueError`."""
    validate(cfg, cuda_available=cuda_available)
    return resolve(cfg, cuda_available=cuda_available, at_once=at_once)
