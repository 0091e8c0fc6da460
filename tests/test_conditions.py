"""Comparisons of unlike conditions are flagged."""

import copy

import pytest
import synthetic

from moeexp.conditions import odd_ones, throttling, unlike


@pytest.mark.parametrize(
    ("path", "value", "phrase"),
    [
        (("environment", "gpu", "name"), "NVIDIA H200", "GPU: NVIDIA H100 80GB HBM3 / NVIDIA H200"),
        (("environment", "gpu", "driver"), "570", "driver: 580.159.04 / 570"),
        (("environment", "versions", "torch"), "2.13.0", "torch: 2.11.0 / 2.13.0"),
        (("environment", "gpu_before", "power_limit_w"), 400.0, "power limit (W): 700.0 / 400.0"),
        (("environment", "gpu"), None, "GPU: NVIDIA H100 80GB HBM3 / none"),
        (("random_weights",), True, "weights: trained / random"),
        (("code_fingerprint",), "bad", "code: c0de / bad"),
        (("telemetry",), {"throttle_reasons": {"hardware slowdown": 0.5}}, "throttled by: none / hardware slowdown"),
        (("environment", "gpu_other_processes"), 2, "other processes on the GPU: none / 2"),
    ],
)
def test_each_condition_is_seen(path, value, phrase):
    a, b = synthetic.record(id="a"), copy.deepcopy(synthetic.record(id="b"))
    assert unlike(a, b) == [] and odd_ones([a, b]) == []
    place = b
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert phrase in unlike(a, b)
    (line,) = [line for line in odd_ones([a, b]) if phrase.partition(":")[0] in line]
    assert "(a)" in line and "(b)" in line


def test_a_blink_and_coupled_clocks_are_no_throttling():
    reasons = {"sync boost": 1.0, "software power cap": 0.01, "hardware slowdown": 0.05}
    assert throttling(synthetic.record(telemetry={"throttle_reasons": reasons})) == ["hardware slowdown"]
    assert throttling(synthetic.record(telemetry=None)) == []


def test_runs_without_a_speed_are_not_compared():
    a, b = synthetic.record(id="a"), synthetic.record(id="b", status="failed", environment=None)
    assert odd_ones([a, b]) == []
