"""The command line that runs the config of a record again, in Hydra's grammar.

A record may come from anyone. Its config is checked by `recorded_config`; the keys of a command are the schema's, never
a record's text; and each value is written so that it arrives as what it was, whatever grammar it resembles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from moeexp_kernels.removed import refuse_removed

from moeexp.config import compose, schema
from moeexp.config.architecture import Architecture
from moeexp.config.axes import FIXED, LABELS, MEANT, NOT_REPEATED
from moeexp.config.errors import explain
from moeexp.config.recorded import check, check_text, user_ops
from moeexp.config.sources import load_architecture
from moeexp.record.record import plain
from moeexp.record.renamed import GONE, refuse_gone
from moeexp.record.text import brief

# Those whose choice names a file of conf/; of `ops` it may be anything.
GROUPS = tuple(group for group, label in LABELS.items() if label == "name")
WORDS = ("null", "true", "false", "yes", "no", "on", "off", "nan", "inf")
# What else than settings a command as it was given may hold, for it to be shown.
FLAGS = ("python", "moeexp", "-m", "--multirun")
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


def command_of(record: dict[str, Any], *, trust: bool = False) -> str:
    """A command line that runs this config, whatever sweep or recipe it came from, to be pasted into a shell.

    `ValueError` for a config that a stranger could not have got from this version, or of which a setting, a group or
    an op's implementation no longer exists, and without `trust` for a record that names code."""
    return shlex.join(["python", "-m", "moeexp", *_arguments(record, trust)])


def arguments_of(record: dict[str, Any], *, trust: bool = False) -> list[str]:
    """The arguments that turn the defaults into this record's config, with the user's own config folder if it had one.

    `ValueError` as `command_of`, and if what they compose is not the record's config."""
    arguments = _arguments(record, trust)
    own = config_dir(record)
    _check_same(record["config"], arguments[2 if own else 0 :], own)
    return arguments


def code_of(record: dict[str, Any]) -> list[str]:
    """What a record names that is code, or can name some: a phrase each."""
    named = [f"ops.{op}={brief(name)} imports the Python module {name.partition(':')[0]}"
             for op, name in user_ops(record["config"]).items()]  # fmt: skip
    if (own := config_dir(record)) is not None:
        named.append(f"--config-dir={brief(own)} reads config files, which can name code to run")
    if record["config"].get("artifact") is not None:
        named.append(f"artifact={brief(record['config']['artifact'])} loads native code")
    return named


def given_of(record: dict[str, Any]) -> str:
    """The command that a record says it was started with. `ValueError` if it could do more than choose settings."""
    settings = {field.name for field in fields(schema.Config)} - {"artifact", "artifact_trust"} | {"experiment", *GONE}
    words = [*_words(record, "command"), *_words(record, "overrides")]
    for word in words:
        key, given, value = check_text("command", word).partition("=")
        chooses = given and (key in FOLDERS or key.split(".")[0] in settings) and not set("$:") & set(value)
        if word not in FLAGS and not chooses:
            raise ValueError(f"the command that it was given is not shown, as {brief(word)} could name code")
    return shlex.join(words)


def config_dir(record: dict[str, Any]) -> str | None:
    """The user's own config folder, if the record's command names one."""
    words = _words(record, "command")
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag in ("--config-dir", "-cd"):
            return check_text("--config-dir", value)
        if flag.startswith("--config-dir="):
            return check_text("--config-dir", flag.partition("=")[2])
    return None


def _words(record: dict[str, Any], key: str) -> list[str]:
    words = record.get(key)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"the record's {key} is not a list of words")
    return words


def overrides_of(config: dict[str, Any], config_dir: str | None = None) -> list[str]:
    """Overrides alone, of a config that may be anyone's. Housekeeping is left out, and what an artifact fixes."""
    check(config)
    refuse_gone(config)
    fixed = _fixed(config)
    chosen = {group: config[group]["name"] for group in GROUPS if f"{group}.name" not in fixed}
    for group, name in chosen.items():
        if not _exists(group, name, config_dir):
            raise ValueError(f"the record's config no longer composes: {group}={brief(name)} is not a choice of {group}")
    if "ops.default" not in fixed and _exists("ops", config["ops"]["default"], config_dir):
        chosen["ops"] = config["ops"]["default"]
    defaults = _defaults()
    composed = _composed((*(f"{group}={name}" for group, name in chosen.items()), *_search(config_dir)))
    overrides = [f"{group}={name}" for group, name in chosen.items() if name != defaults[group]]
    base = _flat(composed)
    for path, value in _flat(config).items():
        if path not in fixed and base[path] != value and (path, base[path], value) not in MEANT:
            overrides.append(f"{path}={hydra_value(value)}")
    return overrides + ([] if fixed else _shapes(composed["model"], config["model"]))


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar, of which Hydra and OmegaConf make that value again."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    assert isinstance(value, str), f"{type(value).__name__} is no value of a setting"
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_./:-]*", value) and value.lower() not in WORDS:
        return value
    # `\${` is the text `${`, and no interpolation; the backslashes before it are doubled.
    return QuotedString(re.sub(r"(\\*)\$\{", r"\1\1\\${", value), Quote.double).with_quotes()


def _arguments(record: dict[str, Any], trust: bool) -> list[str]:
    check(record.get("config"))
    for op, name in record["config"]["ops"].items():
        refuse_removed(op, name)
    named = code_of(record)
    if named and not trust:
        more = f" (and {len(named) - 2} more)" if len(named) > 2 else ""
        raise ValueError(f"{'; '.join(part[:140] for part in named[:2])}{more}: add --trust if you trust who wrote the record")
    own = config_dir(record)
    return (["--config-dir", own] if own else []) + overrides_of(record["config"], own)


def _search(config_dir: str | None) -> tuple[str, ...]:
    if not config_dir:
        return ()
    return (f"hydra.searchpath=[{hydra_value('file://' + str(Path(config_dir).absolute()))}]",)


def _exists(group: str, name: str, config_dir: str | None) -> bool:
    """Whether there is such a choice; only a plain name is one, so that none leads out of the group's folder."""
    folders = [schema.conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII)) and any(
        (folder / group / f"{name}.yaml").is_file() for folder in folders
    )


@cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    try:
        return plain(compose.compose(overrides))
    except Exception as error:  # Hydra's errors share no base with ours
        raise ValueError(f"the record's config no longer composes: {explain(error)[:300]}") from error


@cache
def _defaults() -> dict[str, str]:
    config = _composed(())
    return {group: config[group]["name"] for group in GROUPS} | {"ops": config["ops"]["default"]}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted path: value} of what a command sets, but for the shapes, which follow from the model's name or its snapshot."""
    kept = {key: value for key, value in config.items() if key not in (*NOT_REPEATED, *GONE)}
    flat = {key: value for key, value in kept.items() if not isinstance(value, dict)}
    for key, table in kept.items():
        flat |= {f"{key}.{name}": value for name, value in table.items()} if isinstance(table, dict) else {}
    flat.pop("model.architecture", None)
    return flat


def _fixed(config: dict[str, Any]) -> tuple[str, ...]:
    """What a run takes from its artifact, and a command need not say."""
    return FIXED if config.get("artifact") is not None else ()


def _shapes(composed: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Overrides for the shapes of random weights; those of a snapshot follow from the snapshot."""
    base, shapes = composed["architecture"], model.get("architecture")
    if model.get("weights", composed["weights"]) != "random" or base is None or shapes is None:
        return []
    has, wanted = Architecture.from_hf(base), Architecture.from_hf(shapes)
    overrides = []
    for field in fields(Architecture):
        if (value := plain(getattr(wanted, field.name))) != plain(getattr(has, field.name)):
            key = {"eos_token_ids": "eos_token_id"}.get(field.name, field.name)
            overrides.append(f"{'' if key in base else '+'}model.architecture.{key}={hydra_value(value)}")
    return overrides


def _check_same(config: dict[str, Any], overrides: Sequence[str], config_dir: str | None) -> None:
    """`ValueError` unless the overrides compose to this config, field by field. An artifact is read when it is run."""
    fixed = _fixed(config)
    composed = _composed((*(one for one in overrides if not one.startswith("artifact=")), *_search(config_dir)))
    has = _flat(composed)
    for path, value in _flat(config).items():
        if path not in (*fixed, "artifact") and has[path] != value and (path, has[path], value) not in MEANT:
            raise ValueError(f"{path}={brief(value)} of the record composes to {brief(has[path])}: it cannot be run as it was")
    shapes = config["model"].get("architecture")
    if shapes is None or fixed:
        return
    found = load_architecture(schema.ModelConfig(**composed["model"]))
    if found != (wanted := Architecture.from_hf(shapes)):
        name = next(field.name for field in fields(found) if getattr(found, field.name) != getattr(wanted, field.name))
        raise ValueError(
            f"model.weights={brief(composed['model']['weights'])} has {name}={brief(getattr(found, name))}, and the record "
            f"{brief(getattr(wanted, name))}: these are not the weights that it was run with"
        )
