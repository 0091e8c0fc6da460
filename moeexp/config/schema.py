"""The config's types, and the one table of axes: each field's row says what it is, what it may be and what it is part of.

`Config` is a structured Hydra config: an unknown key or a value of the wrong type is refused while composing. Lists of
settings are derived from the rows, see `axes.py`; which settings go together is in `validate.py`. What `conf/*.yaml` sets
are the choices of groups, and recipes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from moeexp.config import threads as cpu_threads
from moeexp.config.axis import (
    ARTIFACT,
    AXIS,
    BEFORE_HOPPER,
    COMPILE_KEY,
    CONTENTS,
    HOUSEKEEPING,
    MANY,
    MEASUREMENT,
    NO_PREFILL,
    ON_CPU,
    TOKEN_BY_TOKEN,
    TRANSFORMERS,
    VALUE,
    WEIGHTS,
    WITHOUT_GRAPH,
    WORKLOAD,
    axis,
)  # fmt: skip
from moeexp.config.groups import SEED, LauncherConfig, ModelConfig, OpsConfig, QuantConfig, SamplerConfig, TrackerConfig


@dataclass
class Config:
    model: ModelConfig = axis("shapes and weights", role=WORKLOAD, part_of=[WEIGHTS], label="name")
    quant: QuantConfig = axis("weight-only quantisation, grouped (HQQ)", role=AXIS, part_of=[WEIGHTS], label="name")
    ops: OpsConfig = axis(
        "the implementation of each op, by name, or your own `module:function`; `auto` is Triton on CUDA, fp32 torch on a CPU",
        role=AXIS, no_effect=(TRANSFORMERS,), label="default",
    )  # fmt: skip
    sampler: SamplerConfig = axis("the choice of the next token", role=AXIS, label="name")
    tracker: TrackerConfig = axis("where results go beside the record", role=HOUSEKEEPING)
    launcher: LauncherConfig = axis("how a sweep runs", default=LauncherConfig, role=HOUSEKEEPING)
    artifact: str | None = axis(
        "a folder that `python -m moeexp.export` wrote: nothing is exported or quantised again, what it was made with is fixed",
        default=None, role=MEASUREMENT, identity=CONTENTS,
    )  # fmt: skip
    # Housekeeping, as the command of a record must not carry it: whom to trust is for who runs it to say.
    artifact_trust: bool = axis(
        "whether the native code of an artifact runs that was not exported on this machine by its user", default=False,
        role=HOUSEKEEPING,
    )  # fmt: skip
    dispatch: str = axis(
        "how prefill and decode become compiled methods", default="dual", role=AXIS,
        values={"dual": "a prefill and a decode method", "single": "one for any number of tokens, whose ops choose when they run",
                "token_by_token": "the decode method alone", "cond": "one with `torch.cond`; needs `state=explicit`"},
        part_of=[ARTIFACT], no_effect=(TRANSFORMERS,),
    )  # fmt: skip
    state: str = axis(
        "where KV cache, conv and recurrent state live", default="shared", role=AXIS,
        values={"shared": "methods mutate the same tensors in place", "explicit": "state goes in and comes out of each call"},
        part_of=[ARTIFACT, COMPILE_KEY], no_effect=(TRANSFORMERS,),
    )  # fmt: skip
    shared_stream: bool = axis(
        "one CUDA stream for all methods, or one each, ordered by events", default=True, role=AXIS,
        no_effect=(ON_CPU, TRANSFORMERS),
    )  # fmt: skip
    skip_output_copy: bool = axis(
        "logits stay on the GPU and are sampled there, or are copied to the host at each step", default=True, role=AXIS,
        no_effect=(ON_CPU, TRANSFORMERS),
    )  # fmt: skip
    # A bool or a string. Hydra cannot choose a config group by a boolean, so this is a field.
    cuda_graph: Any = axis(
        "what is captured into CUDA graphs and replayed", default=False, role=AXIS, kind=bool | str, means={True: "decode"},
        values={False: "nothing", True: "as `decode`", "decode": "the decode step",
                "loop": "sampling and token feedback too, the host only reads tokens",
                "all": "`loop`, and prefill at `prefill_graph_lengths`"},
        only={ON_CPU: False, TRANSFORMERS: False},
    )  # fmt: skip
    prefill_graph_lengths: list[int] = axis(
        "of `cuda_graph=all`: a shorter prompt is padded, which leaves no trace in the state; pieces longer than all are refused",
        default=lambda: [128, 512], role=AXIS, least=1, most=MANY, no_effect=(NO_PREFILL,),
    )  # fmt: skip
    prefill_chunk: int = axis(
        "tokens of a prompt that one call of prefill takes; a longer one goes through in even pieces; 0: the whole prompt in one",
        default=8192, role=AXIS, least=0, most=MANY, no_effect=(TOKEN_BY_TOKEN, TRANSFORMERS),
    )  # fmt: skip
    verify_tokens: int = axis(
        "beside decoding, a step of so many tokens of each sequence, as speculative decoding verifies its drafts with, on the "
        "tokens that decoding chose; 0: none", default=0, role=MEASUREMENT, least=0, most=32, part_of=[ARTIFACT],
        only={TRANSFORMERS: 0},
    )  # fmt: skip
    pdl: bool = axis(
        "programmatic dependent launch: in a captured decode step a kernel fetches its weights while the one before it runs",
        default=True, role=AXIS, no_effect=(ON_CPU, BEFORE_HOPPER, WITHOUT_GRAPH),
    )  # fmt: skip
    loop_ahead: int = axis(
        "of `cuda_graph=loop` and `all`: steps enqueued beyond the token that the host reads; after a stop they are discarded",
        default=8, role=AXIS, least=1, most=MANY,
    )  # fmt: skip
    export: str = axis(
        "what a method is made of", default="aoti", role=AXIS, part_of=[ARTIFACT], no_effect=(TRANSFORMERS,),
        values={"aoti": "torch.export and AOTInductor", "eager": "the module as it is", "compile": "torch.compile"},
    )  # fmt: skip
    dtype: str = axis(
        "of activations; recurrent state is always float32", default="auto", role=AXIS,
        values={"auto": "bfloat16 on CUDA, float32 on a CPU", "bfloat16": "", "float32": ""},
        part_of=[WEIGHTS, ARTIFACT, COMPILE_KEY],
    )  # fmt: skip
    allocator: str = axis(
        "of CUDA memory: the caching allocator's backend", default="native", role=AXIS, values=("native", "cuda_malloc_async"),
        part_of=[WEIGHTS], no_effect=(ON_CPU,), only={ON_CPU: "native"},
    )  # fmt: skip
    check: str = axis(
        "when a run is checked against transformers' fp32 reference", default="inline", role=MEASUREMENT,
        values={"inline": "before the timing", "separate": "after it, so that its memory is not counted",
                "off": "never, and no speed is published"},
    )  # fmt: skip
    check_logits: int = axis(
        "positions of the prompt, from its end, whose logits the check compares; of those before it compares the expert choices "
        "and what of each stays in the state; 0: all", default=0, role=MEASUREMENT, least=0, most=MANY, no_effect=(TRANSFORMERS,),
    )  # fmt: skip
    device: str = axis(
        "what it runs on", default="auto", role=WORKLOAD, values={"auto": "CUDA where there is a GPU", "cpu": "", "cuda": ""},
        part_of=[WEIGHTS, ARTIFACT, COMPILE_KEY],
    )  # fmt: skip
    threads: Any = axis(
        "of the CPU", default="auto", role=AXIS, kind=int | str, least=1, most=cpu_threads.MOST,
        values={"auto": "as OMP_NUM_THREADS says, else what the model's size gains from, of the cores granted"},
        others="a number", part_of=[WEIGHTS, ARTIFACT],
    )  # fmt: skip
    batch: int = axis(
        "sequences decoded together", default=1, role=WORKLOAD, least=1, most=1 << 16, part_of=[ARTIFACT, COMPILE_KEY]
    )
    prompt: str | None = axis(
        "a text. At most one of the three prompts is set; none: `In the beginning` where the model has text, else 32 tokens",
        default=None, role=WORKLOAD, literal=True,
    )  # fmt: skip
    prompt_ids: list[int] | None = axis("a prompt by its tokens", default=None, role=WORKLOAD)
    prompt_len: int | None = axis("a prompt of so many seeded random tokens", default=None, role=WORKLOAD, least=1, most=MANY)
    new_tokens: int = axis("tokens to generate per sequence", default=64, role=WORKLOAD, least=1, most=MANY)
    max_seq_len: int = axis(
        "positions that the state has room for", default=1024, role=WORKLOAD, least=2, most=MANY, part_of=[ARTIFACT, COMPILE_KEY]
    )
    eos: bool = axis(
        "a row ends at its first end-of-sequence token, the run once all have; only answers count as tokens",
        default=False, role=WORKLOAD, only={TRANSFORMERS: False},
    )  # fmt: skip
    seed: int = axis("seed of random prompts", default=0, role=WORKLOAD, **SEED, repetition=True)
    repeats: int = axis(
        "rounds of one prefill and one generation; more follow until the next two are reached", default=5,
        role=MEASUREMENT, least=1, most=MANY,
    )  # fmt: skip
    min_samples: int = axis("token latencies to measure", default=100, role=MEASUREMENT, least=1, most=MANY)
    min_time_s: float = axis("seconds to measure", default=2.0, role=MEASUREMENT, least=0, most=86_400)
    eval_bytes: int = axis(
        "bytes of held-out text for bits per byte; 0 leaves it out", default=8192, role=MEASUREMENT, least=0, most=1 << 31
    )
    # Part of a run's identity: a run without its trace is no result for who asks for one.
    profile: str = axis(
        "what a run says of its decode steps beside their time", default="off", role=HOUSEKEEPING, identity=VALUE,
        values={"off": "nothing more", "trace": "a Chrome trace of a few, beside the record",
                "budget": "on a GPU, where the check passes: bytes, floor and time of each kernel, printed and in the record"},
    )  # fmt: skip
    engine: str = axis(
        "who decodes", default="moeexp", role=AXIS, part_of=[WEIGHTS, ARTIFACT],
        values={"moeexp": "", "transformers": "its own `generate` on the same unquantised weights, to be held against"},
    )  # fmt: skip
    rerun: str = axis(
        "which cells of a repeated sweep run again", default="failed", role=HOUSEKEEPING,
        values={"failed": "and what is missing", "all": "", "none": "what is missing alone"},
    )  # fmt: skip
    dry_run: bool = axis(
        "list the cells with status, estimated time and what is wrong with invalid ones, and stop", default=False,
        role=HOUSEKEEPING,
    )  # fmt: skip


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
