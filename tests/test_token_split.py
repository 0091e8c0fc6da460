"""The arithmetic of a token's time, on events made up here. With real ones: gpu/test_gpu_axes.py."""

import pytest
from common import build_session, random_tokens
from moeexp_runner.profiler import kernels_per_token, split, token_split


def test_parts_add_up_to_the_wall():
    events = [
        ("gemv", 0.0, 10.0),
        ("gemv", 12.0, 20.0),  # after a gap of 2
        ("norm", 18.0, 24.0),  # overlaps by 2, and adds 4
        ("Memcpy DtoH", 23.0, 27.0),  # beside a kernel for 1, alone for 3
        ("gemv", 60.0, 70.0),  # after 33 without work: the host
    ]
    result = split(events, wall_us=100.0, steps=2)
    assert (result["kernels_us"], result["copies_us"], result["gaps_us"]) == (16.0, 1.5, 1.0)
    assert result["host_us"] == 50.0 - 16.0 - 1.5 - 1.0
    assert result["wall_us"] == 50.0 and result["kernels"] == 2.0 and result["copies"] == 0.5
    assert result["by_kernel"] == [
        {"name": "gemv", "calls": 1.5, "us": 14.0},
        {"name": "norm", "calls": 0.5, "us": 3.0},
    ]


def test_order_of_events_does_not_matter():
    events = [("a", 5.0, 6.0), ("b", 0.0, 4.0), ("c", 1.0, 2.0)]
    assert split(events, wall_us=9.0, steps=1) == split(events[::-1], wall_us=9.0, steps=1)
    assert split(events, wall_us=9.0, steps=1)["kernels_us"] == 5.0


def test_what_a_generation_without_a_step_runs_is_no_step_s():
    """A loop's start, and the first token's way to the host: the count is that of what is replayed, and no fraction."""
    start = [("fill", -3.0, -2.0), ("fill", -2.0, -1.0), ("Memcpy DtoD", -1.0, -0.5), ("Memcpy DtoH", 0.0, 0.5)]
    steps = [(name, 10.0 * i + at, 10.0 * i + at + 1.0) for i in range(16)
             for at, name in enumerate(["gemv", "gemv", "fill", "Memcpy DtoD", "Memcpy DtoH"])]  # fmt: skip
    result = split(start + steps, wall_us=200.0, steps=16, without=start)
    assert (result["kernels"], result["copies"]) == (3.0, 2.0) and kernels_per_token(result) == 3
    assert {kernel["name"]: kernel["calls"] for kernel in result["by_kernel"]} == {"gemv": 2.0, "fill": 1.0}
    alone = split(start + steps, wall_us=200.0, steps=16)
    assert alone["kernels"] == 3.125 and alone["copies"] == 2.125
    only = split([*start, ("clear", -5.0, -4.0), *steps], wall_us=200.0, steps=16, without=[*start, ("clear", 0.0, 1.0)])
    assert only["kernels"] == 3.0 and "clear" not in {kernel["name"] for kernel in only["by_kernel"]}


@pytest.mark.parametrize(("kernels", "shown"), [(338.0, 338), (338.5, 338.5), (337.996, 338), (0.333, 0.3)])
def test_kernels_per_token_are_those_of_the_split(kernels, shown):
    found = kernels_per_token({"kernels": kernels})
    assert found == shown and isinstance(found, type(shown))
    assert kernels_per_token(None) is None


def test_no_events_are_an_error_and_a_cpu_has_no_split():
    with pytest.raises(RuntimeError, match="no work on the GPU"):
        split([], wall_us=1.0, steps=1)
    assert token_split(build_session(max_seq_len=24), random_tokens(1, 5), 3, step_us=1.0) is None
