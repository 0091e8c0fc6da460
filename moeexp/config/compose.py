"""What a command line composes, for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from moeexp.config.override_text import as_typed
from moeexp.config.schema import Config, conf_dir, register, to_config


def compose(overrides: Sequence[str] = ()) -> Config:
    """What `python -m moeexp OVERRIDES…` composes, for scripts and tests: `compose(["model=nano", "batch=2"])`. What an artifact
    fixes is taken over by `artifact_config.adopt`. Also within a run, for which Hydra composes something else."""
    register()
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            return to_config(hydra_compose("config", overrides=list(map(as_typed, overrides))))
    finally:
        GlobalHydra.instance().hydra = outer
