"""The config's groups of settings, each field with its row of the table of axes, see `schema.py`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from moeexp.config.axis import ARTIFACT, COMPILE_KEY, CONTENTS, MANY, TRANSFORMERS, axis

# What torch takes as one.
SEED: dict[str, Any] = {"least": 0, "most": (1 << 63) - 1}
SECONDS = 1 << 31
# What a method is made of: the ops by what they resolve to.
METHOD = [ARTIFACT, COMPILE_KEY]


@dataclass
class ModelConfig:
    name: str = axis("the shapes' name", part_of=[ARTIFACT])
    weights: str = axis(
        "where the weights come from",
        values={"shipped": "the trained checkpoint of the package", "random": "drawn from `model.seed`"},
        others="the folder of a Hugging Face snapshot", part_of=[ARTIFACT], identity=CONTENTS,
    )  # fmt: skip
    architecture: dict[str, Any] | None = axis(
        "the shapes, by Hugging Face's text-config keys; a snapshot's config.json wins", part_of=METHOD
    )
    seed: int = axis("seed of random weights", **SEED, part_of=[ARTIFACT])
    heldout: str | None = axis(
        "text for bits per byte", values={"shipped": "that of the package"}, others="a path, or null for none",
        identity=CONTENTS,
    )  # fmt: skip
    tokenizer: str = axis(
        "how text becomes tokens",
        values={"auto": "by the snapshot's own, else by bytes where the vocabulary is 256", "bytes": "", "none": ""},
        part_of=[ARTIFACT],
    )


@dataclass
class QuantConfig:
    name: str = axis("the quantisation's name", part_of=[ARTIFACT])
    bits: int = axis("bits of a weight", values={16: "unquantised", 8: "", 4: ""}, part_of=METHOD, only={TRANSFORMERS: 16})
    group_size: int | None = axis(
        "weights of a row that share a scale: a power of two that divides every row; null: 64 or 128, by the model",
        part_of=METHOD,
        least=2,
        most=MANY,
    )
    skip: list[str] = axis("kinds of weights that stay unquantised", part_of=METHOD)


@dataclass
class OpsConfig:
    """A name of the registry, a user's own `module:function`, or null for what `default` names."""

    default: str = axis("the implementation of every op that is not named itself", part_of=[ARTIFACT])
    linear: str | None = axis("projections and the head", default=None, part_of=METHOD)
    gdn_prefill: str | None = axis("gated delta net, several tokens", default=None, part_of=METHOD)
    gdn_decode: str | None = axis("gated delta net of a decode step: one token, or `verify_tokens`", default=None, part_of=METHOD)
    qk_norm_rope: str | None = axis("norms of q and k, rotary embedding, append to the KV cache", default=None, part_of=METHOD)
    sdpa_prefill: str | None = axis("attention, several tokens", default=None, part_of=METHOD)
    sdpa_decode: str | None = axis("attention of a decode step: one token, or `verify_tokens`", default=None, part_of=METHOD)
    router: str | None = axis("router and top-k", default=None, part_of=METHOD)
    moe_prefill: str | None = axis("experts, several tokens", default=None, part_of=METHOD)
    moe_decode: str | None = axis("experts, one token", default=None, part_of=METHOD)
    sample: str | None = axis("choice of the next token, in no method", default=None)


@dataclass
class SamplerConfig:
    name: str = axis(
        "how the next token is chosen",
        values={"greedy": "the argmax", "gumbel": "drawn, by the Gumbel-max trick"}, only={TRANSFORMERS: "greedy"},
    )  # fmt: skip
    temperature: float = axis("of gumbel; none is sampler=greedy", least=1e-6, most=MANY)
    top_k: int | None = axis("of gumbel: draws among so many; null: among all", least=1, most=MANY)
    top_p: float | None = axis("of gumbel: draws among the most probable up to this mass; null: among all", least=1e-6, most=1)
    seed: int = axis("seed of the draws", **SEED)


@dataclass
class TrackerConfig:
    # null: what W&B's own variables say (WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS), else see wandb_place.py
    name: str = axis("which tracker", values=("wandb", "jsonl"))
    project: str | None = axis("W&B's; null: $WANDB_PROJECT, else moeexp")
    entity: str | None = axis("W&B's; null: $WANDB_ENTITY, else the one logged in")
    group: str | None = axis("W&B's; null: $WANDB_RUN_GROUP, else the sweep's folder, in a sweep")
    tags: list[str] | None = axis("W&B's; null: $WANDB_TAGS, else none; the run's status is always one")
    mode: str = axis(
        "of W&B", values={"auto": "online when logged in, else offline", "online": "", "offline": "", "disabled": ""}
    )
    path: str | None = axis("of tracker=jsonl: the file that is appended to")
    timeout_s: float = axis(
        "seconds that tracking may take; what cannot be logged online is logged offline, in 60 more", least=1, most=SECONDS
    )


@dataclass
class CellConfig:
    """One cell of a design that is no grid."""

    name: str = MISSING
    set: list[str] = dataclasses.field(default_factory=list)  # overrides, as on the command line


@dataclass
class LauncherConfig:
    isolation: str = axis(
        "which runs of a sweep share a process", default="auto",
        values={"auto": "`run` in a sweep, `none` for a single run", "run": "none: a process each",
                "group": "those that share weights, in turns", "none": "all, and with the command: for debugging"},
    )  # fmt: skip
    gpus: Any = axis(
        "how many runs at a time, one per GPU", default=1, values=("all",), others="a number, or a list of indices",
        kind=int | str | list[int],
    )  # fmt: skip
    timeout_s: float | None = axis(
        "seconds that one run in its own process may take; null for no limit", default=3600.0, least=1, most=SECONDS
    )
    fail_fast: bool = axis("whether the first failure ends the sweep", default=False)
    strict: bool = axis("whether an invalid cell fails the sweep", default=False)
    root: str = axis("where a repeated sweep looks for earlier runs, beside its own folder", default="multirun")
    design: str | None = axis("the name of what `launcher.cells` is", default=None)
    cells: list[CellConfig] = axis("a design that is no grid: one run each, instead of one run", default=list)
    only: Any = axis(
        "of a design: names or numbers of the cells to run, a list or a single one; empty: all", default=list,
        kind=int | str | list[int | str],
    )  # fmt: skip
