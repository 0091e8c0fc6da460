"""The shape of an artifact's manifest. It may be anyone's: names stay in the folder and have digests, and its config is one
that a run resolves to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from moeexp.config import axes, recorded
from moeexp.config.files import is_inside
from moeexp.record.conformance import conforms
from moeexp.record.quantities import Amount, Count, Shape
from moeexp.record.shape import Weights
from moeexp.record.text import brief

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Small = Annotated[int, Field(ge=0, le=1 << 40)]
# What a run takes from it, see `artifact_config.adopt`.
TAKEN = {path.partition(".")[0] for path in axes.FIXED} | {"cuda_graph"}


class File(Shape):
    sha256: Sha256
    bytes: Count


class Tensor(Shape):
    shape: Annotated[list[Small], Field(max_length=8)]
    dtype: Annotated[str, Field(max_length=40)]
    stride: Annotated[list[Small], Field(max_length=8)]


class MethodShape(Shape):
    file: str
    key: Annotated[str, Field(max_length=64)]
    constants: dict[str, Tensor]
    compile_s: Amount


class RunsOn(Shape):
    model_config = ConfigDict(extra="forbid")  # each of them is compared

    torch: str
    machine: str
    cpu_flags: list[str]
    cuda: str | None = None
    gpu_arch: str | None = None


class ModelShape(Shape):
    weights: bool
    heldout: bool


class IdentityShape(Shape):
    weights: Weights
    tokenizer: str | None


class Manifest(Shape):
    made_by: Sha256
    config: dict[str, Any]
    runs_on: RunsOn
    ops: dict[str, str]
    methods: dict[Annotated[str, Field(pattern="^[a-z_]{1,32}$")], MethodShape]
    weights: list[str]
    tied: dict[str, str]
    model: ModelShape
    identity: IdentityShape
    files: dict[str, File]

    @model_validator(mode="after")
    def fits(self) -> Manifest:
        needed = [*(method.file for method in self.methods.values()), *self.weights]
        needed += ["model/config.json"] * self.model.weights + ["model/heldout.txt"] * self.model.heldout
        for name in [*needed, *self.files]:
            if not is_inside(name):
                raise ValueError(f"{brief(name)} is no name of a file below its folder")
            if name not in self.files:
                raise ValueError(f"{brief(name)} has no digest")
        if len({*needed}) < len(needed):
            raise ValueError("a file is named for two things")
        return self


def check_shape(manifest: dict[str, Any]) -> None:
    """`ValueError`, one line, for the first thing that no export writes."""
    conforms(Manifest, manifest)
    config, model = manifest["config"], manifest["model"]
    try:
        recorded.check(config)
    except ValueError as error:
        raise ValueError(str(error).replace("the record's", "its")) from error
    for path in axes.SETTINGS:
        group, _, name = path.partition(".")
        if group in TAKEN and (path not in config if not name else name not in (config.get(group) or {})):
            raise ValueError(f"its config has no {path}")
    for path in ("device", "dtype"):
        if config[path] == "auto" or config[path] not in axes.SETTINGS[path].axis.values:
            raise ValueError(f"its {path}={brief(config[path])} is none that a run resolves to")
    # Else the run would take either from outside the folder.
    if model["weights"] != (config["model"]["weights"] != "random") or model["heldout"] != (
        config["model"]["heldout"] is not None
    ):
        raise ValueError("its config names weights or a text that it does not hold, or holds some that its config does not name")
