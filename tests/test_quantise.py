"""Quantisation: hqq's numbers in our layout, exactly."""

import subprocess
import sys

import pytest
import torch
from moeexp_kernels.ops.linear import dequantise

from moeexp.model import quantise as module
from moeexp.model.quantise import pack, quantise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def codes_of(stored, *, bits, group):
    """Codes of a stored weight: what it dequantises to where a group's scale is 1 and its shift the middle code."""
    features = stored.shape[-1] * 8 // bits
    pair = torch.tensor([1.0, 2.0 ** (bits - 1)], dtype=torch.float16)
    pairs = pair.expand(*stored.shape[:-1], features // group, 2)
    return dequantise(weight=stored, scales=pairs, in_features=features).to(torch.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(5, 256), (3, 4, 128)])
def test_what_is_packed_dequantises_to_its_codes(bits, group, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    stored = pack(codes, bits=bits, group_size=group)
    assert stored.shape[-1] == shape[-1] * bits // 8
    assert torch.equal(codes_of(stored, bits=bits, group=group), codes)


def test_the_layout_of_a_byte():
    """Byte j of a group: element j low, element j + G/2 high."""
    codes = torch.tensor([[0, 1, 2, 3, 8, 9, 10, 11]], dtype=torch.uint8)
    assert pack(codes, bits=4, group_size=4).tolist() == [[0x20, 0x31, 0xA8, 0xB9]]


@pytest.mark.parametrize("bits, bound", [(4, 0.2), (8, 0.012)])
@pytest.mark.parametrize("shape", [(48, 256), (3, 16, 128)])
def test_dequantised_is_what_hqq_dequantises(bits, bound, shape):
    from hqq.core.quantize import Quantizer

    weight = torch.randn(shape)
    stored, scales = quantise(weight, bits=bits, group_size=64)
    ours = dequantise(weight=stored, scales=scales, in_features=shape[-1])
    codes, meta = Quantizer.quantize(
        weight.view(-1, shape[-1]), nbits=bits, group_size=64, axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
    )
    theirs = ((codes.float() - meta["zero"]) * meta["scale"]).view(shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-3)  # scale and shift are stored as float16
    assert float((ours - weight).square().mean().sqrt()) < bound


def test_a_group_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="quant.group_size=32"):
        quantise(torch.randn(4, 96), bits=4, group_size=64)


def test_slices_do_not_change_the_layout(monkeypatch):
    weight = torch.randn(4, 6, 64)
    whole, _ = quantise(weight, bits=8, group_size=32)
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 64 * 5)
    sliced, scales = quantise(weight, bits=8, group_size=32)
    assert sliced.shape == whole.shape and scales.shape == (4, 6, 2, 2)
    error = dequantise(weight=sliced, scales=scales, in_features=64) - weight
    assert float(error.square().mean().sqrt()) < 0.012


def test_weights_that_are_not_finite_are_refused():
    weight = torch.randn(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, bits=4, group_size=32, name="head.weight")


def by_hqq(weight, *, bits, group):
    """Codes, scale and zero of one call of hqq for a whole matrix, per group: [N, K/G, ...]."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
    )
    groups = (weight.shape[0], weight.shape[1] // group)
    return codes.view(*groups, group), meta["scale"].view(groups), meta["zero"].view(groups)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_codes_are_those_of_hqq_and_values_differ_by_the_rounding_of_scales_alone(bits, group):
    weight = torch.randn(24, 256) * 0.05
    codes, scale, zero = by_hqq(weight, bits=bits, group=group)
    stored, scales = quantise(weight, bits=bits, group_size=group)
    assert torch.equal(codes_of(stored, bits=bits, group=group), codes.view(24, 256).to(torch.uint8))
    middle = 2 ** (bits - 1)
    shift = (middle - zero) * scale
    ours = dequantise(weight=stored, scales=scales, in_features=256)
    theirs = ((codes - zero[..., None]) * scale[..., None]).view(24, 256)
    terms = ((codes - middle).abs() * scale[..., None] + shift[..., None].abs()).view(24, 256)
    half_ulp = 2**-11 * terms + 2**-25 * 2**bits  # relative to each term, and of float16's subnormals
    assert ((ours - theirs).abs() <= half_ulp + 1e-7).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_off_by_more_than_its_group_allows(bits):
    """Half a step plus the drift of hqq's zero, which it tunes for the mean error and not for the largest."""
    weight = torch.randn(24, 256) * 0.05
    stored, scales = quantise(weight, bits=bits, group_size=64)
    error = (dequantise(weight=stored, scales=scales, in_features=256) - weight).view(24, 4, 64)
    low, high = weight.view(24, 4, 64).aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assert (error.abs() <= 1.5 * step).all() and (error.square().mean() / step.square().mean()).sqrt() < 0.4


def test_layout_by_hand():
    """Codes 0..7 and 8..15 of two groups of four, from a weight that a scale of 1 represents exactly."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 15.0, 0.0, 5.0, 9.0, 15.0]])
    stored, scales = quantise(weight, bits=4, group_size=4)
    assert stored.tolist() == [[2 << 4 | 0, 15 << 4 | 1, 9 << 4 | 0, 15 << 4 | 5]]
    assert scales.tolist() == [[[1.0, 8.0], [1.0, 8.0]]]
    assert torch.equal(dequantise(weight=stored, scales=scales, in_features=8), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_group_keeps_its_value(bits):
    """hqq would give it a scale of 1, and a shift near 128 that float16 rounds by up to 0.06."""
    constants = torch.tensor([0.0, 0.01, 0.4, -3.3, 100.0, 1e-6])
    weight = constants[:, None].repeat(1, 64)
    weight[:, 32:] = torch.randn(6, 32)
    stored, scales = quantise(weight, bits=bits, group_size=32)
    wide = dequantise(weight=stored, scales=scales, in_features=64)
    torch.testing.assert_close(wide[:, :32], weight[:, :32], rtol=2**-11, atol=2**-25)
    assert (wide[:, 32:] - weight[:, 32:]).square().mean().sqrt() < 0.2, "the other groups are quantised as ever"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_slice_is_quantised_as_if_alone(monkeypatch, bits):
    """hqq stops refining on the mean error of what it is given, so a slice's codes are those of that slice alone; as good
    as those of the whole."""
    weight = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3)) * 0.05
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 64 * 4 + 63)  # four rows a slice: 4, 4, 4, 4, 2
    sliced = quantise(weight, bits=bits, group_size=32)
    monkeypatch.undo()
    alone = [quantise(rows, bits=bits, group_size=32) for rows in weight.view(18, 64).split(4)]
    for found, parts in zip(sliced, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts).view(found.shape))
    whole = quantise(weight, bits=bits, group_size=32)

    def rms(pair):
        return (dequantise(weight=pair[0], scales=pair[1], in_features=64) - weight).square().mean().sqrt()

    assert rms(sliced) < 1.05 * rms(whole)


def test_the_same_weights_give_the_same_bits():
    weight = torch.randn(3, 8, 64)
    first, again = (quantise(weight.clone(), bits=4, group_size=32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (3, 8, 32) and first[1].shape == (3, 8, 2, 2) and first[1].dtype == torch.float16


@pytest.mark.parametrize(
    "options, features, message",
    [
        ({"bits": 3, "group_size": 32}, 64, "quant.bits=3; supported: 4, 8"),
        ({"bits": 4, "group_size": 0}, 64, "quant.group_size=0.*quant.group_size=64"),
        ({"bits": 4, "group_size": 5}, 40, "quant.group_size=5.*quant.group_size=8"),
        ({"bits": 8, "group_size": 64}, 90, "64 does not divide the 90 input features of head.weight.*group_size=2"),
        ({"bits": 4, "group_size": 64}, 33, "33 input features of head.weight; leave it out with quant.skip"),
    ],
)
def test_refuses(options, features, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantise(torch.randn(4, features), name="head.weight", **options)
    advised = str(caught.value).rpartition("group_size=")[2]
    if advised.isdigit():
        quantise(torch.randn(4, features), bits=4, group_size=int(advised))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_that_float16_scales_cannot_hold_is_refused_by_name(value, bits):
    weight = torch.randn(4, 64)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="experts.7"):
        quantise(weight, bits=bits, group_size=32, name="experts.7")


IMPORT = """
import sys, torch
from moeexp.model import quantise
before, compile = set(sys.modules), torch.compile
assert quantise._hqq().__name__ == "Quantizer" and torch.compile is compile
assert not [name for name in set(sys.modules) - before if not name.startswith(("hqq", "termcolor"))], set(sys.modules) - before
"""


def test_importing_hqq_does_not_import_inductor():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=60)


def test_what_hqq_has_compiled_is_compiled_when_it_is_called(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: asked.append((function, settings)) or function)

    @module._compiled_when_called(dynamic=True)
    def double(x, *, times=2):
        """Twice."""
        return x * times

    assert asked == [] and double.__doc__ == "Twice."
    assert [double(3), double(3, times=3)] == [6, 9]
    assert asked == [(double.__wrapped__, {"dynamic": True})]
