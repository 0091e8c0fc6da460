"""A record from a stranger, or damaged: either reported or one line, by every reader; none hangs, none runs what it holds."""

import base64
import hashlib
import itertools
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import record_fuzz
import synthetic
from markdown_it import MarkdownIt
from record_fuzz import MARKUP, TERMINAL, seeded
from sabotage import experiment, ran

from moeexp.cli import main
from moeexp.record.record import read_record
from moeexp.report import markdown
from moeexp.report.html import page

FEW, MANY = 24, 800
# Each would be markup, if it got through: HTML, a link, an image, a heading, a list, a fence, another cell.
INJECTED = (
    MARKUP, TERMINAL, '" onload="alert(1)', "' onmouseover='alert(1)", "a\n\n# b\n\n- c\n\n```\n<b>d</b>", "[a](javascript:b)",
    "![a](http://b)", "[a]: http://b", "a | b\n--- | ---\nc | d", "</pre></title></style><svg onload=alert(1)>", "<!--",
    "*a* __b__ `c`", "```", "&lt;script&gt;", "{{ 1 }}{% raw %}", "<http://a>", "[red]a[/red]",
)  # fmt: skip

LISTS = {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"}


def fuzz(folder, count):
    generator, bases = seeded(), record_fuzz.bases()
    readers = record_fuzz.Readers(folder, bases[1])
    sources = [record_fuzz.damages(base, generator) for base in bases]
    for what, data in itertools.islice(itertools.chain.from_iterable(zip(*sources, strict=True)), count):
        readers.read(what, data)


def test_a_few_damaged_records_are_reported_or_one_line(tmp_path):
    fuzz(tmp_path, FEW)


@pytest.mark.slow
def test_many_damaged_records_are_reported_or_one_line(tmp_path):
    fuzz(tmp_path, MANY)


class Seen(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self._inside = [], {"script": [], "style": []}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in self.raw:
            self.raw[self._inside].append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")

    @property
    def names(self):
        """What there is, but for how often: a record may have more texts than another, and no other elements."""
        return {(tag, name) for tag, attributes in self.elements for name in (*attributes, None)}


def check_page(text, allowed):
    seen = Seen(text)
    assert seen.names <= allowed, seen.names - allowed
    assert [a.get("type") for tag, a in seen.elements if tag == "script"] == ["application/json", None]
    assert all(a["href"].startswith(("#", "data:")) for tag, a in seen.elements if tag in ("a", "link"))
    statuses = {"status", "ok", "wrap", "rare", "failed", ""}
    assert all(set(a["class"].split(" ")) <= statuses for _, a in seen.elements if "status" in a.get("class", ""))
    assert not set("\x1b\u202e") & set(text)


def markdown_kinds(text):
    """What a reader of Markdown makes of it."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return {token.type for one in tokens for token in (one, *(one.children or ()))}, tokens


def check_markdown(text, allowed):
    kinds, tokens = markdown_kinds(text)
    assert kinds <= allowed, (kinds - allowed, text)
    titles = {tokens[at + 1].content.split(",")[0] for at, token in enumerate(tokens) if token.type == "heading_open"}
    assert titles <= {"Processes", "Speed-up", "Effects", "Interactions", "Alone and in the full stack", "Conditions"}
    widths = set()
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            end = next(i for i in range(at, len(tokens)) if tokens[i].type == "tr_close")
            widths.add(sum(one.type in ("td_open", "th_open") for one in tokens[at:end]))
    assert not set("\x1b\u202e\r") & set(text) and widths


def pair():
    whole = synthetic.record("quant=none", id="ab.1", ms=2.0, time_split=synthetic.TIME_SPLIT, telemetry=synthetic.TELEMETRY)
    failed = {"type": "E", "message": "it broke", "phase": "weights", "traceback": "…"}
    other = synthetic.record("quant=int4", id="ab.0", status="failed", error=failed, notes=["a note"], generated_text=["some"],
                             design={"name": "ladder", "cell": "rung", "index": 0}, stalls=None)  # fmt: skip
    fast = synthetic.record("quant=int8", id="ab.2", time_split=synthetic.TIME_SPLIT, notes=["a note"], group={"id": "g"},
                            tracker={"name": "wandb", "path": "p", "url": "u"}, not_applicable=["pdl"])  # fmt: skip
    return whole, [other, fast]


def inject(count):
    generator = seeded()
    whole, others = pair()
    everything = [whole, *others, synthetic.refused("quant=int8", id="ab.3")]
    allowed = Seen(page.page(everything, title="t")).names | {("wbr", None), ("p", "class"), ("pre", "class"), ("td", "colspan")}
    clean = markdown.document(everything)
    kinds = markdown_kinds(clean)[0] | LISTS | {"code_inline"}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "s_open"}
    for _ in range(count):
        base = generator.choice(others)
        places = [path for path in record_fuzz.texts(base) if path[0] not in ("schema", "status", "started", "finished", "id")]
        spoiled = base
        for path in generator.sample(places, 3):
            spoiled = record_fuzz.replaced(spoiled, path, generator.choice(INJECTED))
        check_page(page.page([whole, spoiled], title="t"), allowed)
        check_markdown(markdown.document([whole, spoiled]), kinds)


def test_no_text_of_a_record_becomes_markup():
    inject(8)


@pytest.mark.slow
def test_none_of_many_texts_of_a_record_becomes_markup():
    inject(300)


@pytest.mark.parametrize("text", INJECTED)
def test_names_messages_notes_and_overrides_are_text(text):
    whole, (failed, fast) = pair()
    failed["error"]["message"], failed["overrides"], failed["command"] = text, [f"quant={text}"], ["python", text]
    fast["config"]["quant"]["name"], fast["notes"], fast["check"]["parts"][0]["tolerances"][0]["where"] = text, [text], text
    failed["design"] = {"name": text, "cell": text, "index": 0}
    fast["environment"] = fast["environment"] | {"gpu": {"name": text, "driver": text}}
    fast["time_split"]["by_kernel"] = [{"name": text, "calls": 1, "us": 1.0}]
    clean = Seen(page.page([*pair()[1], whole], title="t")).names | {("wbr", None), ("p", "class"), ("td", "colspan")}
    html, document = page.page([whole, failed, fast], title=text), markdown.document([whole, failed, fast])
    check_page(html, clean)
    kinds = LISTS | {"heading_open", "heading_close", "paragraph_open", "paragraph_close", "inline", "text", "text_special",
                     "softbreak", "fence", "code_inline", "entity"}  # fmt: skip
    table = {f"{name}_{end}" for name in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")}
    check_markdown(document, kinds | table)


def test_only_the_page_s_own_script_and_style_may_act():
    seen = Seen(page.page(pair()[1], title="t"))
    (policy,) = [a["content"] for tag, a in seen.elements if tag == "meta" and "content" in a and "default-src" in a["content"]]
    for name, text in (("script-src", seen.raw["script"][-1]), ("style-src", seen.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and not [a for _, a in seen.elements if "style" in a]


def test_damaged_records_never_stop_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "model=nano", "tracker=jsonl", "export=eager", "launcher.isolation=none", "seed=5,6"]
    assert main(sweep, experiment=experiment) == 0 and ran() == [5, 6]
    paths = {read_record(path)["config"]["seed"]: path for path in Path("multirun").rglob("record.json")}
    text = paths[5].read_text()
    paths[5].write_text(text.replace('"decode_tok_s": 10.0', '"decode_tok_s": NaN'))  # below the first lines
    for name in ("folder/record.json", "pipe", "link", "date"):
        Path("multirun", name).mkdir(parents=True)
    os.mkfifo("multirun/pipe/record.json")
    Path("multirun/link/record.json").symlink_to("record.json")
    date = text.split('"started": "')[1].split('"')[0]
    Path("multirun/date/record.json").write_text(text.replace(date, "yesterday"))
    capsys.readouterr()
    with record_fuzz.in_time("a sweep", 60):
        assert main(sweep, experiment=experiment) == 0
    assert ran() == [5], "that one again, the other is reused"
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "4 damaged records of earlier runs are left out, the first: " in line], said
    assert max(map(len, said)) <= 400
