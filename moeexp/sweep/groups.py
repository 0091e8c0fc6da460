"""Cells that share weights: they run in one process, and are compared because they took turns there."""

from __future__ import annotations

from collections.abc import Sequence

from moeexp.config.axes import shares_weights
from moeexp.sweep.cells import Cell
from moeexp.sweep.history import read_running


def of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Of cells that may run."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        assert cell.config is not None
        found.setdefault(shares_weights(cell.config), []).append(cell)
    return list(found.values())


def repeat_broken(cells: Sequence[Cell]) -> None:
    """Unless all cells of a group took turns in one earlier group, all run again."""
    for group in of([cell for cell in cells if cell.refusal is None]):
        if len(group) > 1 and (any(cell.again for cell in group) or len(set(map(_earlier, group))) > 1):
            for cell in group:
                cell.again = True


def _earlier(cell: Cell) -> str:
    """Of a run that had no group its own id: it shares that with no other."""
    assert cell.earlier is not None
    group = read_running(cell.earlier.path).get("group")
    return group["id"] if group else cell.earlier.id
