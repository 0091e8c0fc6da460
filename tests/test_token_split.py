"""The arithmetic of a token's time, on events made up here. With real ones: gpu/test_gpu_axes.py."""

import pytest
from common import build_session, random_tokens
from moeexp_runner.token_split import split, token_split


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
    assert result["wall_us"] == 50.0 and result["kernels"] == 2.0
    assert result["by_kernel"] == [
        {"name": "gemv", "calls": 1.5, "us": 14.0},
        {"name": "norm", "calls": 0.5, "us": 3.0},
    ]


def test_order_of_events_does_not_matter():
    events = [("a", 5.0, 6.0), ("b", 0.0, 4.0), ("c", 1.0, 2.0)]
    assert split(events, wall_us=9.0, steps=1) == split(events[::-1], wall_us=9.0, steps=1)
    assert split(events, wall_us=9.0, steps=1)["kernels_us"] == 5.0


def test_no_events_are_an_error_and_a_cpu_has_no_split():
    with pytest.raises(RuntimeError, match="no work on the GPU"):
        split([], wall_us=1.0, steps=1)
    assert token_split(build_session(max_seq_len=24), random_tokens(1, 5), 3, step_us=1.0) is None
