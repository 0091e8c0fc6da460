"""Hydra takes plugins from the namespace package `hydra_plugins` only; ours are in `moeexp.launcher`."""

from moeexp.launcher import GridSweeper, ProcessLauncher

__all__ = ["GridSweeper", "ProcessLauncher"]
