"""The table of axes, and every list of settings that is derived from it.

A path is `dtype`, `quant` (a group) or `quant.bits`. What a group's row says of role and parts holds for its fields."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_type_hints

from moeexp.config.axis import (
    ARTIFACT,
    COMPILE_KEY,
    HOUSEKEEPING,
    MEASUREMENT,
    NOT,
    ROLES,
    VALUE,
    WEIGHTS,
    WORKLOAD,
    Axis,
    Capability,
    RunKind,
)  # fmt: skip
from moeexp.config.schema import GROUPS, Config


@dataclass(frozen=True)
class Setting:
    """One setting: its row in the schema, with what its group's says; `default` is omegaconf's `???` where conf/ has it."""

    path: str
    axis: Axis
    kind: Any  # the type
    default: Any

    @property
    def is_group(self) -> bool:
        return self.path in GROUPS


def _rows(schema: type, prefix: str = "", group: Axis | None = None) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        path = prefix + field.name
        assert "axis" in field.metadata, f"{path} of the schema has no row: make it with axis(…)"
        row: Axis = field.metadata["axis"]
        if group is not None:
            row = replace(row, role=row.role or group.role, part_of=row.part_of | group.part_of)
        assert row.role in ROLES, f"{path} of the schema has no role"
        row = replace(row, identity=row.identity or (NOT if row.role == HOUSEKEEPING else VALUE))
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        found[path] = Setting(path, row, row.kind or hints[field.name], default)
        if path in GROUPS:
            found |= _rows(GROUPS[path], f"{path}.", row)
    return found


TABLE = _rows(Config)
# Path -> row of what has a value of its own.
SETTINGS = {path: row for path, row in TABLE.items() if not row.is_group}
TOP = {path: row for path, row in TABLE.items() if "." not in path}
# Group -> the field that names its choice.
LABELS = {path: row.axis.label for path, row in TOP.items() if row.axis.label}


def _top(*roles: str) -> tuple[str, ...]:
    return tuple(path for path, row in TOP.items() if row.axis.role in roles)


def parts(part: str) -> tuple[str, ...]:
    """The settings that are part of it."""
    return tuple(path for path, row in SETTINGS.items() if part in row.axis.part_of)


WORK = _top(WORKLOAD)
# No result of an experiment: how it was measured and kept.
KEPT_APART = _top(MEASUREMENT, HOUSEKEEPING)
# What a command leaves out that runs a config again, and what it changes nothing of.
NOT_REPEATED = _top(HOUSEKEEPING)
# What an artifact fixes. The rest (sampler, graph, check, prompt, …) is the run's own.
FIXED = parts(ARTIFACT)
MEANT = [(path, given, other) for path, row in SETTINGS.items() for given, other in row.axis.means.items()]
LITERAL = tuple(path for path, row in SETTINGS.items() if row.axis.literal)
REPETITIONS = tuple(path for path, row in SETTINGS.items() if row.axis.repetition)


def get(config: Any, path: str) -> Any:
    """The value at a path of a config, or of one as plain values: `get(cfg, "quant.bits")`."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name)
    return config


def not_applicable(cfg: Config, capability: Capability = None) -> list[str]:
    """The axes that a resolved config sets and that have no effect, on a GPU of that compute capability where it is known."""
    return [path for path, row in TABLE.items() if any(case.holds(cfg, capability) for case in row.axis.no_effect)]


def only_in(case: RunKind) -> dict[str, Any]:
    """{setting: the only value that it may have in such a run}."""
    return {path: row.axis.only[case] for path, row in SETTINGS.items() if case in row.axis.only}


def shares_weights(cfg: Config) -> str:
    """Equal for runs that can use one copy of the weights in one process."""
    return repr([get(cfg, path) for path in parts(WEIGHTS)])


def compiled_in(cfg: Config, capability: Capability = None) -> dict[str, Any]:
    """{last part of the path: value} of what decides a compiled method, but for the ops, which count by what they resolve to;
    an axis without effect here has its default."""
    idle = not_applicable(cfg, capability)
    names = [path for path in parts(COMPILE_KEY) if not path.startswith("ops.")]
    found = {path.rpartition(".")[2]: TABLE[path].default if path in idle else get(cfg, path) for path in names}
    assert len(found) == len(names), f"two settings of a compile key have the same name: {names}"
    return found


def counted(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config, as plain values, counts as it stands in a run's identity."""
    found: dict[str, Any] = {}
    for path, row in SETTINGS.items():
        if row.axis.identity != VALUE:
            continue
        group, dot, name = path.partition(".")
        if not dot:
            found[path] = config[path]
        else:
            found.setdefault(group, {})[name] = config[group][name]
    return found


def meant(path: str, value: Any) -> Any:
    """What a value stands for: `true` of `cuda_graph` for `decode`."""
    return next((other for setting, given, other in MEANT if setting == path and given is value), value)
