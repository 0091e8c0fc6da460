"""Quantisation: hqq's numbers in our layout, exactly."""

import pytest
import torch
from moeexp_kernels.linear import dequantise

from moeexp import quantise as module
from moeexp.quantise import pack, quantise, unpack


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(5, 256), (3, 4, 128)])
def test_pack_and_unpack_are_inverse(bits, group, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    stored = pack(codes, bits=bits, group_size=group)
    assert stored.shape[-1] == shape[-1] * bits // 8
    assert torch.equal(unpack(stored, bits=bits, group_size=group), codes)


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
