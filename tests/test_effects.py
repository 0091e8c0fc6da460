"""Main effects, interactions and the waterfall, on speeds made from known factors."""

import pytest
import synthetic

from moeexp.report.effects import axes_of, interactions, main_effects
from moeexp.report.runs import runs_of
from moeexp.report.waterfall import waterfalls

QUANT = {"none": 1.0, "int4": 0.5}
EXPORT = {"eager": 1.0, "aoti": 0.25}


def factorial(together=1.0, noise=0.01, **values):
    """ms = product of the factors; both at once times `together`."""
    speeds = {
        (f"quant={q}", f"export={e}"): 8 * f * g * (together if (q, e) == ("int4", "aoti") else 1.0)
        for q, f in QUANT.items()
        for e, g in EXPORT.items()
    }
    return runs_of(synthetic.grid(speeds, noise=noise, **values))


def test_a_main_effect_is_the_factor_that_was_put_in():
    effects = {effect.axis: effect for effect in main_effects(factorial())}
    assert effects.keys() == {"quant", "export"}
    quant = effects["quant"]
    assert (quant.base, quant.level, quant.pairs) == ("none", "int4", 2)
    assert quant.ratio.value == pytest.approx(2.0, rel=0.01) and quant.ratio.verdict == "faster"
    assert quant.least <= quant.ratio.value <= quant.most
    assert effects["export"].ratio.value == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize(("together", "verdict"), [(1.0, "independent"), (0.5, "combine"), (1.5, "overlap"), (3.0, "cancel")])
def test_an_interaction_says_how_two_settings_go_together(together, verdict):
    (found,) = interactions(factorial(together))
    assert found.verdict == verdict and found.squares == 1
    assert found.ratio.value == pytest.approx(1 / together, rel=0.02)
    assert found.alone == (pytest.approx(2, rel=0.01), pytest.approx(4, rel=0.01))
    assert found.together == pytest.approx(8 / together, rel=0.02)


def test_a_setting_that_does_nothing_is_no_difference():
    records = synthetic.grid({("ops.gdn_decode=reference",): 1.0, ("ops.gdn_decode=einsum",): 1.0}, noise=0.05)
    (effect,) = main_effects(runs_of(records))
    assert effect.ratio.verdict == "no difference" and effect.ratio.low < 1 < effect.ratio.high


@pytest.mark.parametrize("slow", [1.3, 2.2])
def test_identical_arms_of_which_others_slowed_one_are_neither_faster_nor_slower(slow):
    """Each in a process of its own on a shared CPU, one of them while other jobs ran."""
    cells = {(f"ops.gdn_decode=mine:f{index}",): slow if index == 0 else 1.0 + 0.01 * index for index in range(8)}
    records = synthetic.grid(cells, noise=0.005, device="cpu")
    for index, one in enumerate(records):
        one["telemetry"] = synthetic.load(12 if index == 0 and slow > 2 else 1)
    runs = runs_of(records)
    verdicts = {effect.ratio.verdict for effect in main_effects(runs)}
    verdicts |= {step.gain.verdict for steps in waterfalls(runs) for step in steps if step.gain}
    assert verdicts and not verdicts & {"faster", "slower"}


IDLE = ["shared_stream", "skip_output_copy"]


def test_a_setting_with_nothing_to_act_on_has_no_verdict():
    """However far its runs lie apart."""
    cells = {("shared_stream=true",): 2.0, ("shared_stream=false",): 1.0, ("shared_stream=true", "quant=none"): 4.0}
    cells[("shared_stream=false", "quant=none")] = 1.9
    runs = runs_of(synthetic.grid(cells, not_applicable=IDLE, group={"id": "g"}))
    verdicts = {effect.axis: effect.ratio.phrase for effect in main_effects(runs)}
    assert verdicts == {"shared_stream": "not applicable here", "quant": "slower"}
    assert interactions(runs) == []
    (steps,) = waterfalls([runs[2], runs[1], runs[0], runs[3]])
    assert [step.label for step in steps] == ["quant=none", "+ quant=int4"], "no step is one that nothing took"


def test_where_a_setting_acts_in_some_runs_only_they_make_its_effect():
    cells = {("cuda_graph=false", f"pdl={on}"): ms for on, ms in (("false", 4.0), ("true", 8.0))}
    records = synthetic.grid(cells, not_applicable=["pdl"])
    graph = synthetic.grid({("pdl=false",): 2.0, ("pdl=true",): 1.0})
    for one in graph:
        one["config"]["cuda_graph"] = "decode"
    runs = runs_of(records + graph)
    effects = {effect.axis: effect for effect in main_effects(runs)}
    assert (effects["pdl"].pairs, effects["pdl"].base) == (1, "false")
    assert effects["pdl"].ratio.value == pytest.approx(2, rel=0.02) and not effects["pdl"].ratio.idle
    assert len(interactions(runs)) == 1, "the graph is what makes it act"


def test_a_rung_with_nothing_to_act_on_has_no_verdict():
    off = ("shared_stream=false", "skip_output_copy=false")
    records = synthetic.grid({("state=explicit", *off): 4.0, off: 2.0, (): 1.0}, not_applicable=IDLE)
    for index, one in enumerate(records):
        one["design"] = {"name": "ladder", "cell": f"rung {index}", "index": index}
    (steps,) = waterfalls(runs_of(records))
    assert [step.gain and step.gain.verdict for step in steps] == [None, "faster", "not applicable here"]
    assert steps[2].total.verdict == "faster", "over the first it differs in state too"


def test_runs_that_differ_in_more_than_the_axis_are_no_pair():
    runs = runs_of(synthetic.grid({("quant=none", "export=eager"): 1.0, ("quant=int4", "export=aoti"): 0.5}))
    assert main_effects(runs) == [] and interactions(runs) == []
    assert axes_of(runs) == {"quant": ["none", "int4"], "export": ["eager", "aoti"]}


def test_another_workload_is_no_effect():
    runs = runs_of(synthetic.grid({("batch=1",): 1.0, ("batch=2",): 1.2, ("new_tokens=9",): 1.0}))
    assert main_effects(runs) == [] and waterfalls(runs) == []


def test_another_machine_is_no_effect_and_pairs_with_nothing_here():
    here = synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5})
    there = synthetic.grid({("quant=none",): 2.0, ("quant=int4",): 1.0})
    for record in there:
        record["environment"] = record["environment"] | {"gpu": {"name": "another", "driver": "1"}}
    (effect,) = main_effects(runs_of(here + there))
    assert (effect.axis, effect.pairs) == ("quant", 2) and effect.ratio.value == pytest.approx(2, rel=0.01)
    assert len(waterfalls(runs_of(here + there))) == 2
    assert main_effects(runs_of([here[0], there[1]])) == []


def test_a_record_from_before_there_was_a_setting_does_not_differ_in_it():
    old, new = synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5})
    del old["config"]["allocator"]
    assert list(runs_of([old, new])[0].settings) == ["quant"]


def test_what_a_groups_name_settles_is_no_axis_of_its_own():
    runs = runs_of(synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5, ("quant=int4", "quant.group_size=16"): 0.6}))
    assert list(runs[0].settings) == ["quant", "quant.group_size"]
    assert list(runs_of([run.record for run in runs[:2]])[0].settings) == ["quant"]


def test_failed_runs_are_left_out_and_repeated_runs_averaged():
    records = synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5})
    records.append(synthetic.record("quant=int4", id="again", ms=0.4, seed=9))
    records.append(synthetic.record("quant=int8", id="bad", ms=0.01, status="incorrect"))
    (effect,) = main_effects(runs_of(records))
    assert effect.level == "int4" and effect.ratio.value == pytest.approx((2 * 2.5) ** 0.5, rel=0.01)


def test_a_grids_waterfall_takes_the_steepest_way():
    (steps,) = waterfalls(factorial())
    assert [step.label for step in steps] == ["quant=none export=eager", "+ export=aoti", "+ quant=int4"]
    assert steps[0].gain is None and steps[1].gain.value == pytest.approx(4, rel=0.01)
    assert steps[2].total.value == pytest.approx(8, rel=0.02) and not steps[2].gain.in_turns


def test_a_ladders_waterfall_keeps_its_rungs_in_order_also_those_that_lose_or_fail():
    names = ["eager", "einsum", "recurrent", "graph"]
    group = {"id": "g", "rounds": 5}
    records = [
        synthetic.record("export=eager", id="r.0", ms=4.0, group=group),
        synthetic.record("export=eager", "ops.gdn_decode=einsum", id="r.1", ms=5.0, seed=1, group=group),
        synthetic.record("ops.gdn_decode=einsum", id="r.2", status="incorrect"),
        synthetic.record(id="r.3", ms=1.0, seed=3, group=group),
    ]
    for index, (name, one) in enumerate(zip(names, records, strict=True)):
        one["design"] = {"name": "ladder", "cell": name, "index": index}
    (steps,) = waterfalls(runs_of(records))
    assert [step.label for step in steps] == names
    assert steps[1].gain.verdict == "slower" and steps[1].gain.in_turns
    assert steps[2].gain is None and steps[2].run.speed is None
    assert steps[3].gain.value == pytest.approx(5, rel=0.02)  # over the last rung that has a speed
