"""Ops that choose by T when they run: in eager mode, in an exported graph with T a symbol, and compiled."""

from __future__ import annotations

import kernels_common as common
import pytest
import torch
from moeexp_kernels import dispatch, registry
from moeexp_kernels.ops.gated_delta_reference import reference_gdn_decode, reference_gdn_prefill
from test_kernels_gated_delta import STATE, make_case
from torch import nn
from torch.export import Dim

LENGTHS = (1, 2, 32, 63, 64, 65, 128, 256)


@pytest.fixture
def seen(monkeypatch):
    """Which implementation ran, in order."""
    log = []

    def spy(op, name):
        right = registry.OPS[op][name]

        def run(*args, **kwargs):
            log.append(op)
            return right(*args, **kwargs)

        monkeypatch.setitem(registry.OPS[op], name, run)

    for op in registry.DISPATCHED:
        spy(op, "reference")
    return log


def case_of(tokens, **more):
    return make_case(1, tokens, (1, 2), (16, 16)) | {"decode": "reference", "prefill": "reference"} | more


@pytest.mark.parametrize("tokens", LENGTHS)
def test_dispatch_over_t(seen, tokens):
    case = case_of(tokens)
    right = reference_gdn_decode if tokens == 1 else reference_gdn_prefill
    expected = {name: value.clone() if name in STATE else value for name, value in case.items()}
    del expected["decode"], expected["prefill"]
    wanted = right(**expected)
    common.assert_bitwise_equal(dispatch.gdn(**case), wanted)
    assert seen == ["gdn_decode" if tokens == 1 else "gdn_prefill"]
    for name in STATE:
        common.assert_bitwise_equal(case[name], expected[name], name)


class Layer(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.settings = {name: value for name, value in case.items() if not isinstance(value, torch.Tensor)}
        for name, value in case.items():
            if isinstance(value, torch.Tensor) and name != "proj":
                self.register_buffer(name, value)

    def forward(self, proj):
        tensors = {name: buffer for name, buffer in self.named_buffers()}
        return dispatch.gdn(proj=proj, **tensors, **self.settings) * 2


def test_one_exported_method_chooses_for_every_t(seen):
    case = case_of(7)
    layer = Layer(case)
    program = torch.export.export(layer, (case["proj"],), dynamic_shapes={"proj": {1: Dim("T", min=2, max=300)}})
    assert "dispatch_gdn" in str(program.graph) and not seen, "nothing was chosen while tracing"
    module = program.module(check_guards=False)
    for tokens in (1, 2, 64, 65):
        module(case_of(tokens)["proj"])
    assert seen == ["gdn_decode"] + ["gdn_prefill"] * 3


def test_every_dispatching_op_follows_t(seen):
    randn = common.randn
    ops = dispatch.ops({op: "reference" for op in registry.OPS})
    for tokens, kind in ((1, "decode"), (3, "prefill")):
        seen.clear()
        caches = {name: randn(1, 1, 8, 16, seed=1) for name in ("k_cache", "v_cache")}
        positions = torch.zeros(1, dtype=torch.int64, device=common.DEVICE)
        q, qkv = randn(1, tokens, 2, 16, seed=2), randn(1, tokens, 96, seed=3)
        assert ops["sdpa_single"](q=q, qkv=qkv, **caches, positions=positions).shape == (1, tokens, 32)
        ids = torch.zeros(1, tokens, 1, dtype=torch.int32, device=common.DEVICE)
        experts = {
            "gate_up": randn(2, 8, 16, seed=4), "down": randn(2, 16, 4, seed=5), "shared_gate_up": randn(8, 16, seed=6),
            "shared_down": randn(16, 4, seed=7), "shared_gate": randn(1, 16, seed=8),
        }  # fmt: skip
        experts |= {f"{name}_scales": None for name in ("gate_up", "down", "shared_gate_up", "shared_down")}
        x, norm = randn(1, tokens, 16, seed=9), randn(16, seed=10)
        weights = torch.ones(1, tokens, 1, device=common.DEVICE)
        y = ops["moe_single"](x=x, norm_weight=norm, eps=1e-6, ids=ids, weights=weights, **experts)
        ops["linear"](x=y, weight=randn(4, 16, seed=11), scales=None, norm_weight=None, eps=1e-6, residual=None)
        assert seen == [f"sdpa_{kind}", f"moe_{kind}", "linear"]
