"""The kernels of hqq's algorithm beside hqq's own code, which is float32 on a CPU."""

from __future__ import annotations

import inspect
import math

import kernels_common as common
import pytest
import torch
from moeexp_kernels import hqq
from moeexp_kernels.hqq import quantise_rows, updates_until_hqq_stops
from moeexp_kernels.ops.linear import dequantise
from test_quantise import codes_of

from moeexp.model import quantise as module

BF16 = torch.bfloat16


def drawn(kind, rows, features, dtype=torch.float32, seed=1):
    generator = common.generator(seed, "cpu")
    normal, even = torch.randn(rows, features, generator=generator), torch.rand(rows, features, generator=generator)
    weight = {
        "normal": normal * 0.02,
        "uniform": even - 0.3,
        "heavy tailed": normal * 0.02 / (even + 1e-3),
        "constant groups": torch.where(torch.arange(rows)[:, None] % 3 == 0, torch.tensor(0.37), normal * 0.02),
        "tiny": normal * 3e-5,
        "beneath flat": normal * 1e-6,
        "one outlier": normal * 0.02 + 50 * (torch.arange(features) == 7),
        "zeros": normal * 0,
        "far from zero": normal * 0.01 + 10,
        "exact": torch.round(15 * even),
        "errors that shrink": normal * 3,
    }[kind]
    return weight.to(dtype)


def by_kernels(weight, *, bits, group, step=1000):
    stored, scales = quantise_rows(
        weight.to(common.DEVICE), bits=bits, group_size=group, slice_rows=step, flat=module.FLAT, round_zero=bits == 4
    )
    return stored.cpu(), scales.cpu()


def by_hqq(weight, *, bits, group, step=1000):
    return module._by_hqq(weight, step, bits=bits, group_size=group, round_zero=bits == 4)


def compare(weight, *, bits, group, step=1000):
    """At most one code in a thousand is another, by one; shifts are the same to a hundredth of a step, mean errors to 1e-4."""
    (stored, scales), (their_stored, their_scales) = (
        by(weight, bits=bits, group=group, step=step) for by in (by_kernels, by_hqq)
    )  # fmt: skip
    features = weight.shape[1]
    assert stored.shape == their_stored.shape and scales.shape == their_scales.shape
    scale, theirs = scales[..., 0].float(), their_scales[..., 0].float()
    torch.testing.assert_close(scale, theirs, rtol=2**-10, atol=0)
    assert torch.equal(scale == 0, theirs == 0), "the same groups are flat"
    alive = theirs != 0
    shift = (scales - their_scales)[..., 1].float().abs() - 2**-10 * their_scales[..., 1].float().abs()
    assert (shift <= 0.01 * theirs).all()
    codes, their_codes = (codes_of(one, bits=bits, group=group).int() for one in (stored, their_stored))
    differs = ((codes - their_codes).abs()).unflatten(1, (-1, group))[alive]
    assert differs.numel() == 0 or (int(differs.max()) <= 1 and float((differs > 0).float().mean()) <= 1e-3)
    ours, hqqs = (
        float((dequantise(weight=w, scales=s, in_features=features) - weight.float()).abs().mean())
        for w, s in ((stored, scales), (their_stored, their_scales))
    )  # fmt: skip
    assert ours <= hqqs * (1 + 1e-4) + 1e-12, f"mean error {ours}, hqq's {hqqs}"


KINDS = ["normal", "uniform", "heavy tailed", "constant groups", "tiny", "beneath flat", "one outlier", "zeros", "far from zero",
         "exact"]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_hqq(kind, bits):
    """21 rows in slices of 8, of which the last is short."""
    compare(drawn(kind, 21, 256, BF16), bits=bits, group=128, step=8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "features"), [(2, 8), (6, 18), (32, 64), (96, 288), (256, 256), (24, 72)])
def test_groups(group, features, bits):
    compare(drawn("normal", 13, features), bits=bits, group=group, step=5)


@pytest.mark.parametrize(("group", "rows"), [(16384, 2), (10000, 3), (6000, 2)])
def test_a_group_larger_than_a_program_usually_has(group, rows):
    compare(drawn("normal", rows, group), bits=4, group=group)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_weights_are_read_as_they_are(dtype):
    compare(drawn("normal", 9, 128, dtype), bits=4, group=64)


@pytest.mark.parametrize("rows, step", [(1, 1), (1, 7), (7, 7), (150, 66), (65, 64)])
def test_slices(rows, step):
    compare(drawn("normal", rows, 64), bits=4, group=32, step=step)


def noted_errors(monkeypatch):
    """A list to which each call adds its errors [slices, iterations]."""
    found = []

    def noted(errors):
        found.append(errors)
        return updates_until_hqq_stops(errors)

    monkeypatch.setattr(hqq, "updates_until_hqq_stops", noted)
    return found


@pytest.mark.parametrize(
    "step", [pytest.param(5, marks=pytest.mark.slow), 33, 64]
)  # 10, 66 and 128 groups, of which a program has 128
def test_a_slice_is_quantised_as_if_alone(step, monkeypatch):
    weight, errors = drawn("heavy tailed", 150, 64), noted_errors(monkeypatch)
    whole = by_kernels(weight, bits=8, group=32, step=step)
    alone = [by_kernels(rows, bits=8, group=32, step=step) for rows in weight.split(step)]
    for found, parts in zip(whole, zip(*alone, strict=True), strict=True):
        common.assert_bitwise_equal(found, torch.cat(parts))
    common.assert_bitwise_equal(errors[0], torch.cat(errors[1:]))


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_so_large_that_they_shrink(bits):
    """Where the power counts."""
    compare(drawn("errors that shrink", 24, 256) * (1 if bits == 4 else 30), bits=bits, group=128)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "errors that shrink", "heavy tailed"])
def test_the_error_of_each_iteration_is_that_of_hqq(kind, bits, monkeypatch):
    """The first two to rounding, the others to what a weight on a tie may do."""
    from hqq.core import optimize

    weight, theirs, found = drawn(kind, 40, 96), [], noted_errors(monkeypatch)
    step = optimize.optimize_weights_proximal_legacy_step

    def recorded(wide, *others):
        result = step(wide, *others)
        theirs.append(float((wide - result[0]).abs().mean()))
        return result

    monkeypatch.setattr(optimize, "optimize_weights_proximal_legacy_step", recorded)
    by_hqq(weight, bits=bits, group=96)
    by_kernels(weight, bits=bits, group=96)
    ours = found[0][0].tolist()
    assert 1 < len(theirs) <= len(ours) == hqq.ITERATIONS
    assert ours[:2] == pytest.approx(theirs[:2], rel=2e-6)
    assert ours[: len(theirs)] == pytest.approx(theirs, rel=1e-4)
    assert ours[1] < ours[0] * (1 - 1e-5), "an update that does nothing would be right, too"


def loop(errors):
    """How many updates hqq's loop makes on these errors, as its source has it."""
    best, made = math.inf, 0
    for error in errors:
        made += 1
        if error < best:
            best = error
        else:
            break
    return made


@pytest.mark.parametrize("errors", [
    [4, 3, 2, 1], [4, 3, 3, 1], [4, 5, 3, 2], [1, 0, 0, 0], [0, 0, 0, 0], [4, 3, 2, 2], [3, 2, 4, 1],
    [math.nan] * 4, [math.inf, 1, 0, 0], [4, math.nan, 3, 2],
])  # fmt: skip
def test_the_iteration_at_which_hqq_stops(errors):
    beside = [9.0, 8.0, 7.0, 7.0]
    found = updates_until_hqq_stops(torch.tensor([errors, beside], dtype=torch.float32))
    assert found.dtype == torch.int32 and found.tolist() == [loop(errors), 4]


def test_settings_are_the_defaults_of_hqq():
    from hqq.core import optimize
    from hqq.core.quantize import Quantizer

    assert Quantizer.optimize_weights is optimize.optimize_weights_proximal_legacy
    settings = inspect.signature(optimize.optimize_weights_proximal_legacy).parameters["opt_params"].default
    ours = {"lp_norm": hqq.LP_NORM.value, "beta": hqq.BETA.value, "iters": hqq.ITERATIONS}
    assert settings == ours | {"kappa": settings["kappa"]}, "kappa is not used"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("rest", [0.5, None], ids=["in a constant group", "among others"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_that_float16_cannot_hold_has_scales_that_tell(bits, rest, value):
    weight = drawn("normal", 4, 64) if rest is None else torch.full((4, 64), rest)
    weight[2, 3] = value
    finite = by_kernels(weight, bits=bits, group=32)[1].isfinite().all(dim=-1)
    assert finite.flatten().tolist() == [place != 4 for place in range(8)]


def test_a_group_beyond_what_a_block_holds_is_refused():
    common.expect_value_error(lambda: by_kernels(torch.zeros(1, 2**21), bits=4, group=2**21), "group_size=2097152", "1048576")
