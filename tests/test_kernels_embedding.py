"""The embedding of a decode step: the rows themselves, whatever the strides of the tokens, and no memory outside the table."""

from __future__ import annotations

import pytest
import torch
from kernels_common import DEVICE, assert_bitwise_equal, expect_value_error, guarded_empty, randn
from moeexp_kernels.ops.embedding import embedding

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("batch, tokens, features", [(1, 1, 64), (3, 1, 1500), (2, 4, 1024), (32, 1, 24)])
def test_rows_are_those_of_the_table_to_the_bit(batch, tokens, features, dtype):
    table = randn(50, features, seed=1, dtype=dtype)
    ids = torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids[0, 0], ids[-1, -1] = 49, 0
    with guarded_empty():
        found = embedding(ids, table)
    assert_bitwise_equal(found, torch.nn.functional.embedding(ids, table))


def test_tokens_may_be_a_part_of_others():
    table, ids = randn(50, 64, seed=1), torch.arange(48, device=DEVICE).view(6, 8)
    for part in (ids[:, 2:3], ids.t(), ids[::2, ::3]):
        assert_bitwise_equal(embedding(part, table), torch.nn.functional.embedding(part, table))


@pytest.mark.parametrize("token", [-1, 50, 2**31, 2**62, -(2**63)])
def test_a_token_that_is_none_gives_nan_and_leaves_the_others_alone(token):
    table, ids = randn(50, 64, seed=1, dtype=BF16), torch.tensor([[7], [token], [3]], device=DEVICE)
    found = embedding(ids, table)
    assert found[1].isnan().all()
    assert_bitwise_equal(found[::2], torch.nn.functional.embedding(ids[::2], table))


def test_what_it_does_not_take_is_said():
    table, ids = randn(50, 64, seed=1), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    expect_value_error(lambda: embedding(ids.int(), table), "tokens", "int32", "int64")
    expect_value_error(lambda: embedding(ids[:, 0], table), "tokens", "(2,)", "[B, T]")
    expect_value_error(lambda: embedding(ids, table.double()), "weight", "float64", "float32")
    expect_value_error(lambda: embedding(ids, table.t()), "weight", "strides")
    expect_value_error(lambda: embedding(ids, table[0]), "weight", "(64,)")
