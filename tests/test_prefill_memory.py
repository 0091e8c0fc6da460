"""What the prefill kernels hold at a time at full size, counted on tensors without memory, and a check of a small model on those
that it makes, beside what the estimates say."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch
from common import random_tokens
from moeexp_kernels import registry
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeexp.check import metrics
from moeexp.check import reference as reference_module
from moeexp.check.verify import verify
from moeexp.config.compose import compose
from moeexp.config.memory_need import GIB, check_fits, need_of, need_of_check
from moeexp.config.resolve import resolve, resolved
from moeexp.config.schema import conf_dir
from moeexp.config.sources import load_architecture
from moeexp.model.qwen3_5_moe import Qwen35MoE, state_shapes
from moeexp.stack.factory import build_model, build_stack

DEEPEST = 262144
H100, H200 = int(79.1 * GIB), int(139.3 * GIB)


def large(*overrides):
    given = ["model=qwen3_5_35b_a3b", "quant=int4", "device=cuda", f"max_seq_len={DEEPEST + 8}", "new_tokens=8", *overrides]
    return resolve(compose(given), cuda_available=True)


class Held(TorchDispatchMode):
    """`peak`: the most bytes that lived at a time in tensors made inside."""

    def __init__(self, given):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


class Unlaunched:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.fixture
def held(monkeypatch):
    """(tokens) -> bytes at the peak of one call of the 35B model's prefill, with the ops' own Python and no kernel."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moeexp_kernels.ops.") and hasattr(module, "wrap_triton"):
            monkeypatch.setattr(module, "wrap_triton", lambda kernel: Unlaunched())
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: Unlaunched())
    arch = load_architecture(large().model)
    model = Qwen35MoE(arch, dtype=torch.bfloat16, device="meta")
    shapes = state_shapes(arch, batch=1, max_seq_len=DEEPEST, dtype=torch.bfloat16)
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    ops = {op: getattr(known["triton"], "_init_fn", known["triton"]) for op, known in registry.OPS.items()}

    def peak(tokens):
        inputs = random_tokens(1, tokens).to("meta"), *(torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(2))
        with torch.no_grad(), Held([*model.buffers(), *state.values(), *inputs]) as found:
            assert model(*inputs, ops=ops, phase="prefill", state=state).shape == (1, 1, arch.vocab_size)
        return found.peak

    return peak


def test_the_estimate_is_below_what_the_kernels_hold_and_near_it(held):
    """By hand, elements of a token: a linear layer has the stream 2048, its projection 12352 and output 4096, q and k 2 x 2048,
    v, w and u 3 x 4096; what the estimate leaves out is the state at each chunk's start, 8192, and what Python still holds of
    the layer before. Experts: the stream and its norm 2 x 2048, of 8 pairs 512 + 2048 each."""
    linear, experts = 2048 + 12352 + 4096 + 2 * 2048 + 3 * 4096, 2 * 2048 + 8 * (512 + 2048)
    for tokens in (512, 8192):
        workspace = need_of(large(f"prompt_len={tokens}")).workspace
        assert workspace == 2 * tokens * max(linear, experts)
        assert workspace < held(tokens) < 1.6 * workspace
    assert need_of(large("prompt_len=8192", "ops.gdn_prefill=reference")).workspace == 2 * 8192 * experts
    plain = need_of(large("prompt_len=8192", "ops.gdn_prefill=reference", "ops.moe_prefill=reference"))
    assert plain.workspace == 2 * 8192 * (2048 + 12352 + 4096), "an op of one's own may hold no more than that"


def test_the_deepest_prompt_fits_80_gb_beside_int4_weights(held):
    """Weights 17.9 + state 5.4 + workspace 0.5 GiB; in one call the kernels would hold 23 GiB for the piece's 0.8."""
    cfg = large(f"prompt_len={DEEPEST}", "check=off")
    need = need_of(cfg)
    assert [round(part / GIB, 1) for part in (need.weights, need.state, need.workspace)] == [17.9, 5.4, 0.5]
    cache, choices = 10 * 2 * 2 * 256 * 2, 40 * 8 * 4  # of a position: k and v of the full layers, the experts of all
    recurrent = 30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    assert need.state == (cache + choices) * (DEEPEST + 8) + recurrent
    assert need.workspace == need_of(large("prompt_len=8192")).workspace
    check_fits(cfg, lambda device: H100)
    assert held(8192) < 0.8 * GIB and held(DEEPEST) > 23 * GIB
    assert need_of(large(f"prompt_len={DEEPEST}", "prefill_chunk=0")).workspace == 32 * need.workspace


@pytest.mark.parametrize("length, said", [(4096, None), (32768, None), (131072, "181.9 GiB of logits in host memory")])
def test_a_check_that_the_host_cannot_hold_is_refused_before_work(length, said):
    """Of each position 248,320 logits, of the run in bfloat16 and of its twin in float32."""
    host = {"cpu": 100 << 30, "cuda": H100}
    check_fits(large(f"prompt_len={length}", "check=off"), host.get)
    cfg = large(f"prompt_len={length}", "check=separate")
    if said is None:
        check_fits(cfg, host.get)
        return
    with pytest.raises(ValueError, match=said) as caught:
        check_fits(cfg, host.get)
    line = str(caught.value)
    assert "check=separate of 1 x 131079 positions" in line and "check=off, which publishes no speed" in line and len(line) <= 400
    assert "check_logits=4096" in line
    check_fits(large(f"prompt_len={length}", "check=separate", "check_logits=4096"), host.get)
    with pytest.raises(ValueError, match="of 1 x 100007 positions"):
        check_fits(large(f"prompt_len={length}", "check=separate", "check_logits=100000"), host.get)


@pytest.mark.parametrize("quant", ["int4", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("least", [0, 4096], ids=["a state as long as the prompt", "a longer one"])
def test_the_estimate_of_a_check_is_below_what_it_holds_and_near_it(phases, monkeypatch, quant, dtype, least):
    """The rest is what transformers' layers have on the way."""
    monkeypatch.setattr(reference_module, "SCORES", 1 << 16)
    monkeypatch.setattr(reference_module, "DELTA_POSITIONS", 128)
    monkeypatch.setattr(metrics, "SLICE_ELEMENTS", 1 << 14)
    length = max(1031, least)
    given = ["model=nano", f"quant={quant}", f"max_seq_len={length}", "new_tokens=8", "prompt_len=1024", f"dtype={dtype}"]
    cfg = resolve(compose([*given, "export=eager", "prefill_chunk=128", "check=separate"]), cuda_available=False)
    model = build_model(cfg, phases)
    stack = build_stack(cfg, model, phases)
    with Held([*model.buffers(), *stack.arena.tensors.values()]) as found:
        verdict = verify(cfg, stack, random_tokens(1, 1024, vocab=256), phases)
    assert verdict["passed"], verdict["failures"]
    need = need_of_check(cfg)
    assert need < found.peak < 2 * need, (need, found.peak)


def test_a_check_that_the_gpu_cannot_hold_is_refused_before_work():
    """By hand, of 262,151 positions in GiB: the run's trace 5.0 of keys and values, 0.6 of choices, 1.9 of logits; its twin's
    10.0, 0.6 and 3.8; a reference of 10.0 and 0.6 of routers, 4.0 of two residual streams, 10.0 of keys and values; and of a
    layer 3.1 of weights and 8.0 of keys and values, of each of 16 heads."""
    cfg = large(f"prompt_len={DEEPEST}", "check=separate", "check_logits=4096")
    parts = 5.0 + 0.6 + 1.9 + 10.0 + 0.6 + 3.8 + 10.0 + 0.6 + 4.0 + 10.0 + 3.1 + 8.0
    assert need_of_check(cfg) / GIB == pytest.approx(parts, abs=0.5)
    with pytest.raises(ValueError) as caught:
        check_fits(cfg, {"cpu": 100 << 30, "cuda": H100}.get)
    line = str(caught.value)
    assert line.startswith(
        "check=separate of 1 x 262151 positions does not fit: weights 17.88 + state 5.373 + traces and reference"
    )
    assert "GiB needed, 79.1 GiB available on the GPU: use a shorter prompt" in line and "check=off" in line and len(line) <= 400
    check_fits(cfg, {"cpu": 100 << 30, "cuda": H200}.get)
    check_fits(large(f"prompt_len={DEEPEST}", "check=off"), {"cpu": 100 << 30, "cuda": H100}.get)
    check_fits(cfg, {"cpu": 100 << 30, "cuda": None}.get)


def test_the_cells_of_the_recipe_fit_one_gpu_and_their_checks_the_host():
    cells = OmegaConf.load(conf_dir() / "experiment" / "fullsize.yaml").launcher.cells
    names = [cell.name for cell in cells]
    assert {"prompt 4096", "prompt 262144", "depth 32768", "depth 262016"} < set(names)
    for cell in cells:
        given = compose(["experiment=fullsize", "launcher.cells=[]", *cell.set])
        cfg = resolved(given, cuda_available=True)
        deepest = cfg.prompt_len > 131072
        check_fits(cfg, {"cpu": 100 << 30, "cuda": H200 if deepest else H100}.get)
        check_fits(replace(cfg, check="off"), {"cpu": 100 << 30, "cuda": H100}.get)
        kind, _, length = cell.name.partition(" ")
        assert kind not in ("prompt", "depth") or cfg.prompt_len == int(length)
        assert cfg.check == "separate" and cfg.check_logits == (4096 if cfg.prompt_len > 32768 else 0), cell.name
