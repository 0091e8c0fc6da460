"""README's and docs' figures are the records': the blocks, the command that makes them, and no figure outside of them."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic
from moeexp_runner.pieces import pieces

from moeexp import figures
from moeexp.report import figure_blocks
from moeexp.report.curve_blocks import LONG
from moeexp.report.figure_blocks import BLOCKS, FULLSIZE, HEADLINE, LADDER

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / "README.md" if name == "README" else ROOT / "docs" / f"{name}.md"
    for name in ("README", "results", "usage", "axes", "correctness", "kernels")
)
# A number with a unit of what runs measure, or a ratio.
UNIT = r"(?:tok/s|[µun]s|ms|s|[GMk]i?B|J|[TG]B/s|joules|seconds|minutes)(?![\w/])"
FIGURE = re.compile(rf"(?<![\w.])\d[\d,.]*(?:[ \n]{UNIT}|[ \n]?[%×])|×[ \n]?\d[\d.]*")
# What is no measurement: limits of the check, and what statistics allow for.
ALLOWED = ("95 %", "40 %", "5 %", "1 %", "1.5 ×")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the pages and the records, to be spoiled."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_are_what_the_records_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


def test_one_definition_moves_the_ladder(monkeypatch):
    """As one over the median these were 338.5, × 1.65 and × 5.11, beside means of other rungs: of the older ladder, which
    stalled."""
    monkeypatch.setattr(figure_blocks, "LADDER", "ladder_qwen3_5_35b_a3b_int4_h100")
    lines = BLOCKS["ladder"](ROOT / "results").splitlines()
    (copied,) = [line for line in lines if line.startswith("| skipped output copy")]
    (graph,) = [line for line in lines if line.startswith("| CUDA graph")]
    (prefetch,) = [line for line in lines if line.startswith("| weights prefetched")]
    assert "| 295.1 |" in copied and "× 1.88 [" in graph and "| × 1.65 |" in graph
    assert "× 1.064 [" in prefetch and "| × 1.019 |" in prefetch, "most of that gain is a stall"
    assert any(line.startswith("One process each") for line in lines)
    assert "to the last: × 5.31 [" in " ".join(BLOCKS["ladder-summary"](ROOT / "results").split())


@pytest.mark.slow
def test_a_changed_digit_is_named_and_written_anew(checkout, capsys):
    page = checkout / "docs" / "results.md"
    whole = page.read_text()
    page.write_text(whole.replace("| 544.2 |", "| 544.3 |"))
    assert figures.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/results.md: ladder is not what the records say\n"
    assert "| 544.3 |" in page.read_text(), "a check writes nothing"
    assert figures.main([]) == 0 and page.read_text() == whole
    assert capsys.readouterr().out == "docs/results.md: ladder rewritten\n"


def test_another_record_is_another_figure(checkout, capsys):
    record = checkout / "results" / "headline_qwen3_5_35b_a3b_int4_h200" / "0" / "record.json"
    record.write_text(record.read_text().replace('"first_token_s": 6', '"first_token_s": 7'))
    assert figures.main(["--check", "docs/results.md"]) == 1
    assert "start is not what the records say" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["<!-- figures: nothing -->\n<!-- /figures -->\n", "<!-- figures: tiny -->\n",
                                  "<!-- /figures -->\n", "<!-- figures: tiny --> x\n<!-- figures: tiny -->\n"])  # fmt: skip
def test_a_block_that_cannot_be_made_is_one_line(checkout, capsys, text):
    (checkout / "a.md").write_text(text)
    assert figures.main(["a.md"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a.md: ") and said.count("\n") == 1 and (checkout / "a.md").read_text() == text


def test_away_from_a_checkout_it_says_where_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert figures.main([]) == 2 and "run it where the repository's README.md lies" in capsys.readouterr().err
    assert figures.main(["--help"]) == 0


def repeats(folder, *ms):
    """As `-m … seed=0,1,2` leaves them."""
    records = [synthetic.record("cuda_graph=false", f"seed={i}", id=f"r{i}", samples=[one] * 40) for i, one in enumerate(ms)]
    return synthetic.write(folder / HEADLINE, [one | {"bandwidth_share": 0.5, "joules_per_token": 0.9} for one in records])


def test_the_headline_is_the_median_of_three_processes_with_its_spread(tmp_path):
    assert BLOCKS["headline"](tmp_path) == "", "not measured: the README says nothing"
    repeats(tmp_path, 1.25, 1.0, 0.8)
    text = BLOCKS["headline"](tmp_path)
    assert "median of 3 processes [least, most]" in text and "| decode, tok/s | **1,000 [800, 1,250]** |" in text
    assert "| of the measured read bandwidth, % | 50 [50, 50] |" in text and "| 0.9 [0.9, 0.9] |" in text
    assert "–" not in text and "check passed" in text


def test_a_headline_of_fewer_processes_is_refused(checkout, capsys):
    shutil.rmtree(checkout / "results" / HEADLINE)
    repeats(checkout / "results", 1.0, 1.1)
    assert figures.main(["--check", "README.md"]) == 2
    said = capsys.readouterr().err
    assert "holds 2 measured processes, and a headline figure needs 3" in said and said.count("\n") == 1


def test_curves_by_prompt_and_by_depth_where_they_were_measured(tmp_path):
    blocks = {"prompt": BLOCKS["prefill-by-prompt"], "depth": BLOCKS["decode-by-depth"]}
    assert [block(tmp_path) for block in blocks.values()] == ["", ""]
    records = []
    for kind, length in (("prompt", 32768), ("depth", 4096), ("prompt", 4096), ("prompt", 262144)):
        chosen = [f"prompt_len={length}", f"max_seq_len={length + 128}", "quant=int4"]
        records.append(synthetic.record(*chosen, id=f"r{len(records)}", ms=1.25, noise=0.0, bandwidth_share=0.25))
        records[-1]["design"] = {"name": "fullsize", "cell": f"{kind} {length}", "index": len(records)}
    records[-1] |= dict.fromkeys(("check", "prefill_tok_s", "ttft_s", "decode_tok_s", "bandwidth_share"))
    synthetic.write(tmp_path / LONG, records)
    lines = blocks["prompt"](tmp_path).splitlines()
    assert lines[2:5] == [
        "| 4,096 | 1 | no | 9,000 | 0.01 | 14 | passed |",
        "| 32,768 | 4 | no | 9,000 | 0.01 | 14 | passed |",
        "| 262,144 | 32 | no | – | – | 14 | off |",
    ]
    assert lines[-1].startswith("Each on one NVIDIA H100") and "a run shows that it fits, and publishes no speed" in lines[-1]
    assert "NVIDIA H200" not in lines[-1]
    records[0]["environment"]["gpu"]["name"] = "NVIDIA H200"
    shutil.rmtree(tmp_path / LONG)
    synthetic.write(tmp_path / LONG, records)
    last = blocks["prompt"](tmp_path).splitlines()[-1]
    expected = "Each on one NVIDIA H100 80GB HBM3 or one NVIDIA H200, in a process of its own."
    assert last.startswith(expected), "by the length of the prompt"
    depth = blocks["depth"](tmp_path)
    assert "| 4,096 | 9,000 | 800 | 1.25 | 25 % | 14 | passed |" in depth and "publishes no speed" not in depth
    assert "compared the logits of the last" not in blocks["prompt"](tmp_path) + depth
    for record in records:
        record["config"]["check_logits"] = 4096 if record["config"]["prompt_len"] > 4096 else 0
    shutil.rmtree(tmp_path / LONG)
    synthetic.write(tmp_path / LONG, records)
    assert " The check of 32,768 tokens compared the logits of the last 4,096 of them" in blocks["prompt"](tmp_path)
    assert blocks["depth"](tmp_path) == depth, "of a run without a check nothing was compared, and of 4,096 tokens all"


def test_a_run_without_a_check_has_no_figure_in_a_block(tmp_path):
    unchecked = dict.fromkeys(("check", "decode_tok_s", "prefill_tok_s", "ttft_s", "bandwidth_share", "token_latencies_ms"))
    for name, axis, values in ((FULLSIZE, "batch", (1, 2, 4)), (LADDER, "quant", ("none", "int8", "int4"))):
        records = [
            synthetic.record(f"{axis}={value}", id=f"ab.{index}", noise=0.0, time_split=synthetic.TIME_SPLIT)
            | {"design": {"name": "ladder", "cell": f"{value}", "index": index}}
            for index, value in enumerate(values)
        ]
        records[1] |= unchecked
        for one in records:
            one["bytes_per_token"]["distinct_experts"] = 8
        synthetic.write(tmp_path / name, records)
    sequences, ladder = (
        [line.strip("| ").split(" | ") for line in BLOCKS[name](tmp_path).splitlines() if line.startswith("| ")][2:]
        for name in ("sequences", "ladder")
    )
    assert [row[2:7] for row in sequences] == [
        ["**1,000**", "1", "8", "1 %", "64"], ["**–**", "–", "8", "–", "–"], ["**4,000**", "1", "8", "1 %", "64"],
    ]  # fmt: skip
    assert [(row[1], row[7]) for row in ladder] == [("1,000", "64"), ("–", "–"), ("1,000", "64")]
    assert [row[8] for row in ladder] == ["210 / 5 / 25 / 60", "–", "210 / 5 / 25 / 60"]


def test_sequences_of_a_later_group_are_named(tmp_path):
    records = [
        synthetic.record(f"batch={batch}", id=f"ab.{batch}", noise=0.0, time_split=synthetic.TIME_SPLIT)
        | {"group": {"id": "ab.1" if batch < 4 else "cd.0"}, "started": f"2026-11-2{9 if batch == 4 else 8}T00:00:00+00:00"}
        for batch in (1, 2, 4)
    ]
    for one in records:
        one["bytes_per_token"]["distinct_experts"] = 8
    synthetic.write(tmp_path / "two" / FULLSIZE, records)
    said = " ".join(BLOCKS["sequences"](tmp_path / "two").split())
    assert said.endswith("Those of 4 sequences took theirs in another process, later.")
    for one in records:
        one["group"], one["started"] = records[0]["group"], "2026-11-28T00:00:00+00:00"
    records[0] |= {"group": {"id": "ef.0"}, "started": "2026-11-27T00:00:00+00:00"}
    synthetic.write(tmp_path / "three" / FULLSIZE, records)
    said = " ".join(BLOCKS["sequences"](tmp_path / "three").split())
    assert said.endswith("Those of 2 and 4 sequences took theirs in another process, later.")
    records[0]["group"] = records[1]["group"]
    synthetic.write(tmp_path / "one" / FULLSIZE, records)
    assert "later" not in BLOCKS["sequences"](tmp_path / "one")


BROKEN = ("config.prompt_len", "config.prefill_chunk", "memory_gib", "environment", "environment.gpu", "check")


@pytest.mark.parametrize("where", BROKEN)
def test_a_record_that_lacks_what_a_block_shows_is_one_line(tmp_path, capsys, where):
    record = synthetic.record("prompt_len=64", bandwidth_share=0.25)
    record["design"] = {"name": "fullsize", "cell": "prompt 64", "index": 0}
    (tmp_path / "a.md").write_text(text := "<!-- figures: prefill-by-prompt -->\n<!-- /figures -->\n")
    table, _, key = where.rpartition(".")
    for value in (None, {}, "text", -1):
        spoiled = record | ({table: record[table] | {key: value}} if table else {key: value})
        synthetic.write(tmp_path / str(value) / LONG, [spoiled])
        code = figures.main([str(tmp_path / "a.md"), "--results", str(tmp_path / str(value)), "--check"])
        said = capsys.readouterr().err
        assert code in (1, 2) and said.count("\n") == (code == 2) and len(said) <= 401, said
        assert code == 2 or value in (None, -1, {}), "what is no number or table is never shown"
    assert (tmp_path / "a.md").read_text() == text


def test_a_prompt_of_any_length_is_counted_at_once(tmp_path):
    record = synthetic.record("prompt_len=64", bandwidth_share=0.25)
    record["design"] = {"name": "fullsize", "cell": "prompt 64", "index": 0}
    record["config"] |= {"prompt_len": 1 << 24, "prefill_chunk": 1}
    synthetic.write(tmp_path / LONG, [record])
    assert "| 16,777,216 | 16,777,216 | no | 9,000 |" in BLOCKS["prefill-by-prompt"](tmp_path)
    assert pieces(10**12, 1) == 10**12, "more than a record may hold"


def stray(text):
    """Figures in a page outside of its blocks."""
    return [found for found in FIGURE.findall(figures.outside(text)) if found not in ALLOWED]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_stands_outside_a_block(page):
    assert stray(page.read_text()) == []


def test_a_figure_outside_a_block_is_found():
    some = ("828.9 tok/s", "1,218 µs", "1.21 ms", "gains × 1.65", "19.8 GiB", "62 %", "0.86 J", "3.12\nTB/s", "1.2×", "219 s")
    for text in some:
        assert stray(f"It is {text}, now.\n") and stray(f"{text}\n<!-- figures: tiny -->\n1 ms\n<!-- /figures -->\n")
        assert not stray(f"<!-- figures: tiny -->\nIt is {text}.\n<!-- /figures -->\n")
    assert not stray("512 tokens, 40 layers, `eval_bytes=8192`, 248,320 logits, 95 % intervals, an H100 80GB HBM3")
    assert all(any(allowed in page.read_text() for page in PAGES) for allowed in ALLOWED), "a stale allowance"


def test_the_chart_is_of_the_records_and_a_file_by_itself(checkout, capsys):
    chart = checkout / "docs" / "curves.svg"
    whole = chart.read_text()
    root = ElementTree.fromstring(whole)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "Prefill, tok/s: 30,444 at 512" in root.attrib["aria-label"]
    assert len([node for node in root.iter() if node.tag.endswith("circle")]) >= 15 and "<title>" not in whole
    panels = [node.attrib for node in root if node.tag.endswith("svg")]
    assert len(panels) == 3 and all(int(one["x"]) + int(one["width"]) <= int(root.attrib["width"]) for one in panels)
    chart.write_text(whole.replace("4,615", "4,616"))
    assert figures.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/curves.svg is not what the records say\n"
    assert chart.read_text() != whole, "a check writes nothing"
    assert figures.main([]) == 0 and chart.read_text() == whole
    shutil.rmtree(checkout / "results" / FULLSIZE)
    shutil.rmtree(checkout / "results" / LONG)
    assert figure_blocks.curves_chart(checkout / "results") == ""


def test_peers_stand_beside_our_own_on_the_same_kind_of_gpu(checkout):
    lines = BLOCKS["peers"](checkout / "results").splitlines()
    (now, older), peers = lines[2:4], lines[4 : 4 + len(figure_blocks.PEERS)]
    assert "NVIDIA H200" in now and "NVIDIA H100" in older and "**" in now
    assert [line.split(" | ")[0].removeprefix("| ") for line in peers] == [peer[0] for peer in figure_blocks.PEERS]
    shutil.rmtree(checkout / "results" / figure_blocks.OLDER_H100)
    assert BLOCKS["peers"](checkout / "results") == ""
