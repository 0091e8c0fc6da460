"""Every op of a prefill is traced with a symbolic number of tokens, and none of its checks asks for more than it may know."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process without Triton's interpreter, through whose kernels no trace can pass.
PROGRAM = """
import torch
from moeexp_kernels.ops.attention import sdpa_prefill
from moeexp_kernels.ops.qk_norm_rope import qk_norm_rope
from moeexp_kernels.ops.linear import linear
from moeexp_kernels.ops.router import router
from moeexp_kernels.ops.moe_prefill import moe_prefill

D, E, WIDTH, HEADS, KV, DIM, SLOTS = 64, 8, 32, 4, 2, 16, 64
BUFFERS = dict(
    norm=(D,), qkv=(2 * (HEADS + KV) * DIM, D), q_norm=(DIM,), k_norm=(DIM,), inv_freq=(4,), k_cache=(1, KV, SLOTS, DIM),
    v_cache=(1, KV, SLOTS, DIM), out=(D, HEADS * DIM), gate=(E, D), gate_up=(E, 2 * WIDTH, D), down=(E, D, WIDTH),
    shared_up=(2 * WIDTH, D), shared_down=(D, WIDTH), shared_gate=(1, D),
)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in BUFFERS.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("trace", torch.zeros(1, SLOTS, 2, dtype=torch.int32))

    def forward(self, x, positions):
        qkv = linear(x=x, weight=self.qkv, scales=None, norm_weight=self.norm, eps=1e-6, residual=None)
        caches = dict(k_cache=self.k_cache, v_cache=self.v_cache, positions=positions)
        q = qk_norm_rope(
            qkv=qkv, q_norm=self.q_norm, k_norm=self.k_norm, inv_freq=self.inv_freq, num_heads=HEADS, eps=1e-6, **caches
        )
        y = sdpa_prefill(q=q, qkv=qkv, **caches)
        x = linear(x=y, weight=self.out, scales=None, norm_weight=None, eps=1e-6, residual=x)
        ids, weights = router(
            x=x, norm_weight=self.norm, weight=self.gate, eps=1e-6, top_k=2, positions=positions, expert_ids=self.trace
        )
        return moe_prefill(
            x=x, norm_weight=self.norm, eps=1e-6, ids=ids, weights=weights, gate_up=self.gate_up, gate_up_scales=None,
            down=self.down, down_scales=None, shared_gate_up=self.shared_up, shared_gate_up_scales=None,
            shared_down=self.shared_down, shared_down_scales=None, shared_gate=self.shared_gate,
        )

lengths = ({1: torch.export.Dim("tokens", min=1, max=SLOTS)}, None)
inputs = (torch.zeros(1, 12, D), torch.zeros(1, dtype=torch.int64))
program = torch.export.export(Layer(), inputs, dynamic_shapes=lengths)
calls = [str(node.target).split(".")[1] for node in program.graph.nodes if "moeexp" in str(node.target)]
assert calls == ["linear", "qk_norm_rope", "sdpa_prefill", "linear", "router", "moe_prefill"], calls
ranges = [(bounds.lower, bounds.upper) for bounds in program.range_constraints.values()]
assert ranges == [(1, SLOTS)], ranges
"""


@pytest.mark.slow
def test_a_prefill_exports_with_any_number_of_tokens():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
