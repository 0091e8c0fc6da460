"""Comparisons of unlike conditions are flagged."""

import copy
import re

import pytest
import synthetic

from moeexp.compare import explain
from moeexp.report.conditions import odd_ones, throttling, unlike
from moeexp.report.runs import runs_of


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
        (("telemetry",), synthetic.load(12), "load of other processes (cores per core): 0.06 / 0.75"),
        (("environment", "gpu_other_processes"), 2, "other processes on the GPU: none / 2"),
    ],
)
def test_each_condition_is_seen(path, value, phrase):
    a, b = (copy.deepcopy(synthetic.record(id=id, telemetry=synthetic.load(1))) for id in "ab")
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


def test_load_is_unlike_where_it_is_well_above_the_lowest():
    loads = {"a": 0.2, "b": 3.9, "c": 4.5, "d": 9.0}
    records = [synthetic.record(id=id, telemetry=synthetic.load(cores)) for id, cores in loads.items()]
    records.append(synthetic.record(id="e"))
    (line,) = odd_ones(records)
    assert line == "unlike conditions, load of other processes (cores per core): 0.01 to 0.24 (a, b, e); 0.28 to 0.56 (c, d)"
    assert unlike(records[1], records[2]) == unlike(records[3], records[4]) == odd_ones([records[3], records[4]]) == []
    assert len(unlike(records[0], records[3])) == 1


@pytest.mark.parametrize(("a", "b", "alike"), [(0, 3.9, True), (0, 4.1, False), (8, 10, True), (8, 10.5, False), (15, 16, False)])
def test_load_counts_by_what_it_leaves(a, b, alike):
    """Beside a process on every second core, half of the rest is half of what there was."""
    one, two = (synthetic.record(id=f"{n}", telemetry=synthetic.load(n)) for n in (a, b))
    assert (unlike(one, two) == []) == alike


def known(record, *, weights=None, heldout=None, tokenizer=None, settings=()):
    """`record` with an identity."""
    software = {"allocator": {"backend": "native", "settings": list(settings)}}
    identity = {"weights": weights or {"sha256": "3f2a" * 16}, "heldout": heldout, "tokenizer": tokenizer}
    return record | {"identity": identity | {"software": software}, "random_weights": bool(weights and "seed" in weights)}


@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        ({"weights": {"sha256": "91bc" * 16}}, "weights: trained 3f2a3f2a3f2a / trained 91bc91bc91bc"),
        ({"weights": {"seed": 0}}, "weights: trained 3f2a3f2a3f2a / random, seed 0"),
        ({"heldout": "91bc" * 16}, "held-out text: aaaaaaaaaaaa / 91bc91bc91bc"),
        ({"tokenizer": "91bc" * 16}, "tokenizer: bbbbbbbbbbbb / 91bc91bc91bc"),
        ({"settings": ["expandable_segments:True"]}, "allocator settings: none / expandable_segments:True"),
    ],
)
def test_other_contents_are_seen(other, phrase):
    files = {"heldout": "a" * 64, "tokenizer": "b" * 64}
    a, b = (known(synthetic.record(id=id), **files) for id in "ab")
    assert unlike(a, b) == [] and odd_ones([a, b]) == []
    b = known(b, **files | other)
    assert unlike(a, b) == [phrase]
    name, _, values = phrase.partition(": ")
    (shown,) = [line for line in explain(a, b).splitlines() if line.startswith(f"  {name}  ")]
    assert re.split(" {2,}", shown.strip()) == [name, *values.replace("none", "null").split(" / ")]
    (line,) = odd_ones([a, b])
    assert line.startswith(f"unlike conditions, {phrase.partition(':')[0]}: ") and "(a)" in line and "(b)" in line


def test_what_an_older_record_does_not_tell_is_not_unlike():
    old, new = synthetic.record(id="old"), known(synthetic.record(id="new"), heldout="a" * 64, tokenizer="b" * 64)
    assert old["identity"] is None and unlike(old, new) == unlike(new, old) == odd_ones([old, new]) == []
    seed = [known(synthetic.record(id=f"{n}"), weights={"seed": n}) for n in (1, 10)]
    older = synthetic.record(id="older") | {"random_weights": True}
    assert unlike(older, seed[0]) == unlike(older, seed[1]) == odd_ones([older, seed[1]]) == []
    assert unlike(*seed) == ["weights: random, seed 1 / random, seed 10"]
    assert unlike(older, old) == ["weights: random / trained"] and len(unlike(older, new)) == 1
    (line,) = odd_ones([*seed, older])
    assert line == "unlike conditions, weights: random, seed 1 (1); random, seed 10 (10); random (older)"


def test_other_weights_at_the_same_path_are_no_repeat():
    """Of runs that differ in nothing else, each is the other's repeat, and their spread is that of the run."""
    repeats = [known(synthetic.record(id=f"{n}", ms=1 + n)) for n in range(3)]
    others = [known(one, weights={"sha256": f"{n}" * 64}) for n, one in enumerate(repeats)]
    alone = [run.speed.run_to_run for one in others for run in runs_of([one])]
    assert [run.speed.run_to_run for run in runs_of(others)] == alone
    assert all(run.speed.run_to_run > 10 * least for run, least in zip(runs_of(repeats), alone, strict=True))
