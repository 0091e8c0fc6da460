"""The HTML report's structure, without a browser: one file, nothing fetched, everything escaped, every run in it."""

import json
import re
from html.parser import HTMLParser

import pytest
import synthetic

from moeexp.report import __main__ as report_command
from moeexp.report.html import page as html_report
from moeexp.report.html import svg
from moeexp.report.html.svg import Scale

VOID = {"meta", "link", "input", "br", "wbr"}
SVG_LEAVES = {"rect", "line", "circle"}


class Page(HTMLParser):
    """The elements of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SVG_LEAVES, f"<{tag}/> is no empty element in HTML"
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [a for name, a in self.elements if name == tag and all(a.get(k) == v for k, v in wanted.items())]


def records():
    cells = {
        (f"quant={q}", f"export={e}"): ms
        for (q, e), ms in {
            ("none", "eager"): 4.0, ("int4", "eager"): 3.0, ("none", "aoti"): 2.0, ("int4", "aoti"): 1.0,
        }.items()
    }  # fmt: skip
    found = synthetic.grid(cells)
    found[3] |= {"time_split": synthetic.TIME_SPLIT, "telemetry": synthetic.TELEMETRY}
    return [*found, synthetic.refused("quant=int8", "export=eager", id="ab.4", message="int8 is not here")]


@pytest.fixture(scope="module")
def text():
    return html_report.page(records(), title="A <title> & more")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_is_fetched(text, page):
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:|//|file:)""", text)
    assert "@import" not in text and "fetch(" not in text and "XMLHttpRequest" not in text
    assert [a for a in page.all("meta") if "default-src 'none'" in a.get("content", "")]
    assert all(a.get("href", "").startswith(("#", "data:")) for tag in ("a", "link") for a in page.all(tag))


def test_every_run_is_in_the_table_the_charts_and_the_records(text, page):
    ids = {f"ab.{index}" for index in range(5)}
    assert {a["data-run"] for a in page.all("tr") if "data-run" in a} == ids
    assert {a["data-run"] for a in page.all("details") if "data-run" in a} == ids
    carried = json.loads(next(data for tag, data in page.texts if data.startswith('[{"schema"')))
    assert {record["id"] for record in carried} == ids and carried[0]["id"] == "ab.3"
    measured = ids - {"ab.4"}
    rows = [a["data-run"] for a in page.all("div", **{"class": "row"}) if "data-run" in a]
    assert measured <= set(rows) and rows.count("ab.0") >= 3


def test_each_section_is_there_and_linked(page):
    headings = [a["id"] for a in page.all("h2")]
    expected = "ranking speed-up effects interactions latency time-split memory roofline environment runs"
    assert headings == expected.split()
    assert {a["href"] for a in page.all("a")} == {f"#{id}" for id in headings}
    assert len(set(headings)) == len(headings)


def test_the_ranking_is_by_speed_and_its_filters_know_every_level(page):
    rows = [a["data-run"] for a in page.all("tr") if "data-run" in a]
    assert rows == ["ab.3", "ab.2", "ab.1", "ab.0", "ab.4"]
    assert [a["data-axis"] for a in page.all("select")] == ["quant", "export", "status"]
    options = {a["value"] for a in page.all("option")}
    assert {"=none", "=int4", "=int8", "=eager", "=aoti", "=ok", "=unsupported", ""} == options


def test_the_first_run_is_the_first_also_of_those_that_started_together():
    found = synthetic.grid({("quant=none",): 4.0, ("quant=int4",): 3.0, ("quant=int8",): 1.0}, group={"id": "g"})
    rows = section(html_report.page(found, title="t"), "ranking").split("<tr data-run=")[1:]
    assert "1, the first" in rows[2] and rows[2].startswith('"ab.0"') and "faster" in rows[0]


def section(text, name):
    return text.split(f'<h2 id="{name}">')[1].split("<h2")[0]


def test_what_took_no_turns_is_marked_where_it_is_compared(text):
    for name in ("ranking", "speed-up", "effects", "interactions"):
        part = section(text, name)
        assert re.search(r"\d\]?(, by medians × [\d.]+)? †<", part) and "† Not timed in turns" in part, name
    assert "† not timed" not in text  # of the Markdown table
    assert "; not timed in turns</span>" in text
    in_turns = html_report.page([one | {"group": {"id": "g"}} for one in records()], title="t")
    assert "†" not in in_turns and "not timed in turns" not in in_turns


def test_a_page_says_which_weights_differ_and_what_has_nothing_to_act_on():
    ours = synthetic.grid({("state=shared",): 1.0, ("shared_stream=false",): 0.5}, not_applicable=["shared_stream"])
    theirs = synthetic.record("engine=transformers", "quant=none", "dtype=bfloat16", id="ab.9", ms=4.0)
    records = [theirs, *ours]
    for index, one in enumerate(records):
        one["design"] = {"name": "ladder", "cell": f"rung {index}", "index": index}
    text = html_report.page(records, title="t")
    unlike = "The weights differ in quantisation (transformers&#39; are unquantised bfloat16, the others int4)"
    assert unlike in section(text, "speed-up") and unlike in section(text, "ranking")
    assert "faster, on other weights" in text.split("<h2")[0], "the tile that holds the fastest against the first"
    speed_up, effects = section(text, "speed-up"), section(text, "effects")
    assert "not applicable here" in speed_up and "not applicable here" in effects
    drawn = {name: speed_up.split(f'class="label">{name}<')[1].split("</div></div>")[0] for name in ("rung 1", "rung 2")}
    assert 'class="gain"' in drawn["rung 1"] and 'class="level"' in drawn["rung 2"]


def test_noise_between_processes_and_unlike_load_have_no_colour():
    cells = {("quant=none",): 1.3, ("quant=int4",): 1.0, ("quant=int8",): 0.4}
    found = synthetic.grid(cells, device="cpu", noise=0.002)
    assert section(html_report.page(found, title="t"), "ranking").count(" faster") == 1
    for one, cores in zip(found, (12, 1, 2), strict=True):
        one["telemetry"] = synthetic.load(cores)
    text = html_report.page(found, title="t")
    assert " faster" not in section(text, "ranking") and "] †‡<" in section(text, "ranking")
    assert "‡ Other processes" in section(text, "effects") and "12 of 16" in section(text, "environment")
    assert 'class="gain"' not in section(text, "speed-up")
    assert "unlike conditions, load of other processes" in text


def test_shapes_lie_within_their_charts(page):
    for tag, a in page.elements:
        if tag == "rect":
            assert 0 <= float(a["x"].rstrip("%")) <= 100 and float(a["width"].rstrip("%")) > 0
            assert float(a["x"].rstrip("%")) + float(a["width"].rstrip("%")) <= 100.5
        if tag == "circle":
            assert 0 <= float(a["cx"].rstrip("%")) <= 100
    assert len(page.all("rect", **{"class": "gain"})) == 2 and page.all("circle", **{"class": "dot"})


def test_the_machine_while_timed_and_the_command_are_shown(text, page):
    assert "1,410 – 1,980 – 1,980" in text and "software power cap 33% of the time" in text
    commands = [data for tag, data in page.texts if data.startswith("python -m moeexp model=nano")]
    assert len(commands) == 5 and sum("quant=int8" in command for command in commands) == 1


def test_a_config_that_no_longer_composes_is_shown_as_it_was_given():
    old = records()[0]
    old["config"]["quant"]["name"] = "int3"
    text = html_report.page([old], title="t")
    assert "no longer composes" in text
    assert "python -m moeexp -m quant=none export=eager" in text


def test_texts_of_records_cannot_become_markup():
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    one, two = records()[:2]
    one["config"]["prompt"], one["generated_text"], one["id"] = evil, [evil], 'a" onload="alert(1)'
    one["command"] = ["python", evil]
    page = Page(html_report.page([one, two], title=evil))
    assert len(page.all("script")) == 2 and page.all("img") == []
    assert not [a for _, a in page.elements if "onload" in a or "onerror" in a]
    carried = json.loads(next(data for _, data in page.texts if data.startswith('[{"schema"')))
    assert evil in [record["config"]["prompt"] for record in carried]


def test_a_page_of_failed_runs_says_why(tmp_path):
    bad = synthetic.record(id="x", status="failed", memory_gib=None, bytes_per_token=None, environment=None)
    bad["error"] = {"type": "RuntimeError", "message": "no <b>luck</b>", "phase": None, "traceback": ""}
    page = Page(html_report.page([bad], title="t"))
    assert [a["id"] for a in page.all("h2")] == ["ranking", "environment", "runs"]
    assert any("no <b>luck</b>" in data for _, data in page.texts)


def test_the_file_is_written_and_the_format_is_by_its_name(tmp_path, capsys, monkeypatch):
    folder = synthetic.write(tmp_path / "sweep", records())
    monkeypatch.chdir(tmp_path)
    assert report_command.main([str(folder), "--out", "r.html", "--title", "mine"]) == 0
    assert report_command.main([str(folder), "--to", "html"]) == 0
    assert "<title>mine</title>" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "report.html").is_file() and "report of 5 runs" in capsys.readouterr().err
    assert report_command.main([str(folder), "--out", "r.md"]) == 0
    capsys.readouterr()
    markdown = (tmp_path / "r.md").read_text()
    assert "### Effects" in markdown and "### Interactions" in markdown and "████" in markdown
    for wrong in (["--to", "pdf"], ["--nonsense"]):
        assert report_command.main([str(folder), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1876), [0, 500, 1000, 1500]),
        (Scale(0, 1.583), [0, 0.5, 1, 1.5]),
        (Scale(0.4, 9, log=True), [0.5, 1, 2, 5]),
        (Scale(1, 1e6, log=True), [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (Scale(0.58, 2.2, log=True), [0.7, 1, 1.5, 2]),
        (Scale(0.98, 1.04, log=True), [0.98, 0.99, 1]),
        (Scale(3, 3), [3]),
    ],
)
def test_ticks_are_round_and_within(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


def test_a_scale_maps_its_ends_to_the_ends():
    for scale in (Scale(2, 8), Scale(2, 8, log=True)):
        assert (scale(2), scale(8), scale(100), scale(-3)) == (0, 100, 100, 0)
    assert Scale(2, 8, log=True)(4) == 50 and Scale(0, 8)(2) == 25
    assert [svg.short(v) for v in (0.5, 1500, 12000, 2e6)] == ["0.5", "1500", "12k", "2M"]


def test_stalls_and_ratios_by_medians_are_shown_and_stalls_only_where_there_were_any():
    from test_report import stalling

    stalled = html_report.page(stalling(), title="t")
    smooth = html_report.page(records(), title="t")
    for name in ("ranking", "speed-up"):
        assert "stalls" in section(stalled, name) and "stalls" not in section(smooth, name)
    ranking, steps = section(stalled, "ranking"), section(stalled, "speed-up")
    assert "5, 80.0 ms" in ranking and "without 1,000<" in ranking and ">none<" in ranking and "<span>medians ×" in ranking
    assert "by medians × 2.00: faster" in steps and "faster, but no difference by medians and without stalls" in steps
    assert "late tokens make the difference" in steps and "5 stalls, 160 ms" in section(stalled, "latency")


def test_a_run_without_a_share_has_no_place_under_the_roof():
    some = records()
    assert "Roofline</h2>" in html_report.page(some, title="t")
    page = html_report.page([one | {"bandwidth_share": None} for one in some], title="t")
    assert "Roofline</h2>" not in page
