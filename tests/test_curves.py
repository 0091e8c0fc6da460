"""Curves of a report: which runs make one, and which of several at one place counts."""

import re

import pytest
import synthetic

from moeexp.report.curves import NOTE, curves, shown
from moeexp.report.html import page as html_report
from moeexp.report.html import svg
from moeexp.report.html.svg import Point
from moeexp.report.markdown import document
from moeexp.report.runs import runs_of


def named(records):
    return {curve.title: curve for curve in curves(runs_of(records))}


def values(curve):
    return [(point.x, round(point.y, 1)) for point in curve.points]


def run(*overrides, id="ab.0", tok_s=100.0, **given):
    return synthetic.record(*overrides, id=id, **{"decode_tok_s": tok_s} | given)


def test_sequences_by_how_many_and_in_their_order():
    cells = {8: 400.0, 1: 100.0, 2: 180.0}
    found = named([run(f"batch={n}", id=f"ab.{i}", tok_s=v) for i, (n, v) in enumerate(cells.items())])
    assert list(found) == ["Decoding several sequences"]
    curve = found["Decoding several sequences"]
    assert values(curve) == [(1, 100.0), (2, 180.0), (8, 400.0)] and (curve.x_unit, curve.y_unit) == ("sequences", "tok/s of all")
    assert curve.name == curve.title, "the only one of its kind"


def test_a_longer_prompt_has_its_depth_and_its_prefill_and_what_comes_with_it():
    """Another max_seq_len, a graph for its length: no other curve for that."""
    cells = {8: ("max_seq_len=64",), 16: ("max_seq_len=128",), 32: ("max_seq_len=256", "prefill_graph_lengths=[32]")}
    records = [
        run(f"prompt_len={n}", *others, id=f"ab.{i}", tok_s=100.0 - n, prefill_tok_s=10.0 * n)
        for i, (n, others) in enumerate(cells.items())
    ]
    found = named(records)
    assert values(found["Decoding behind a prompt"]) == [(8, 92.0), (16, 84.0), (32, 68.0)]
    assert values(found["Prefill"]) == [(8, 80.0), (16, 160.0), (32, 320.0)]


def test_of_several_at_one_place_the_middle_one_counts_and_of_prefill_the_fastest():
    speeds = [(8, 92.0, 80.0), (16, 10.0, 1.0), (16, 84.0, 500.0), (16, 99.0, 2.0), (32, 68.0, 320.0), (32, 70.0, 1.0)]
    records = [
        run(f"prompt_len={n}", "max_seq_len=64", f"seed={i}", id=f"ab.{i}", tok_s=tok_s, prefill_tok_s=prefill)
        for i, (n, tok_s, prefill) in enumerate(speeds)
    ]
    found = named(records)
    assert values(found["Decoding behind a prompt"]) == [(8, 92.0), (16, 84.0), (32, 68.0)], "of two the slower"
    assert values(found["Prefill"]) == [(8, 80.0), (16, 500.0), (32, 320.0)]


def test_runs_of_other_settings_have_a_curve_of_their_own_with_its_name():
    records = [
        run(f"batch={n}", f"quant={quant}", id=f"ab.{i}{n}", tok_s=100.0 * n)
        for i, quant in enumerate(("none", "int4"))
        for n in (1, 2, 4)
    ]
    found = curves(runs_of(records))
    assert [curve.name for curve in found] == [f"Decoding several sequences: quant={quant}" for quant in ("none", "int4")]
    assert all(len(curve.points) == 3 for curve in found)


def test_steps_of_several_tokens_are_no_decoding_of_others():
    steps = [
        run(
            f"verify_tokens={n}",
            id=f"ab.{n}",
            tok_s=50.0,
            verify={"tokens": n, "passes": 1, "steps": 4, "step_ms": 1.0 + n, "decode_steps": 1.5},
        )  # fmt: skip
        for n in (2, 3, 4)
    ]
    plain = [run(f"batch={n}", id=f"cd.{n}", tok_s=100.0 * n) for n in (1, 2, 4)]
    found = named(steps + plain)
    assert values(found["Steps of several tokens"]) == [(2, 3.0), (3, 4.0), (4, 5.0)]
    assert values(found["Decoding several sequences"]) == [(1, 100.0), (2, 200.0), (4, 400.0)]


def test_two_points_or_a_run_without_a_speed_are_no_curve():
    records = [run(f"batch={n}", id=f"ab.{n}") for n in (1, 2)]
    assert not curves(runs_of(records))
    failed = synthetic.record("batch=4", id="ab.4", status="incorrect", decode_tok_s=None)
    assert not curves(runs_of([*records, failed]))


def test_of_a_large_sweep_some_curves_are_shown_and_it_says_how_many():
    values = [f"prefill_chunk={n}" for n in range(64, 64 + 15)]
    records = [
        run(f"batch={n}", value, id=f"ab.{i}{n}", tok_s=100.0 * n)
        for i, value in enumerate(values)
        for n in ((1, 2, 4, 8) if i == 14 else (1, 2, 4))
    ]
    found, note = shown(runs_of(records))
    assert len(found) == 12 and note == f"{NOTE} 12 of 15 curves." and len(curves(runs_of(records))) == 15
    assert found[0].of == f"{values[14]}" and len(found[0].points) == 4, "most points first"


def test_reports_have_them_in_either_form():
    records = [run(f"batch={n}", id=f"ab.{n}", tok_s=100.0 * n) for n in (1, 2, 4)]
    text = document(records)
    assert "Curves, Decoding several sequences" in text and "| 4 | 400 | ab.4 |" in text and NOTE in text
    page = html_report.page(records, title="t")
    part = page.split('<h2 id="curves">')[1].split("<h2")[0]
    assert part.count("<circle") == 3 and part.count('class="way"') == 2 and ">400</text>" in part
    assert '<g data-run="ab.4">' in part, "the page's filter hides it with its run"
    assert 'id="curves"' not in html_report.page(records[:2], title="t")


@pytest.mark.parametrize("lengths", [(512, 4096, 32768, 65536, 131072, 262016), (1, 2), (3, 7, 100_000)])
def test_a_curve_lies_within_its_plot_and_ticks_are_apart(lengths):
    drawn = svg.curve([Point(x, 10.0 * i + 1, f"{x}", "", f"{x}") for i, x in enumerate(lengths)], apart=12.0)
    at = [float(mark.attributes["x"].rstrip("%")) for mark in drawn.axis]
    assert at == sorted(at) and all(b - a >= 12.0 for a, b in zip(at, at[1:], strict=False)) and at[-1] < 95
    dots = [mark.attributes for _, marks in drawn.points for mark in marks if mark.tag == "circle"]
    assert len(dots) == len(lengths)
    for dot in dots:
        assert 5 < float(dot["cx"].rstrip("%")) < 95 and 5 < float(dot["cy"].rstrip("%")) <= 100
    assert drawn.axis[-1].text == svg.length(lengths[-1]), "the furthest is always named"


@pytest.mark.parametrize(
    "value, text", [(1, "1"), (512, "512"), (1000, "1000"), (4096, "4k"), (131072, "128k"), (262016, "255.9k")]
)
def test_lengths_are_named_as_those_of_prompts(value, text):
    assert svg.length(value) == text


def test_shapes_of_a_label_are_beside_the_line():
    rising, falling = (svg.curve([Point(1, a, "", "", "a"), Point(2, b, "", "", "b")]) for a, b in ((1, 2), (2, 1)))
    sides = [[mark.attributes["text-anchor"] for _, marks in one.points for mark in marks if mark.tag == "text"]
             for one in (rising, falling)]  # fmt: skip
    assert sides == [["end", "end"], ["start", "start"]]
    assert not re.search(r"nan|inf", str(rising))
