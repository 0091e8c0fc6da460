"""The embedding of a decode step on the device: the rows of a whole vocabulary, and the first projection beside it."""

from __future__ import annotations

import kernels_common as common
import pytest
import test_kernels_embedding as cases
import torch
from moeexp_kernels.ops.embedding import embedding
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.parts.graph_edges import add_pdl_edges

BF16 = torch.bfloat16
VOCABULARY, HIDDEN = 248_320, 4096


def test_rows_of_a_whole_vocabulary():
    """Its last rows lie 2 GB behind the first."""
    table = torch.empty(VOCABULARY, HIDDEN, dtype=BF16, device="cuda").random_(-100, 100)
    ids = torch.tensor([[0], [VOCABULARY - 1], [123_456], [1]], device="cuda")
    common.assert_bitwise_equal(embedding(ids, table), table[ids])
    assert embedding(torch.tensor([[VOCABULARY]], device="cuda"), table).isnan().all()


@pytest.mark.parametrize("token", [-1, 50, 2**31, -(2**63)])
def test_a_token_that_is_none_gives_nan(token):
    cases.test_a_token_that_is_none_gives_nan_and_leaves_the_others_alone(token)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_first_projection_starts_beside_it_and_reads_what_it_wrote(rows):
    """A replay's tokens come just before it, and each replay has others."""
    table = common.randn(5000, 512, seed=1, dtype=BF16)
    weight = torch.randint(0, 256, (4096, 256), dtype=torch.uint8, device="cuda")
    scales = common.randn(4096, 4, 2, seed=2, scale=0.01).half()
    ids = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")

    def step():
        return linear(x=embedding(ids, table), weight=weight, scales=scales, norm_weight=None, eps=0.0, residual=None)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        found = step()
    edges = add_pdl_edges(graph.raw_cuda_graph())
    assert edges == (1 if rows < 4 else 2), "of rows that go to the tile their limbs come between"
    graph.instantiate()
    for seed in range(50):
        ids.copy_(torch.randint(0, 5000, ids.shape, generator=torch.Generator().manual_seed(seed)))
        expected = step()
        graph.replay()
        common.assert_bitwise_equal(found, expected, f"replay {seed}")
