"""A headline figure: the median of at least three processes, with its spread."""

import pytest
import synthetic

from moeexp.report import markdown
from moeexp.report.html import page as html_report
from moeexp.report.processes import HEADER, headline, processes, rows
from moeexp.report.runs import runs_of


def repeats(*ms, **values):
    return [synthetic.record("quant=int4", f"seed={i}", id=f"r{i}", samples=[one] * 40, **values) for i, one in enumerate(ms)]


def test_the_median_of_the_processes_stands_with_its_least_and_most():
    others = [synthetic.record("quant=none", id="x")]
    (found,) = processes(runs_of(repeats(1.0, 1.25, 0.8) + others))
    assert found.count == 3 and found.label == "quant=int4"
    row = dict(zip(HEADER, rows([found])[0], strict=True))
    assert row["processes"] == "3" and row["decode tok/s"] == "1,000 [800, 1,250]"
    for text in (markdown.document(repeats(1.0, 1.25, 0.8)), html_report.page(repeats(1.0, 1.25, 0.8), title="t")):
        assert "1,000 [800, 1,250]" in text and "3 processes or more" in text
    page = html_report.page(repeats(1.0, 1.25, 0.8) + others, title="t")
    assert "<b>1,000 tok/s</b><span>fastest decode, median of 3 processes [800, 1,250]: quant=int4</span>" in page
    assert "fastest decode, one process: " in html_report.page(repeats(1.0), title="t")


def test_runs_of_other_code_weights_or_settings_repeat_nothing():
    other = [{"code_fingerprint": "x"}, {"identity": {"weights": {"sha256": "a"}}}]
    for change in other:
        a, b = repeats(1.0, 1.1)
        assert not processes(runs_of([a, b | change])) and processes(runs_of([a, b]))
    assert not processes(runs_of(synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5})))
    assert "### Processes" not in markdown.document(synthetic.grid({("quant=none",): 1.0, ("quant=int4",): 0.5}))


def test_a_headline_needs_three_processes_of_one_config():
    assert headline(runs_of(repeats(1.0, 1.1, 0.9)), "here").count == 3
    for few in (repeats(1.0, 1.1), repeats(1.0), []):
        with pytest.raises(ValueError, match="headline figure needs 3: run it with -m seed=0,1,2"):
            headline(runs_of(few) if few else [], "here")
    in_turns = repeats(1.0, 1.1, 0.9, group={"id": "g"})
    with pytest.raises(ValueError, match="here holds 1 measured processes"):
        headline(runs_of(in_turns), "here")
    mixed = repeats(1.0, 1.1, 0.9) + [synthetic.record("quant=none", id="x")]
    with pytest.raises(ValueError, match="several configs"):
        headline(runs_of(mixed), "here")
