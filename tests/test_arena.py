"""State tensors: allocated once, overwritten by reset, never moved unseen."""

import pytest
import torch
from moeexp_runner.arena import Arena

SHAPES = {"a.state": ((2, 3), torch.float32), "a.ids": ((2, 4), torch.int32), "b.cache": ((5,), torch.bfloat16)}


@pytest.fixture
def arena():
    arena = Arena(SHAPES, device="cpu")
    arena.reset()
    return arena


def test_shapes_dtypes_and_bytes(arena):
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in arena.tensors.items()}
    assert found == SHAPES
    assert arena.nbytes() == 2 * 3 * 4 + 2 * 4 * 4 + 5 * 2


def test_reset_overwrites_nan_in_place(arena):
    addresses = {name: tensor.data_ptr() for name, tensor in arena.tensors.items()}
    arena.tensors["a.state"].fill_(float("nan"))
    arena.tensors["b.cache"].fill_(float("inf"))
    arena.tensors["a.ids"].fill_(-7)
    arena.reset()
    assert all(not tensor.any() for tensor in arena.tensors.values())
    assert {name: tensor.data_ptr() for name, tensor in arena.tensors.items()} == addresses


def test_a_snapshot_is_a_copy(arena):
    arena.tensors["a.state"].copy_(torch.arange(6.0).view(2, 3))
    kept = arena.snapshot()
    arena.tensors["a.state"].fill_(float("nan"))
    assert kept["a.state"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("call", ["reset", "check_addresses", "check_identity"])
def test_a_replaced_tensor_is_named(arena, call):
    arena.tensors["b.cache"] = arena.tensors["b.cache"].clone()
    with pytest.raises(RuntimeError, match="re-allocated after binding: b.cache;"):
        getattr(arena, call)()


def test_new_storage_under_the_same_tensor_is_named(arena):
    arena.tensors["a.state"].set_(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="a.state"):
        arena.reset()
