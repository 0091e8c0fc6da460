"""Records as points in the space of settings: which settings differ between them, and what each run's speed is."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moeexp.config.axes import KEPT_APART, LABELS, REPETITIONS, WORK
from moeexp.record.record import is_prepared
from moeexp.record.renamed import GONE
from moeexp.report import intervals
from moeexp.report.intervals import Interval, Speed, ratio
from moeexp.report.records import cell_of, overrides_of, setting

MACHINE = "machine"
OFF = dict.fromkeys(GONE, False)  # what a run has of settings that are no more


@dataclass(eq=False)
class Run:
    """One record.

    `settings`: {axis: value as text} of every axis in which those differ that began to run. `asked`: the same of each
    override by which only a cell that never ran differs from them: a value that was refused is seen, and is no level of
    anything. `repeats`: equal for runs that only repeat one another."""

    record: dict[str, Any]
    speed: Speed | None
    settings: dict[str, str] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    repeats: Hashable = None

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def timed(self) -> Speed:
        """The speed of a run that has one."""
        assert self.speed is not None, f"{self.id} has no speed"
        return self.speed

    @property
    def prepared(self) -> bool:
        return is_prepared(self.record)

    @property
    def workload(self) -> tuple[tuple[str, str], ...]:
        return tuple((axis, value) for axis, value in self.settings.items() if is_workload(axis))

    @property
    def point(self) -> tuple[tuple[str, str], ...]:
        """The settings that may make it faster."""
        return tuple((axis, value) for axis, value in self.settings.items() if not is_workload(axis))


def gain(run: Run, before: Run) -> Interval:
    """How many times the speed of `before` that of `run` is, and what limits what this says of their settings. Of two
    runs of one report that have speeds."""
    differing = [axis for axis, value in run.settings.items() if before.settings[axis] != value]
    idle = bool(differing) and not any(acts(axis, run, before) for axis in differing)
    return replace(ratio(run.timed, before.timed), idle=idle, weights=unlike_weights(run.record, before.record))


def acts(axis: str, *runs: Run) -> bool:
    """Whether a setting has an effect in all of these runs."""
    names = {axis, axis.split(".")[0]}
    return not any(names & set(run.record.get("not_applicable") or ()) for run in runs)


def unlike_weights(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How the weights of two records differ where one is of transformers, which has none but unquantised ones, and the
    other is of a quantised model; an empty text for any others."""
    configs = {record["config"].get("engine", "moeexp"): record["config"] for record in (a, b)}
    bits = {engine: config["quant"]["bits"] for engine, config in configs.items()}
    if set(configs) != {"moeexp", "transformers"} or len(set(bits.values())) < 2:
        return ""
    theirs, ours = configs["transformers"]["dtype"], configs["moeexp"]["quant"]["name"]
    return f"transformers' are unquantised {theirs}, the others {ours}"


def runs_of(records: Sequence[dict[str, Any]]) -> list[Run]:
    """In the order of the records. Records that have the same settings throughout get empty `settings`."""
    configs = [flatten(OFF | record["config"]) | {MACHINE: machine(record)} for record in records]
    # A config that was never resolved differs from a resolved one in whatever resolving fills in.
    resolved = [(r, c) for r, c in zip(records, configs, strict=True) if is_prepared(r)]
    flat = [config for _, config in resolved] or configs
    axes = dict.fromkeys(axis for config in flat for axis in config)
    # A record from before there was a setting does not differ in it.
    differing = [axis for axis in axes if len({config[axis] for config in flat if axis in config}) > 1]
    differing = _without_consequences(differing, flat)
    asked = _refused_axes(records, differing)
    resolved_as = {axis: _resolved_as(axis, resolved) for axis in differing}
    same = [_repeated(record, config) for record, config in zip(records, configs, strict=True)]
    speeds = intervals.with_repeats(
        [intervals.speed_of(record) for record in records], same, [config[MACHINE] for config in configs]
    )
    runs = []
    for record, speed, config, repeats in zip(records, speeds, configs, same, strict=True):
        settings = {axis: config.get(axis, "–") for axis in differing}
        if not is_prepared(record):
            # As those of its sweep have it that asked for the same, so that it lies with them; else as it was asked for.
            settings |= {a: found for a in differing if (found := resolved_as[a].get(_deciding(a, record))) is not None}
        runs.append(Run(record, speed, settings, {key: setting(record, key) for key in asked}, repeats))
    return runs


def _refused_axes(records: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[str]:
    """The overrides, beyond `axes`, that gave a cell that never ran a value that no other has. A design's cells have
    names, which say it."""
    ran = [record for record in records if is_prepared(record)]
    never = [record for record in records if not is_prepared(record) and not cell_of(record)]
    found = []
    for key in dict.fromkeys(key for record in never for key in overrides_of(record)):
        group = key.split(".")[0]
        if not ran or key in axes or group in KEPT_APART or group not in never[0]["config"]:
            continue
        known = {setting(record, key) for record in ran}
        if any(key in overrides_of(record) and setting(record, key) not in known for record in never):
            found.append(key)
    return found


def _resolved_as(axis: str, resolved: Sequence[tuple[dict[str, Any], dict[str, str]]]) -> dict[tuple, str]:
    """{what decides it: the axis's value}, where the runs agree on that."""
    found: dict[tuple, set[str]] = {}
    for record, config in resolved:
        found.setdefault(_deciding(axis, record), set()).add(config.get(axis, "–"))
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _deciding(axis: str, record: dict[str, Any]) -> tuple:
    """A record's sweep, whose cells differ in overrides alone, and those of them that an axis's resolved value hangs on."""
    groups = (axis.split(".")[0], "model", "device")
    chosen = {key: value for key, value in overrides_of(record).items() if key.split(".")[0] in groups}
    return record["id"].rpartition(".")[0] or record["id"], tuple(sorted(chosen.items()))


def _repeated(record: dict[str, Any], config: dict[str, str]) -> Hashable:
    """Equal for two runs that only repeat one another: the config but for its seed, the code, and what was read."""
    settings = tuple(sorted((axis, value) for axis, value in config.items() if axis not in REPETITIONS))
    return settings, record["code_fingerprint"], json.dumps(record["identity"], sort_keys=True)


def machine(record: dict[str, Any]) -> str:
    """What it ran on. The same config on two machines is two workloads: their ratio is not any setting's."""
    environment = record["environment"] or {}
    return ((environment.get("gpu") or {}).get("name")) or (environment.get("cpu") or {}).get("name") or "not recorded"


def flatten(config: dict[str, Any]) -> dict[str, str]:
    """{axis: value}; a group's name under the group (`quant`: `int4`), its fields under `quant.group_size`."""
    axes: dict[str, str] = {}
    for key, value in config.items():
        if key in KEPT_APART:
            continue
        if not isinstance(value, dict):
            axes[key] = as_text(value)
            continue
        label = LABELS.get(key)
        if label in value:
            axes[key] = as_text(value[label])
        for name, item in value.items():
            if name != label:
                axes[f"{key}.{name}"] = as_text(item)
    return axes


def as_text(value: Any) -> str:
    """As one would write it in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def is_workload(axis: str) -> bool:
    return axis == MACHINE or axis.split(".")[0] in WORK


def settings_text(settings: Iterable[tuple[str, str]]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in settings)


def _without_consequences(axes: list[str], flat: list[dict[str, str]]) -> list[str]:
    """Leaves out a group's field that its name settles, alone or with the model's: `quant.bits` beside `quant`."""
    kept = []
    for axis in axes:
        group, dot, _ = axis.partition(".")
        values: dict[tuple, set[str]] = {}
        for config in flat:
            values.setdefault((config.get(group), config.get("model")), set()).add(config.get(axis, "–"))
        if not dot or any(len(of_one) > 1 for of_one in values.values()):
            kept.append(axis)
    return kept
