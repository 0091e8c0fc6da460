"""Reports of sweeps of which some cells were refused or never began: the others are shown as if they were alone.

The records are real ones. A cell that never ran has its config as it was composed, which made-up records do not show."""

import json
import re
from pathlib import Path

import pytest
import synthetic
from test_group import QUICK
from test_html_report import Page

from moeexp.cli import main
from moeexp.report import markdown as markdown_report
from moeexp.report import markup
from moeexp.report import records as report_records
from moeexp.report.effects import main_effects
from moeexp.report.html import page as html_report
from moeexp.report.html.sections import label_of
from moeexp.report.runs import runs_of
from moeexp.report.waterfall import waterfalls

SWEEPS = {
    # One cell of the design needs CUDA.
    "one_factor": ["experiment=one_factor"],
    # Half of a grid does.
    "grid": ["quant=none,int4", "cuda_graph=false,true"],
    # A rung in the middle of a ladder does, and the last one.
    "ladder": [
        "launcher.design=ladder",
        "launcher.cells=[{name: einsum, set: ['ops.gdn_decode=einsum']}, {name: CUDA graph, set: ['cuda_graph=true']},"
        "{name: recurrent, set: ['ops.gdn_decode=null']}, {name: loop, set: ['cuda_graph=loop']}]",
    ],
}
ARGUMENTS = [*QUICK, "device=cpu", "launcher.isolation=none"]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sweeps"))
        for name, arguments in SWEEPS.items():
            assert main(["-m", *arguments, *ARGUMENTS, f"hydra.sweep.dir={name}"]) == 0
        yield {name: report_records.load_records([Path(name).resolve()]) for name in SWEEPS}


@pytest.fixture(params=SWEEPS)
def records(request, sweeps):
    return sweeps[request.param]


def ran(records):
    return [record for record in records if record["status"] == "ok"]


def sections(markdown):
    """{heading: text}, without the table of runs."""
    parts = re.split(r"^### (.*)\n", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tiles(page):
    text = page.split('<div class="tiles">')[1].split("\n")[0]
    return re.findall(r"<b>(.*?)</b><span>(.*?)</span>", text)


def header(page):
    return re.findall(r"<th[^>]*>(.*?)</th>", page.split('<table id="ranked">')[1].split("</thead>")[0])


def names_of(page):
    return [re.sub("<[^>]*>", "", cell) for cell in header(page)]


def rows_of(page):
    body = page.split('<table id="ranked">')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<td.*?>(.*?)</td>", row) for row in body.split("</tr>") if row]


def test_the_records_are_what_the_tests_are_about(records):
    refused = [record for record in records if record["status"] == "unsupported"]
    assert refused and len(ran(records)) >= 2
    assert records == [*ran(records), *refused], "refused cells were recorded first and are listed last"
    for record in refused:
        assert record["environment"] is None and record["config"]["dtype"] == "auto"
    for record in ran(records):
        assert record["config"]["dtype"] == "float32"


def test_cells_that_ran_are_as_if_alone(records):
    both, alone = runs_of(records), runs_of(ran(records))
    assert [run.settings for run in both if run.prepared] == [run.settings for run in alone]
    assert [label_of(run) for run in both if run.prepared] == [label_of(run) for run in alone]
    assert len({run.workload for run in both}) == 1
    assert main_effects(both) == main_effects(alone) != []


def test_the_markdown_is_as_if_they_were_alone_and_says_why_the_others_did_not_run(records):
    text = markdown_report.document(records)
    mine, alone = sections(text), sections(markdown_report.document(ran(records)))
    assert "Effects" in mine and mine.keys() == alone.keys()
    for name in mine:
        lines = [line for line in mine[name].splitlines() if "| unsupported |" not in line]
        assert lines == alone[name].splitlines()
    assert "vocab_size" not in text and "not recorded" not in text
    table = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    assert ["unsupported" in line for line in table[2:]] == [record["status"] != "ok" for record in records]
    for record in records:
        if record["status"] != "ok":
            line = next(line for line in text.splitlines() if line.startswith("- ") and record["id"] in line)
            assert " ".join(record["error"]["message"].split()) in line
            assert not record["design"] or record["design"]["cell"] in line


def test_the_page_is_as_if_they_were_alone_and_lists_the_others_last(records):
    text, alone = (html_report.page(some, title="t") for some in (records, ran(records)))
    page = Page(text)
    assert [a["id"] for a in page.all("h2")] == [a["id"] for a in Page(alone).all("h2")]
    found, expected = tiles(text), tiles(alone)
    assert [tile for tile in found if "ok" not in tile[0]] == [tile for tile in expected if "ok" not in tile[0]]
    assert any("unsupported" in value for value, _ in found) and not any("machine" in value for value, _ in found)
    # Charts show what ran, and the same of it.
    for tag in ("rect", "circle"):
        assert page.all(tag) == Page(alone).all(tag)
    names = names_of(text)
    assert [name for name in names if name != "cuda_graph"] == names_of(alone)
    assert not {"model.architecture", "dtype", "prompt", "prompt_len", "machine", "quant.group_size"} & set(names)
    rows = rows_of(text)
    status = names.index("status")
    assert [row[status] for row in rows] == [record["status"] for record in records]
    for row, record in zip(rows, records, strict=True):
        if record["status"] != "ok":
            assert "needs CUDA" in row[-1]
    environment = text.split('id="environment"')[1].split('id="runs"')[0]
    assert "trained" not in environment and "torch" in environment


def test_the_setting_that_was_refused_is_seen_and_has_no_effect(sweeps):
    records = sweeps["grid"]
    runs = runs_of(records)
    assert [run.asked["cuda_graph"] for run in runs] == ["false", "false", "true", "true"]
    assert [list(run.settings) for run in runs] == [["quant"]] * 4
    assert label_of(runs[0]) == "quant=none" and label_of(runs[3]) == "quant=int4 cuda_graph=true"
    assert {effect.axis for effect in main_effects(runs)} == {"quant"}
    selects = [a["data-axis"] for a in Page(html_report.page(records, title="t")).all("select")]
    assert selects == ["quant", "cuda_graph", "status"]


def test_refused_rungs_stand_in_the_designs_order_and_in_no_chart(sweeps):
    (steps,) = waterfalls(runs_of(sweeps["ladder"]))
    assert [step.label for step in steps] == ["einsum", "CUDA graph", "recurrent", "loop"]
    assert [step.gain is not None for step in steps] == [False, False, True, False]
    section = sections(markdown_report.document(sweeps["ladder"]))["Speed-up"]
    bars, table = section.split("```")[1:]
    assert "CUDA graph" not in bars and re.search(r"\| CUDA graph \| – .* unsupported ", table)


def test_a_run_that_was_killed_before_it_knew_its_config_is_no_axis_either(sweeps):
    killed = json.loads(json.dumps(sweeps["grid"][2]))
    killed |= {"status": "failed", "id": killed["id"][:-1] + "9", "error": killed["error"] | {"message": "killed"}}
    records = [killed, *ran(sweeps["grid"])]
    assert [list(run.settings) for run in runs_of(records)] == [["quant"]] * 3
    assert html_report.page(records, title="t").count("vocab_size") == 3, "in the carried records alone"


def test_cells_that_were_all_refused_are_told_apart(sweeps):
    records = [record for record in sweeps["grid"] if record["status"] != "ok"]
    assert [run.settings for run in runs_of(records)] == [{"quant": "none"}, {"quant": "int4"}]
    page = html_report.page(records, title="t")
    assert ("machine not recorded", "measured on") in tiles(page)
    Page(page)


def test_a_value_that_is_left_to_resolving_is_that_of_the_same_sweep():
    """Two machines and two lengths of prompt are axes; the refused cell lies with its own sweep."""
    here = [synthetic.record("prompt_len=9", f"quant={q}", id=f"a.{i}") for i, q in enumerate(("none", "int4"))]
    there = [synthetic.record(f"quant={q}", id=f"b.{i}") for i, q in enumerate(("none", "int4"))]
    for record in there:
        record["environment"] = record["environment"] | {"gpu": {"name": "another"}}
    refused = synthetic.refused("quant=int8", "cuda_graph=true", id="b.2")
    runs = runs_of([*here, *there, refused])
    assert runs[4].workload == runs[3].workload != runs[0].workload
    assert runs[4].settings["prompt"] == "In the beginning" and runs[4].settings["quant"] == "int8"
    # Of a sweep of its own, of which nothing ran, it is what was asked for.
    alone = runs_of([*here, *there, synthetic.refused("quant=int8", id="c.0")])[4]
    assert (alone.settings["prompt"], alone.settings["machine"]) == ("null", "not recorded")


def test_what_a_refused_cell_leaves_to_resolving_is_no_column_of_the_table():
    records = [synthetic.record("dtype=float32", "quant=none"), synthetic.refused("quant=int4", "cuda_graph=true")]
    assert report_records.varying(records) == ["quant", "cuda_graph"]


def test_an_id_of_digits_is_no_number_of_a_list():
    one = synthetic.refused("quant=none", id="152612.3", message="2. not here")
    text = markdown_report.document([synthetic.record(id="152612.0"), one])
    (line,) = [line for line in text.splitlines() if line.startswith("- ") and "not here" in line]
    assert line.startswith("- 152612.3")
    assert [markup.line(text) for text in ("2. x", "2.", "2) x", "2.5 s", "- x", "#x")] == [
        "2\\. x", "2\\.", "2\\) x", "2.5 s", "\\- x", "\\#x",
    ]  # fmt: skip
