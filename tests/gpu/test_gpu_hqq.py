"""Quantising on the device: our kernels beside hqq's own path, called directly, at real shapes."""

from __future__ import annotations

import pytest
import torch
from kernels_common import DEVICE, Guarded, assert_bitwise_equal, poisoned_empty, randn
from moeexp_kernels.ops.linear import dequantise
from test_kernels_hqq import drawn
from test_quantise import codes_of

from moeexp.model import quantise as module
from moeexp.model.quantise import quantise

SHAPES = [(4096, 2048), (6, 1024, 2048), (5, 2048, 512), (1001, 4096)]


def made(*shape, dtype=torch.bfloat16, seed=1):
    return randn(*shape, seed=seed, dtype=dtype, scale=shape[-1] ** -0.5)


def by_hqq(weight, *, bits, group, monkeypatch=None):
    """What `quantise` gives on a CPU tensor, made by hqq on the device; with monkeypatch in float32, where it takes float16."""
    rows = weight.view(-1, weight.shape[-1])
    quantizer = module._hqq()  # before anything of hqq is changed: it is imported in a way of its own
    from hqq.core import optimize

    assert quantizer.optimize_weights is optimize.optimize_weights_proximal_legacy
    step = max(1, module.SLICE_ELEMENTS // rows.shape[1])
    if monkeypatch is None:
        stored, scales = module._by_hqq(rows, step, bits=bits, group_size=group, round_zero=bits == 4)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(optimize, "float16", torch.float32)
            stored, scales = module._by_hqq(rows, step, bits=bits, group_size=group, round_zero=bits == 4)
    return stored.view(*weight.shape[:-1], -1), scales.view(*weight.shape[:-1], -1, 2)


def codes(pair, *, bits, group):
    """int32 [rows, K], on the CPU."""
    stored = pair[0].cpu()
    return codes_of(stored.view(-1, stored.shape[-1]), bits=bits, group=group).int()


def mean_error(pair, weight):
    wide = dequantise(weight=pair[0], scales=pair[1], in_features=weight.shape[-1])
    return float((wide - weight.float()).abs().mean(dtype=torch.float64))


def assert_those_of_hqq(weight, monkeypatch, *, bits, group, equal):
    """So great a share of codes is hqq's in float32, the others differ by one; the error is no more than 1e-3 above that of hqq
    in float32 and as it comes, in float16."""
    ours = quantise(weight, bits=bits, group_size=group)
    exact = by_hqq(weight, bits=bits, group=group, monkeypatch=monkeypatch)
    rounded = by_hqq(weight, bits=bits, group=group)
    difference = (codes(ours, bits=bits, group=group) - codes(exact, bits=bits, group=group)).abs()
    assert int(difference.max()) <= 1
    share = float((difference == 0).double().mean())
    assert share >= equal, f"{share:.4%} of the codes are hqq's"
    error = mean_error(ours, weight)
    for name, theirs in (("float32", mean_error(exact, weight)), ("float16", mean_error(rounded, weight))):
        assert error <= theirs * (1 + 1e-3), f"mean error {error}, of hqq in {name} {theirs}"
    return ours, rounded


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_hqq(shape, bits, monkeypatch):
    weight = made(*shape)
    ours, rounded = assert_those_of_hqq(weight, monkeypatch, bits=bits, group=128, equal=0.99)
    # As hqq comes it rounds scales, zeros and every step to float16, which moves a code in 70 (int4) or in 14 (int8) by one.
    difference = (codes(ours, bits=bits, group=128) - codes(rounded, bits=bits, group=128)).abs()
    assert int(difference.max()) <= 1 and float((difference == 0).double().mean()) >= {4: 0.97, 8: 0.85}[bits]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["heavy tailed", "constant groups", "errors that shrink", "far from zero"])
def test_weights_that_are_not_normal(kind, bits, monkeypatch):
    """Those that shrink take the power."""
    weight = drawn(kind, 512, 1024).cuda()
    ours, exact = quantise(weight, bits=bits, group_size=64), by_hqq(weight, bits=bits, group=64, monkeypatch=monkeypatch)
    flat = ours[1][..., 0] == 0
    assert torch.equal(flat, exact[1][..., 0] == 0)
    alive = ~flat.cpu().repeat_interleave(64, dim=-1)
    difference = (codes(ours, bits=bits, group=64) - codes(exact, bits=bits, group=64)).abs()[alive]
    assert int(difference.max()) <= 1 and float((difference == 0).double().mean()) >= 0.99
    assert mean_error(ours, weight) <= mean_error(exact, weight) * (1 + 1e-3)


@pytest.mark.parametrize(("group", "features"), [(2, 64), (32, 512), (96, 1152), (256, 2048), (10000, 10000), (16384, 16384)])
def test_groups(group, features, monkeypatch):
    assert_those_of_hqq(made(1040, features), monkeypatch, bits=4, group=group, equal=0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype, monkeypatch):
    assert_those_of_hqq(made(512, 2048, dtype=dtype), monkeypatch, bits=4, group=128, equal=0.99)


@pytest.mark.parametrize("bits", [4, 8])
def test_slices_end_their_iterations_apart(bits, monkeypatch):
    """Three slices and a short one, each as it is alone."""
    weight = made(350, 2048)
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 100 * 2048)
    whole = quantise(weight, bits=bits, group_size=128)
    alone = [quantise(rows, bits=bits, group_size=128) for rows in weight.split(100)]
    for found, parts in zip(whole, zip(*alone, strict=True), strict=True):
        assert_bitwise_equal(found, torch.cat(parts))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_weights_give_the_same_bits(bits):
    """Twenty times, in memory that holds poison."""
    weight = Guarded(made(6, 1024, 2048))
    first = quantise(weight.tensor, bits=bits, group_size=128)
    for run in range(20):
        with poisoned_empty():
            again = quantise(weight.tensor, bits=bits, group_size=128)
        for found, expected in zip(again, first, strict=True):
            assert_bitwise_equal(found, expected, f"run {run}")
    weight.check("weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("rest", [0.5, None], ids=["in a constant group", "among others"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_that_float16_cannot_hold_is_refused_by_name(bits, rest, value):
    weight = made(64, 2048) if rest is None else torch.full((64, 2048), rest, dtype=torch.bfloat16, device=DEVICE)
    weight[63, 2047] = value
    with pytest.raises(ValueError, match="experts.7 has groups whose scale does not fit float16"):
        quantise(weight, bits=bits, group_size=128, name="experts.7")


def test_it_needs_little_memory_beside_the_weights():
    """Of 2^28 weights: 0.5 GiB as they are, a quarter of that as codes."""
    weight = torch.empty(64, 2048, 2048, dtype=torch.bfloat16, device=DEVICE).normal_(0.0, 0.02)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stored, scales = quantise(weight, bits=4, group_size=128)
    beside = torch.cuda.max_memory_allocated() - before - stored.nbytes - scales.nbytes
    assert beside < 2**26, f"{beside / 2**20:.0f} MiB"


def test_offsets_beyond_2_to_the_31():
    """The last rows of 2.2e9 weights: an int32 offset would have wrapped."""
    weight = torch.zeros(1_100_000, 2048, dtype=torch.bfloat16, device=DEVICE)
    step = module.SLICE_ELEMENTS // 2048
    last = weight.shape[0] // step * step  # where the last slice begins
    weight[last:] = made(weight.shape[0] - last, 2048)
    stored, scales = quantise(weight, bits=8, group_size=128)
    expected = quantise(weight[last:], bits=8, group_size=128)
    assert_bitwise_equal(stored[last:], expected[0])
    assert_bitwise_equal(scales[last:], expected[1])
    assert not scales[:last].any()
