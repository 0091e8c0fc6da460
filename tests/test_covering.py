"""The cells that the GPU tests run: every legal pair of values is in one of them, and none could be left out."""

import pytest
from covering import AXES, BASE, COMPILED, COMPILED_AXES, PAIRWISE, missing_pairs

from moeexp.config.compose import compose
from moeexp.config.validate import validate

LISTS = pytest.mark.parametrize("cells, axes", [(PAIRWISE, AXES), (COMPILED, COMPILED_AXES)], ids=["eager", "compiled"])


@LISTS
def test_every_legal_pair_of_values_is_covered(cells, axes):
    assert not missing_pairs(cells, axes)
    for cell in cells:
        validate(compose([*BASE, *cell.split()]), cuda_available=True)


@LISTS
def test_without_any_cell_a_pair_is_missing(cells, axes):
    for left_out in cells:
        assert missing_pairs([cell for cell in cells if cell != left_out], axes), left_out
