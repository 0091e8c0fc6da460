"""Kernels that start before the previous one ends compute the same bits, whatever else the graph holds."""

from __future__ import annotations

import pytest
import torch

from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.validate import validate
from moeexp.stack.factory import build_model, build_stack

pytestmark = pytest.mark.gpu

STEPS, ROUNDS = 24, 5


def configured(*overrides):
    cfg = compose(["quant=int4", "export=eager", "max_seq_len=128", "cuda_graph=true", *overrides])
    validate(cfg, cuda_available=True)
    return resolve(cfg, cuda_available=True)


@pytest.fixture(scope="module")
def models(phases):
    return {name: build_model(configured(f"model={name}"), phases) for name in ("nano", "small")}


def decode(session, prompt):
    """Logits of every step and the state after the last."""
    session.reset()
    token = session.sample(session.prefill(prompt))
    logits = []
    for _ in range(STEPS):
        logits.append(session.decode(token).clone())
        token = session.sample(logits[-1])
    return torch.cat(logits, dim=1), session.arena.snapshot()


@pytest.mark.parametrize("model", ["nano", "small"])
@pytest.mark.parametrize(
    "axes",
    [
        [], ["state=explicit"], ["dispatch=single"], ["shared_stream=false"], ["ops.gdn_decode=einsum"],
        ["ops.sdpa_decode=tiled"], ["ops.router=reference"], ["ops.moe_decode=reference"],
    ],
    ids=lambda axes: "-".join(axes) or "default",
)  # fmt: skip
def test_pdl_changes_no_bit(models, phases, model, axes):
    batch = 1
    prompt = torch.randint(0, 256, (batch, 21), generator=torch.Generator().manual_seed(0)).to("cuda")
    pdl, plain = (
        build_stack(configured(f"model={model}", f"pdl={on}", *axes), models[model], phases) for on in ("true", "false")
    )
    assert pdl.session.graph.pdl_edges > 0
    assert plain.session.graph.pdl_edges == 0
    logits, state = decode(plain.session, prompt)
    for _ in range(ROUNDS):
        again, left = decode(pdl.session, prompt)
        assert torch.equal(again, logits)
        assert all(torch.equal(left[name], state[name]) for name in state)
    pdl.close()
    plain.close()
