"""`moeexp.compare`: what differs is listed, what is the same is not, and the verdict says how far to trust it."""

import copy
import re

import numpy as np
import synthetic

from moeexp import compare
from moeexp.report.format import MEDIAN, MEDIAN_NOTE
from moeexp.report.ratios import LATE


def section(text, title):
    """The lines under a title, or the rest of the title's own line."""
    rest = text.split(f"\n{title}")[1]
    return rest.split("\n\n")[0]


def test_what_differs_is_listed_under_its_heading():
    a = synthetic.record("quant=none", id="a", ms=2.0, time_split=synthetic.TIME_SPLIT)
    b = synthetic.record("quant=int4", id="b", ms=1.0, seed=1, time_split=copy.deepcopy(synthetic.TIME_SPLIT))
    b["time_split"]["by_kernel"][0]["us"] = 30.0
    b["phases_s"] = b["phases_s"] | {"benchmark": 9.0}
    b["check"]["parts"][0]["tolerances"][0]["value"] = 9e-5
    b["environment"] = b["environment"] | {"cuda": "12.8"}
    text = compare.explain(a, b)
    config = section(text, "config").split()
    assert config[config.index("quant.name") :][:3] == ["quant.name", "none", "int4"] and "model.name" not in text
    assert section(text, "conditions").split() == ["CUDA", "13.0", "12.8"]
    assert "float32.logits" in section(text, "check")
    assert "benchmark  2  9" in section(text, "phases, seconds") and "weights" not in section(text, "phases, seconds")
    assert section(text, "memory, GiB") == ": the same"
    assert "moe_gate_up<int4>  90  30" in section(text, "kernels, µs per token")
    assert "gdn_decode" not in section(text, "kernels, µs per token")
    assert "× 2.0" in text and "of A's speed: faster" in text
    assert "not timed in turns" in text and "unlike conditions (CUDA)" in text


def test_a_long_name_makes_no_other_line_long():
    a, b = synthetic.record(id="a"), synthetic.record(id="b")
    b["config"] = b["config"] | {"x" * 300_000: "y" * 1000} | {f"k{index}": 1 for index in range(20_000)}
    text = compare.explain(a, b)
    assert "x" * 300_000 in text and len(text) < 3_000_000
    assert {len(line) for line in text.splitlines() if re.match(" +k1 ", line)} == {2 + 60 + 2 + 1 + 2 + 1}


def test_other_weights_and_settings_that_do_nothing_are_said():
    theirs = synthetic.record("engine=transformers", "quant=none", id="a", ms=4.0)
    verdict = compare.verdict(theirs, synthetic.record(id="b"))
    assert "faster, on other weights" in verdict and "(transformers' are unquantised float32, the others int4)" in verdict
    same = compare.verdict(theirs, synthetic.record("quant=none", id="b"))
    assert "weights" not in same
    a, b = synthetic.grid({("shared_stream=true",): 2.0, ("shared_stream=false",): 1.0}, not_applicable=["shared_stream"])
    assert compare.verdict(a, b).splitlines()[0].endswith(": not applicable here")


def test_unlike_load_is_a_condition_and_leaves_no_verdict():
    a, b = (synthetic.record(id=id, ms=ms, telemetry=synthetic.load(n)) for id, ms, n in (("a", 3.0, 9), ("b", 1.0, 1)))
    text = compare.explain(a, b)
    assert section(text, "conditions").split()[-2:] == ["0.56", "0.06"]
    assert "faster, but under unlike load" in text and "unlike conditions (load of other processes" in text
    b["telemetry"] = synthetic.load(7)
    assert section(compare.explain(a, b), "conditions") == ": the same" and "unlike" not in compare.verdict(a, b)


def test_what_took_turns_has_no_run_to_run_noise():
    a, b = (synthetic.record(id=id, ms=ms, group={"id": "g"}) for id, ms in (("a", 1.0), ("b", 0.9)))
    assert compare.verdict(a, b).endswith("of A's speed: faster")
    apart = compare.verdict(a | {"group": None}, b)
    assert "not timed in turns" in apart and "†" not in apart


def test_equal_runs_are_no_difference():
    a, b = synthetic.record(id="a"), synthetic.record(id="b", seed=4)
    text = compare.explain(a, b)
    assert section(text, "config") == ": the same" and section(text, "environment") == ": the same"
    assert ": no difference beyond run-to-run noise" in text and "unlike" not in text and "time split" not in text


def test_other_work_and_missing_speeds_are_said():
    a, b = synthetic.record(id="a"), synthetic.record("batch=2", id="b", seed=1)
    assert "not the same work: A batch=1; B batch=2" in compare.verdict(a, b)
    bad = synthetic.record(id="c", status="incorrect")
    assert compare.verdict(a, bad) == "no speeds to compare: B publishes none"
    assert "incorrect: float32.logits at all" in compare.explain(a, bad)


def test_stalls_stand_beside_the_speeds_and_are_named_where_they_are_the_gain():
    late = np.tile(np.where(np.arange(40) == 20, 17.0, 1.0), 5) + 0.001 * np.random.default_rng(1).normal(size=200)
    turns = {"id": "g"}
    a = synthetic.record(id="a", samples=late, group=turns, stalls=synthetic.stalls(5, 16.0, 1000.0))
    b = synthetic.record(id="b", ms=1.0, noise=0.001, group=turns, stalls=synthetic.stalls(0, 0.0, 1000.0))
    text = compare.explain(a, b)
    assert section(text, "measured").count("stalls: ") == 4 and "stalls: tok/s without  1,000  1,000" in text
    assert re.search(r"by medians × (1\.00\d?|0\.99\d), without stalls × 1\.000 of A's speed", text)
    assert ": faster, but no difference by medians and without stalls" in text and LATE in text
    other = compare.explain(b, b | {"id": "c"})
    assert "stall" not in other and LATE not in other


def test_a_migrated_prefill_is_marked():
    a = synthetic.record(id="a", migrated={"from": "moeexp.record/1", "medians": ["prefill_tok_s"]})
    text = compare.explain(a, synthetic.record(id="b"))
    assert "9,000¶" in section(text, "measured") and text.endswith(f"{MEDIAN} {MEDIAN_NOTE}\n")
    assert MEDIAN not in compare.explain(synthetic.record(id="a"), synthetic.record(id="b"))


def test_main(tmp_path, capsys):
    folder = synthetic.write(tmp_path, [synthetic.record(id="a"), synthetic.record("quant=none", id="b", ms=2.0)])
    assert compare.main([str(folder / "0"), str(folder / "1" / "record.json")]) == 0
    assert "quant.name" in capsys.readouterr().out
    assert compare.main([str(folder), str(folder / "1")]) == 2
    assert "is no record: give a record.json" in capsys.readouterr().err
    assert compare.main(["one"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert compare.main(["--help"]) == 0
