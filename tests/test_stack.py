"""One factor at a time beside leave one out: what a setting buys alone and what it still buys in the full stack."""

import pytest
import synthetic

from moeexp.report.ablation import stacks
from moeexp.report.markdown import document
from moeexp.report.runs import runs_of
from moeexp.report.tables import stack_table

QUANT, EXPORT, OP = "quant=int4", "export=aoti", "ops.gdn_decode=einsum"
NONE = {QUANT: "quant=none", EXPORT: "export=eager", OP: "ops.gdn_decode=reference"}


def cell(*settings):
    return tuple(setting if setting in settings else without for setting, without in NONE.items())


def runs(full=0.5):
    """Alone int4 gains 2, aoti 4 and einsum nothing; in the stack int4 gains 4, aoti 2 and einsum nothing."""
    everything = (QUANT, EXPORT, OP)
    return runs_of(
        synthetic.grid(
            {
                cell(): 8.0,
                cell(QUANT): 4.0,
                cell(EXPORT): 2.0,
                cell(OP): 8.0,
                cell(*everything): full,
                cell(EXPORT, OP): 4 * full,
                cell(QUANT, OP): 2 * full,
                cell(QUANT, EXPORT): full,
            }
        )
    )


def test_each_part_is_held_against_both_ends():
    (stack,) = stacks(runs())
    parts = {part.axis: part for part in stack.parts}
    assert parts.keys() == {"quant", "export", "ops.gdn_decode"}
    assert parts["quant"].alone.value == pytest.approx(2, rel=0.01)
    assert parts["quant"].last.value == pytest.approx(4, rel=0.01)
    assert parts["quant"].ratio.verdict == "faster" and parts["export"].ratio.verdict == "slower"
    assert parts["ops.gdn_decode"].ratio.verdict == "no difference"
    assert stack.together.value == pytest.approx(16, rel=0.01) and stack.product.value == pytest.approx(8, rel=0.02)
    assert stack.ratio.value == pytest.approx(2, rel=0.02) and stack.ratio.verdict == "faster"
    verdicts = [row[-1] for row in stack_table(stack).rows]
    assert sorted(verdicts) == ["less with the others", "more with the others", "the same in both"]
    assert "All together: × 16" in stack_table(stack).notes[0]


def test_a_run_that_is_missing_leaves_a_gap_and_no_product():
    some = [run for index, run in enumerate(runs()) if index not in (3, 5)]  # einsum alone; all but int4
    (stack,) = stacks(some)
    parts = {part.axis: part for part in stack.parts}
    assert parts["ops.gdn_decode"].alone is None and parts["quant"].last is None and parts["quant"].ratio is None
    assert stack.product is None and stack.ratio is None and stack_table(stack).notes[0].endswith(" †.")
    text = document([run.record for run in some])
    assert "| – |" in text and "† Not timed in turns" in text.split("full stack")[1]


def test_a_setting_with_nothing_to_act_on_has_no_verdict():
    found = runs()
    for run in found:
        run.record["not_applicable"] = ["ops"]
    (stack,) = stacks(found)
    rows = stack_table(stack).rows
    assert [row[0] for row in rows if row[-1] == "not applicable here"] == ["ops.gdn_decode"] and stack.product is None


def test_two_settings_are_an_interaction_and_no_stack():
    assert stacks(runs()[:4]) == []
    assert stacks(runs_of([synthetic.record(status="failed")])) == []
