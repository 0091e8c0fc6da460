"""The config's types. Values live in `conf/*.yaml`; this file says what a value may be made of.

`Config` is a structured Hydra config: an unknown key or a value of the wrong type is refused while composing. What
values are allowed, alone and together, is in `validate.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    name: str = MISSING
    weights: str = MISSING  # `shipped`, `random`, or the folder of a Hugging Face snapshot
    architecture: dict[str, Any] | None = MISSING  # Hugging Face text-config keys; a snapshot's config.json wins
    seed: int = MISSING  # of random weights
    heldout: str | None = MISSING  # text for bits per byte: `shipped`, a path, or null for none
    tokenizer: str = MISSING


@dataclass
class QuantConfig:
    name: str = MISSING
    bits: int = MISSING  # 16 is unquantised
    group_size: int | None = MISSING  # null: by model, see validate.default_group_size
    skip: list[str] = MISSING  # kinds of weights left unquantised


@dataclass
class OpsConfig:
    """`default` names the implementation of every op that is null here; a name, or a user's `module:function`."""

    default: str = MISSING
    linear: str | None = None
    gdn_prefill: str | None = None
    gdn_decode: str | None = None
    qk_norm_rope: str | None = None
    sdpa_prefill: str | None = None
    sdpa_decode: str | None = None
    router: str | None = None
    moe_prefill: str | None = None
    moe_decode: str | None = None
    sample: str | None = None


@dataclass
class SamplerConfig:
    name: str = MISSING
    temperature: float = MISSING
    top_k: int | None = MISSING
    top_p: float | None = MISSING
    seed: int = MISSING


@dataclass
class TrackerConfig:
    name: str = MISSING
    # null: what W&B's own variables say (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS), else see wandb_place.py
    project: str | None = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    tags: list[str] | None = MISSING
    mode: str = MISSING
    path: str | None = MISSING  # the file that tracker=jsonl appends to
    timeout_s: float = MISSING  # the longest that tracking may take


@dataclass
class CellConfig:
    """One cell of a design that is no grid."""

    name: str = MISSING
    set: list[str] = field(default_factory=list)  # overrides, as on the command line


@dataclass
class LauncherConfig:
    isolation: str = MISSING  # auto: a process per run in a sweep, none for a single run
    gpus: Any = MISSING  # how many, `all`, or a list of indices
    timeout_s: float | None = MISSING  # of one run
    fail_fast: bool = MISSING
    strict: bool = MISSING  # an invalid cell fails the sweep
    root: str = MISSING  # where earlier runs are looked for
    design: str | None = MISSING  # the name of what `cells` is
    cells: list[CellConfig] = MISSING  # a design: one run each, instead of one run
    only: Any = MISSING  # names or numbers of the design's cells to run, a list or a single one; empty: all


@dataclass
class Config:
    model: ModelConfig = MISSING
    quant: QuantConfig = MISSING
    ops: OpsConfig = MISSING
    sampler: SamplerConfig = MISSING
    tracker: TrackerConfig = MISSING
    launcher: LauncherConfig = MISSING
    artifact: str | None = MISSING  # a folder that `python -m moeexp.export` wrote; fixes what it was made with
    dispatch: str = MISSING
    state: str = MISSING
    shared_stream: bool = MISSING
    skip_output_copy: bool = MISSING
    # A bool or a string. Hydra cannot choose a config group by a boolean, so this is a field.
    cuda_graph: Any = MISSING
    prefill_graph_lengths: list[int] = MISSING  # of cuda_graph=all
    overlap: bool = MISSING  # kernels of a captured step start before the previous one ends
    l2_prefetch: bool = MISSING  # a projection of a decode step brings the next one's weights into L2
    loop_ahead: int = MISSING  # of cuda_graph=loop and all: steps enqueued beyond the token that the host reads
    export: str = MISSING
    dtype: str = MISSING
    allocator: str = MISSING
    check: str = MISSING
    device: str = MISSING
    threads: Any = MISSING  # of the CPU: auto, or a number
    batch: int = MISSING
    prompt: str | None = MISSING
    prompt_ids: list[int] | None = MISSING
    prompt_len: int | None = MISSING
    new_tokens: int = MISSING
    max_seq_len: int = MISSING
    eos: bool = MISSING  # a row ends at its first end-of-sequence token, the run once all have; only answers count as tokens
    seed: int = MISSING
    repeats: int = MISSING  # rounds of one prefill and one generation: at least so many,
    min_samples: int = MISSING  # and until there are so many token latencies,
    min_time_s: float = MISSING  # and until so long was measured
    eval_bytes: int = MISSING  # bytes of held-out text for bits per byte; 0 leaves it out
    profile: str = MISSING  # trace: a Chrome trace of a few decode steps beside the record
    engine: str = MISSING  # transformers: time its own generate instead, as the ladder's first rung
    rerun: str = MISSING  # which cells of a repeated sweep run again
    dry_run: bool = MISSING  # list what would run, and stop


GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "quant": QuantConfig,
    "ops": OpsConfig,
    "sampler": SamplerConfig,
    "tracker": TrackerConfig,
    "launcher": LauncherConfig,
}


def conf_dir() -> Path:
    """The folder of YAML files: `<repo>/conf` in a checkout, `moeexp/conf` in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise RuntimeError(f"no conf/config.yaml in {package} or beside it: reinstall moeexp")


def register() -> None:
    """Make `config_schema` known to Hydra. Idempotent."""
    ConfigStore.instance().store(name="config_schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Plain dataclasses from Hydra's composed config. `ValueError` for a key that `+key=…` added or `~key` removed."""
    _check_keys(composed, Config)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def _check_keys(node: DictConfig, schema: type, prefix: str = "") -> None:
    known, given = {field.name for field in dataclasses.fields(schema)}, {str(key) for key in node}
    for key in sorted(given - known):
        raise ValueError(f"there is no setting {prefix}{key}; `python -m moeexp --help` lists groups and fields")
    for key in sorted(known - given):
        raise ValueError(f"the setting {prefix}{key} is missing: it cannot be removed, only set")
    if not prefix:
        for key, group in GROUPS.items():
            _check_keys(node[key], group, f"{key}.")


def model_label(name: str, weights: str) -> str:
    """What to call a model: a snapshot by its folder, whatever `model=` it was chosen under."""
    return name if weights in ("shipped", "random") else Path(weights).expanduser().absolute().name


# What compiled methods and stored weights fix. The rest (sampler, graph, check, prompt, …) is the run's own.
FIXED = (
    "model.name", "model.weights", "model.architecture", "model.seed", "model.tokenizer",
    "quant.name", "quant.bits", "quant.group_size", "quant.skip",
    *(f"ops.{field.name}" for field in dataclasses.fields(OpsConfig) if field.name != "sample"),
    "engine", "dispatch", "state", "l2_prefetch", "export", "dtype", "device", "batch", "max_seq_len", "threads",
)  # fmt: skip
