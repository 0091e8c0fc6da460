"""Which configs may run, checked before any work: the simple rules of the table of axes, and what settings go together.

`validate` refuses with one `ValueError`: the value, why, what is allowed, what to do. `resolve` then returns the config
that runs, with nothing left to choose; that is the one that is recorded and hashed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from moeexp_runner.pieces import piece_sizes

from moeexp.config import axes, end_of_sequence
from moeexp.config.architecture import Architecture
from moeexp.config.axes import get
from moeexp.config.axis import ON_CPU, TRANSFORMERS
from moeexp.config.quantisation import default_group_size, in_features
from moeexp.config.schema import Config, QuantConfig, model_label
from moeexp.config.sources import heldout_file, heldout_text, load_architecture, tokenizer_kind, weights_folder

DEFAULT_PROMPT = "In the beginning"
DEFAULT_PROMPT_LEN = 32


def validate(cfg: Config, *, cuda_available: bool) -> None:
    """`ValueError` (one line) for a config that cannot run on a machine with or without CUDA."""
    check_values(cfg)
    _check_device(cfg, cuda_available)
    _check_axes(cfg, device_of(cfg, cuda_available))
    arch = load_architecture(cfg.model)
    _check_prompt(cfg, arch)
    _check_quant(cfg.quant, arch)
    _check_ops(cfg, device_of(cfg, cuda_available))
    _check_engine(cfg)
    if cfg.eos:
        folder = weights_folder(cfg.model)
        where = "the model config" if folder is None else str(end_of_sequence.file_of(folder))
        end_of_sequence.check(arch.eos_token_ids, arch.vocab_size, where)


def check_values(cfg: Config) -> None:
    """`ValueError` for a value that its field can never have."""
    for path in axes.SETTINGS:
        check_value(path, get(cfg, path))


def check_value(path: str, value: Any) -> None:
    """As `check_values`, of one setting."""
    axis = axes.SETTINGS[path].axis
    # `1 == True` in Python; cuda_graph=1 is not one of the allowed values.
    named = any(value == known and type(value) is type(known) for known in axis.values)
    if axis.values and not axis.others and not named:
        raise ValueError(f"{path}={_show(value)} is not a value of {path}; allowed: {_list(axis.values)}")
    optional = type(None) in get_args(axes.SETTINGS[path].kind)
    if axis.least is None or named or (optional and value is None):
        return
    assert axis.most is not None, f"{path} of the schema has a least value and no largest one"
    for number in value if isinstance(value, list) else [value]:
        if not (type(number) in (int, float) and axis.least <= number <= axis.most) or (axis.values and type(number) is not int):
            names = f"{_list(axis.values)}, or " if axis.values else ""
            raise ValueError(
                f"{path}={_show(value)[:80]} is out of range; allowed: {names}a number of at least {axis.least} and at most "
                f"{axis.most}{', or null' if optional else ''}"
            )


def _check_device(cfg: Config, cuda_available: bool) -> None:
    if cfg.device == "cuda" and not cuda_available:
        raise ValueError("device=cuda, and torch finds no CUDA GPU here: use device=cpu, or run where there is one")
    if device_of(cfg, cuda_available) == "cuda":
        return
    where = "device=cpu" if cuda_available else "torch finds no CUDA GPU here"
    for path, off in axes.only_in(ON_CPU).items():
        if get(cfg, path) != off:
            raise ValueError(
                f"{path}={_show(get(cfg, path))} needs CUDA, and {where}: use {path}={_show(off)}, "
                + ("or device=cuda" if cuda_available else "or run where there is one")
            )


def _check_axes(cfg: Config, device: str) -> None:
    """Combinations that cannot be. Each refusal has a test that shows the failure it spares."""
    if device == "cuda" and cfg.cuda_graph in ("loop", "all") and not cfg.skip_output_copy:
        raise ValueError(
            f"cuda_graph={cfg.cuda_graph} samples inside the graph, so there is no output to copy: use "
            "skip_output_copy=true, or cuda_graph=decode"
        )
    if cfg.dispatch == "cond" and cfg.state == "shared":
        raise ValueError(
            "dispatch=cond with state=shared would mutate the state inside the branches of torch.cond, which cannot be "
            "compiled: use state=explicit, where it is an output of both branches"
        )
    if cfg.profile == "budget" and (device == "cpu" or cfg.engine != "moeexp" or cfg.new_tokens < 2):
        raise ValueError(
            f"profile=budget times our CUDA kernels of a decode step, and device={device} with engine={cfg.engine} and "
            f"new_tokens={cfg.new_tokens} runs none: use device=cuda, engine=moeexp and new_tokens=2 or more, or profile=off"
        )
    if cfg.profile == "budget" and cfg.check == "off":
        raise ValueError(
            "profile=budget says how long a decode step takes, and with check=off no speed is published: use check=inline or "
            "check=separate, or profile=off"
        )
    if cfg.verify_tokens:
        _check_verify(cfg)
    if cfg.cuda_graph == "all" and not cfg.prefill_graph_lengths:
        raise ValueError("cuda_graph=all needs prefill_graph_lengths, and it is empty: name one, or use cuda_graph=loop")


def _check_verify(cfg: Config) -> None:
    if cfg.verify_tokens == 1:
        raise ValueError("verify_tokens=1 is a decode step: use 2 to 32, or 0 for none")
    if cfg.dispatch != "dual":
        raise ValueError(
            f"verify_tokens={cfg.verify_tokens} is a method beside prefill and decode, and dispatch={cfg.dispatch} has no such "
            "two: use dispatch=dual, or verify_tokens=0"
        )
    if cfg.new_tokens <= cfg.verify_tokens:
        raise ValueError(
            f"verify_tokens={cfg.verify_tokens} with new_tokens={cfg.new_tokens}: a step takes tokens that decoding has fed, one "
            f"fewer than it makes: use new_tokens={cfg.verify_tokens + 1} or more, or fewer verify_tokens"
        )


def _check_prompt(cfg: Config, arch: Architecture) -> None:
    given = [name for name in ("prompt", "prompt_ids", "prompt_len") if getattr(cfg, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both set: give at most one of prompt, prompt_ids and prompt_len")
    tokenizer = tokenizer_kind(cfg.model, arch)
    if tokenizer == "bytes" and arch.vocab_size < 256:
        raise ValueError(f"model.tokenizer=bytes needs a vocabulary of 256 or more; this model has {arch.vocab_size}")
    heldout = heldout_file(cfg.model)
    if heldout is not None and cfg.model.weights != "random":
        heldout_text(heldout, cfg.eval_bytes)
    length = cfg.prompt_len
    if cfg.prompt is not None:
        if tokenizer == "none":
            label = model_label(cfg.model.name, cfg.model.weights)
            raise ValueError(f"prompt is text, and {label} has no tokenizer: use prompt_ids or prompt_len")
        if not cfg.prompt:
            raise ValueError("prompt is empty: give at least one character, or leave it out for the default")
        length = len(cfg.prompt.encode()) if tokenizer == "bytes" else None
    elif cfg.prompt_ids is not None:
        if not cfg.prompt_ids:
            raise ValueError("prompt_ids is empty: give at least one token")
        for token in cfg.prompt_ids:
            if not 0 <= token < arch.vocab_size:
                raise ValueError(f"prompt_ids has {token}; this model's tokens are 0..{arch.vocab_size - 1}")
        length = len(cfg.prompt_ids)
    elif length is None and tokenizer != "auto":
        length = DEFAULT_PROMPT_LEN if tokenizer == "none" else len(DEFAULT_PROMPT.encode())
    if length is None:
        return
    check_lengths(prompt=length, new_tokens=cfg.new_tokens, max_seq_len=cfg.max_seq_len)
    if beyond_graphs(cfg, length):
        raise ValueError(
            f"prompt of {length} tokens with cuda_graph=all is longer than every one of "
            f"prefill_graph_lengths=[{_list(cfg.prefill_graph_lengths)}]: name one of {length} or more, or use "
            f"prefill_chunk={max(cfg.prefill_graph_lengths)}, or cuda_graph=loop"
        )


def beyond_graphs(cfg: Config, length: int) -> bool:
    """Whether prefill should run as graphs, and the pieces of a prompt of so many tokens are too long for all of them."""
    captured = cfg.cuda_graph == "all" and cfg.dispatch != "token_by_token"
    return captured and max(piece_sizes(length, cfg.prefill_chunk)) > max(cfg.prefill_graph_lengths)


def check_lengths(*, prompt: int, new_tokens: int, max_seq_len: int) -> None:
    """`ValueError` if a prompt of so many tokens and the new ones do not fit."""
    if prompt + new_tokens > max_seq_len:
        raise ValueError(
            f"prompt of {prompt} tokens + new_tokens={new_tokens} = {prompt + new_tokens} is beyond "
            f"max_seq_len={max_seq_len}: use max_seq_len={prompt + new_tokens} or more, or fewer tokens"
        )


def _check_quant(quant: QuantConfig, arch: Architecture) -> None:
    from moeexp.config.quantisation import check_skip  # imports torch; `--help` does not need it

    check_skip(tuple(quant.skip))
    group = quant.group_size
    if quant.bits == 16:
        return
    if group is not None and (group < 2 or group & (group - 1)):
        raise ValueError(f"quant.group_size={group} is not a power of two of at least 2: use 32, 64 or 128")
    features = in_features(arch, quant.skip)
    for name, size in features.items():
        if size % 2:  # 4 bits are packed two to a byte
            raise ValueError(
                f"quant.bits={quant.bits}: no even group divides the {size} input features of {name}; leave such matrices out "
                f"by adding {'out_proj' if 'out_proj' in name else name.split()[0]} to quant.skip, or use quant=none"
            )
    if group is None:
        return
    for name, size in features.items():
        if size % group:
            raise ValueError(
                f"quant.group_size={group} does not divide the {size} input features of {name}: "
                f"use quant.group_size={default_group_size(arch, quant)} or another divisor"
            )


def _check_ops(cfg: Config, device: str) -> None:
    from moeexp_kernels.registry import DRAWS
    from moeexp_kernels.registry import resolve as resolve_ops

    chosen = {field.name: getattr(cfg.ops, field.name) for field in fields(cfg.ops) if field.name != "default"}
    names = resolve_ops(default=cfg.ops.default, chosen=chosen, device=device)
    if cfg.sampler.name == "gumbel" and names["sample"] not in DRAWS:
        raise ValueError(
            f"ops.sample={names['sample']} makes no draws, which sampler=gumbel needs: use ops.sample={' or '.join(DRAWS)}, "
            "or sampler=greedy"
        )
    if device == "cuda" and not cfg.skip_output_copy and cfg.ops.sample not in (None, "auto", "reference"):
        raise ValueError(
            f"ops.sample={cfg.ops.sample} with skip_output_copy=false, which samples on the host by ops.sample=reference: "
            "use that, or skip_output_copy=true"
        )


def _check_engine(cfg: Config) -> None:
    """transformers times its own code on unquantised weights: an axis of ours that it would ignore is refused where a
    reader would take the speed for that axis's, and marked as not applicable otherwise. And a design is no single run."""
    if cfg.launcher.cells:
        raise ValueError(
            f"launcher.cells holds a design of {len(cfg.launcher.cells)} runs, and this is one: add -m, and leave "
            "hydra/launcher as it is"
        )
    if cfg.engine == "moeexp":
        return
    for path, only in axes.only_in(TRANSFORMERS).items():
        if get(cfg, path) != only:
            fix = "quant=none" if path == "quant.bits" else f"{path}={_show(only)}"
            raise ValueError(f"engine=transformers has no {path}={_show(get(cfg, path))}: use {fix}, or engine=moeexp")


def device_of(cfg: Config, cuda_available: bool) -> str:
    return cfg.device if cfg.device != "auto" else "cuda" if cuda_available else "cpu"


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(values) -> str:
    return ", ".join(map(_show, values))
