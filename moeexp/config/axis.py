"""What the schema says of each of its fields beside the type: one row of the table of axes, which `axes.py` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# What is decoded: two runs that differ here do not do the same work, so their ratio is no optimisation's gain.
WORKLOAD = "workload"
# What may make a run faster: what experiments are about.
AXIS = "axis"
# How a result is measured and what of it is published: a run that is repeated has it as it was.
MEASUREMENT = "measurement"
# How runs are started and kept: changes no result.
HOUSEKEEPING = "housekeeping"
ROLES = (AXIS, WORKLOAD, MEASUREMENT, HOUSEKEEPING)

# What a setting may be part of. Runs that differ in a part of WEIGHTS cannot share a process and its weights; an artifact
# fixes what is part of ARTIFACT; a compiled method is for its parts of COMPILE_KEY alone.
WEIGHTS, ARTIFACT, COMPILE_KEY = "shared weights", "artifact", "compile key"
# How it counts in a run's identity: as it stands, by the contents of the file that it names, or not at all.
VALUE, CONTENTS, NOT = "value", "contents", "no"

# No run needs more of anything; a number beyond it is a slip of the finger, or can only exhaust the machine.
MANY = 1 << 24

Capability = tuple[int, int] | None  # of the GPU; None: there is none, or nobody has asked


@dataclass(frozen=True)
class RunKind:
    """A kind of run. `holds`: whether a resolved config is one, on a GPU of that compute capability."""

    words: str
    holds: Callable[[Any, Capability], bool]


ON_CPU = RunKind("on a CPU", lambda cfg, capability: cfg.device == "cpu")
BEFORE_HOPPER = RunKind("on a GPU before Hopper", lambda cfg, capability: capability is not None and capability < (9, 0))
TRANSFORMERS = RunKind("with `engine=transformers`", lambda cfg, capability: cfg.engine == "transformers")
WITHOUT_GRAPH = RunKind("with `cuda_graph=false`", lambda cfg, capability: cfg.cuda_graph is False)
TOKEN_BY_TOKEN = RunKind("with `dispatch=token_by_token`", lambda cfg, capability: cfg.dispatch == "token_by_token")
NO_PREFILL = RunKind(
    "with `cuda_graph=all` and `dispatch=token_by_token`",
    lambda cfg, capability: cfg.cuda_graph == "all" and cfg.dispatch == "token_by_token",
)


@dataclass(frozen=True)
class Axis:
    """`values`: {allowed value: what it means, or an empty text}; with `others`, which says what else, they are the names
    among any values. `least`, `most`: of a number, or of each in a list. `kind`: the type, where the schema's is Any.
    `no_effect`: the cases in which it has no effect, which is recorded. `only`: {case: the only value that is not refused
    there}. `means`: {value: what it is resolved to}. `literal`: text in which `${` has no meaning. `repetition`: runs that
    differ in it alone repeat one another. `label`: of a group, the field that names its choice."""

    help: str
    role: str = ""  # of a field without one: its group's
    values: Mapping[Any, str] = field(default_factory=dict)
    others: str = ""
    least: float | None = None
    most: float | None = None
    kind: Any = None
    part_of: frozenset[str] = frozenset()
    identity: str = ""
    no_effect: tuple[RunKind, ...] = ()
    only: Mapping[RunKind, Any] = field(default_factory=dict)
    means: Mapping[Any, Any] = field(default_factory=dict)
    literal: bool = False
    repetition: bool = False
    label: str = ""


def axis(
    help: str,
    *,
    default: Any = MISSING,
    values: Mapping[Any, str] | Sequence[Any] = (),
    part_of: Sequence[str] = (),
    **more: Any,
) -> Any:
    """A field of the schema with its row, see `Axis`. default: as YAML would have it, or a function that makes it; without
    one a file of conf/ has the value."""
    meanings = dict(values) if isinstance(values, Mapping) else dict.fromkeys(values, "")
    row = Axis(help, values=meanings, part_of=frozenset(part_of), **more)
    if callable(default):
        return field(default_factory=default, metadata={"axis": row})
    return field(default=default, metadata={"axis": row})
