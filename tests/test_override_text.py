"""A text field holds the text that was typed: in a single run, in the quick composition, in a sweep, in a design."""

import dataclasses
import typing

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_cells import composer  # noqa: F401  a fixture

from moeexp.cli import main
from moeexp.config import compose, schema
from moeexp.config.override_text import TEXT, as_typed, kind_of, quoted
from moeexp.record.record import read_record
from moeexp.record.text import MAX_OVERRIDES
from moeexp.sweep import cells

# Each is itself.
TEXTS = [
    "1.50", "1_000", "1e3", "true", "True", "FALSE", "+5", "-0", "int(3.2)", "str(5)", "float(x)", "007", "3.14", "yes", "off",
    "None", "NULL", "Null", "nan", "inf", "[a]", "[1.50,2]", "{a:1}", "{a: 1, b: 2}", " leading", "trailing ", "   ", "a  b",
    "What is 1+1?", "Hello!", "It's", 'say "no"', '"a" and "b"', "a=b", "x: y", "é 日本 🙂", "a;b", "#x", "50%", "~", "a\nb",
    "\ttab", "f(x)", "print(1)", "$5", "a\\b", "'", '"', "'a", "@", "1.", ".5", "0x1F", "12:30", "a|b&c", "<s>", "[", "}", "(",
    "\\d", "nullé", "trueñ", "Infü", "nan日", "null²", "null/a", "true.a", "false-é.x",
]  # fmt: skip
# Typed, and what it means: one level of quotes, Hydra's escapes.
MEANT = [
    ("'1.50'", "1.50"), ('"true"', "true"), (" 'a, b' ", "a, b"), (r"a\ \(b\)", "a (b)"), (r"a\,b", "a,b"),
    (r"'it\'s'", "it's"), (r'"C:\\"', "C:\\"), ("'null'", "null"), ("''", ""), (r"a\:b", "a:b"),
]  # fmt: skip
LITERAL = ["${batch}", "echo ${HOME}", "costs ${5}", "${", "a ${ b", "${oc.env:HOME}"]  # in a prompt


@pytest.mark.parametrize("typed, text", [(text, text) for text in TEXTS + LITERAL] + MEANT)
def test_a_prompt_is_what_was_typed(composer, typed, text):  # noqa: F811
    override = as_typed(f"prompt={typed}")
    assert as_typed(override) == override == as_typed(override, sweep=True)
    assert composer.config([f"prompt={typed}"]).prompt == text
    assert composer.compose([f"prompt={typed}"]).prompt == text


def test_single_runs_compose_the_same():
    for typed, text in [("1.50", "1.50"), ("int(3.2)", "int(3.2)"), ("${batch}", "${batch}"), *MEANT[:3]]:
        assert compose.compose(["model=nano", f"prompt={typed}"]).prompt == text
    assert compose.compose(["prompt=null"]).prompt is None and compose.compose(["++prompt=1.50"]).prompt == "1.50"


def fields(cls, prefix=""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


TEXT_FIELDS = [name for name, hint in fields(schema.Config) if hint in (str, str | None)]
LIST_FIELDS = [name for name, hint in fields(schema.Config) if hint == list[str]]


@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_every_text_field_keeps_the_text(composer, name):  # noqa: F811
    for typed in ("1.50", "1_000", "true", "a!"):
        value = composer.config([f"{name}={typed}"])
        for part in name.split("."):
            value = getattr(value, part)
        assert value == typed
    assert kind_of(name) == TEXT


@pytest.mark.parametrize("name", LIST_FIELDS)
def test_every_list_of_texts_keeps_them(composer, name):  # noqa: F811
    value = composer.config([f"{name}=[1.50, true,'a, b',x]"])
    for part in name.split("."):
        value = getattr(value, part)
    assert value == ["1.50", "true", "a, b", "x"]


def test_what_is_no_text_is_left_alone():
    assert len(TEXT_FIELDS) > 30 and LIST_FIELDS
    for override in ("seed=1_000", "batch=int(3.2)", "cuda_graph=true", "quant=int4", "~prompt", "-m", "--cfg=job", "prompt=",
                     "prompt=null", "prompt_ids=[1,2]", "model.architecture={a:1.50}", "launcher.only=[1.50]",
                     "prompt=a, b", "prompt=1.50,true", "launcher.root=${oc.env:HOME}/x", "prompt=choice(1.50,2)"):  # fmt: skip
        assert as_typed(override) == override
    assert as_typed("launcher={root:1.50,gpus:2}") == "launcher={root:'1.50',gpus:2}"
    assert as_typed("launcher.root=${oc.env:HOME}/1!") == "launcher.root='${oc.env:HOME}/1!'"
    assert as_typed("hydra.run.dir=2024.10") == "hydra.run.dir='2024.10'"


@pytest.mark.parametrize("text", TEXTS + ["a\\", "a\\\\", "\\'", "a\\'b\\", "'\\\\'"])
def test_quoted_is_read_again(text):
    assert OverridesParser.create().parse_override(f"x={quoted(text)}").value() == text


def experiment(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True, "parts": [], "failures": []}, prompt_text=[cfg.prompt])


def prompts(folder, *arguments):
    assert main(["tracker=jsonl", *arguments], experiment=experiment) == 0
    found = [read_record(path) for path in sorted(folder.rglob("record.json"))]
    assert [record["prompt_text"] for record in found] == [[record["config"]["prompt"]] for record in found]
    return [record["config"]["prompt"] for record in found]


def test_a_sweep_has_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = "launcher.isolation=none"
    assert prompts(tmp_path, "-m", here, "prompt=1.50,true,'a, b',${batch},x") == ["1.50", "true", "a, b", "${batch}", "x"]


def test_other_sweeps_and_designs(tmp_path, monkeypatch, composer):  # noqa: F811
    sweeps = {
        "choice(1.50,'a, b')": "choice('1.50','a, b')", "range(1,3)": "range(1,3)", "1.50,null": "'1.50',null",
        "hello": "hello", "1.50": "'1.50'", "[a],[b]": "'[a]','[b]'",
    }  # fmt: skip
    for typed, seen in sweeps.items():
        assert as_typed(f"prompt={typed}", sweep=True) == f"prompt={seen}"
    design = "launcher.cells=[{name: 1.50, set: ['prompt=1.50']}]"
    (cell,) = cells.cells_of(composer, [["model=tiny", as_typed(design)]], 0)
    assert cell.title == "1.50" and cell.given.prompt == "1.50"


def test_a_single_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prompts(tmp_path, "prompt=${batch} 1.50") == ["${batch} 1.50"]


def test_what_is_no_utf8_is_refused(capsys):
    assert main(["prompt=a\udcff"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "UTF-8" in line


def test_more_arguments_than_a_record_takes_are_refused(capsys):
    """A record of so many would be refused when it is read."""
    assert main([f"seed={i}" for i in range(MAX_OVERRIDES + 1)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(MAX_OVERRIDES) in line and len(line) <= 400
