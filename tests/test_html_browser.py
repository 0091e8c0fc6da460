"""The HTML report in headless Chromium, without a network: no console error, charts drawn, filter and sort work, and
nothing wider than the window, on a desk and on a phone."""

import itertools
import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import synthetic
from test_html_report import records

from moeexp.report.html import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    # No name resolves: a page that wanted anything from outside would say so on the console.
    "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--virtual-time-budget=10000",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

# Runs in a page that holds the report in a frame: a headless window cannot be as narrow as a phone, a frame can.
PROBE = """<!doctype html><title>probe</title><body style="margin:0">
<iframe src="report.html" style="border:0;width:WIDTHpx;height:900px"></iframe><pre id="found"></pre><script>
document.querySelector("iframe").addEventListener("load", (event) => {
  const view = event.target.contentWindow, page = view.document, found = {};
  const rows = () => [...page.querySelectorAll("#ranked tbody tr")];
  const ids = () => rows().filter((row) => !row.hidden).map((row) => row.dataset.run);
  const seen = (element) => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const shapes = () => [...page.querySelectorAll("svg rect, svg circle")].filter(seen).length;
  const click = (name) => {
    const all = [...page.querySelectorAll("#ranked th button")];
    all.find((button) => button.textContent === name).click();
    return ids();
  };
  found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  found.width = page.documentElement.clientWidth;
  found.at_start = ids();
  found.shapes = shapes();
  found.empty = [...page.querySelectorAll(".chart, .plot")].filter((c) => !c.querySelector("rect, circle")).length;
  found.text = Math.min(...[...page.querySelectorAll("svg text")].map((t) => parseFloat(view.getComputedStyle(t).fontSize)));
  found.by_p50 = click("p50 ms");
  found.by_p50_again = click("p50 ms");
  found.by_quant = click("quant");
  const filter = page.querySelector('select[data-axis="quant"]');
  filter.value = "=int4";
  filter.dispatchEvent(new view.Event("change"));
  found.filtered = ids();
  found.fewer_shapes = shapes();
  found.count = page.querySelector("#count").textContent;
  filter.value = "";
  filter.dispatchEvent(new view.Event("change"));
  const search = page.querySelector("#search");
  search.value = "UNSUPPORTED";
  search.dispatchEvent(new view.Event("input"));
  found.searched = ids();
  const details = page.querySelector("details[data-record='0']");
  details.parentElement.open = details.open = true;
  setTimeout(() => {
    found.record = details.querySelector("pre").textContent;
    document.getElementById("found").textContent = JSON.stringify(found);
  }, 200);
});
</script>"""


def chromium(folder, *arguments):
    """(stdout, what the page wrote to its console)."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(page.page(records(), title="a sweep"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works(report, width):
    (report / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    dom, console = chromium(report, "--window-size=1400,1000", "--dump-dom", (report / "probe.html").as_uri())
    assert console == []
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["width"] == width and found["overflow"] <= 0
    written = len(re.findall("<rect|<circle", (report / "report.html").read_text()))
    assert found["shapes"] == written > 30 and found["empty"] == 0 and found["text"] >= 11
    assert found["at_start"] == ["ab.3", "ab.2", "ab.1", "ab.0", "ab.4"]
    assert found["by_p50"] == ["ab.0", "ab.1", "ab.2", "ab.3", "ab.4"]  # what was not measured stays last
    assert found["by_p50_again"] == ["ab.3", "ab.2", "ab.1", "ab.0", "ab.4"]
    assert found["by_quant"][:2] == ["ab.3", "ab.1"] and found["by_quant"][2] == "ab.4"
    assert sorted(found["filtered"]) == ["ab.1", "ab.3"] and found["count"] == "2 of 5 runs"
    assert found["fewer_shapes"] < 0.7 * found["shapes"]
    assert found["searched"] == ["ab.4"]
    assert json.loads(found["record"])["id"] == "ab.3"


AXES = {
    "quant": ("none", "int4"), "dispatch": ("single", "dual"), "state": ("explicit", "shared"),
    "skip_output_copy": ("false", "true"), "ops.gdn_decode": ("reference", "einsum"),
}  # fmt: skip

WIDTHS = """<!doctype html><body style="margin:0">
<iframe src="wide.html" style="border:0;width:1280px;height:900px"></iframe><pre id="found"></pre><script>
document.querySelector("iframe").addEventListener("load", (event) => {
  const page = event.target.contentWindow.document, table = page.querySelector("#ranked"), box = table.parentElement;
  const seen = () => [...table.tHead.rows[0].cells].filter((c) => c.getClientRects().length).map((c) => c.textContent);
  const found = { beyond: box.scrollWidth - box.clientWidth, some: seen() };
  found.heights = [...table.tBodies[0].rows].map((row) => row.getBoundingClientRect().height);
  page.querySelector("#all-columns").click();
  found.all = seen();
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def wide(design, stalled):
    """A grid over five axes in which every figure was measured, and a cell that was refused."""
    speeds = {tuple(map("=".join, zip(AXES, levels, strict=True))): 3 * 0.93**i for i, levels in
              enumerate(itertools.product(*AXES.values()))}  # fmt: skip
    stalls = synthetic.stalls(13, 7.278, 1234.5) if stalled else None
    found = synthetic.grid(speeds, joules_per_token=0.4123, bits_per_byte=1.93421, stalls=stalls)
    message = "cuda_graph=true needs CUDA, and torch finds no CUDA GPU here: use cuda_graph=false, or run where there is one"
    found.append(synthetic.refused("quant=none", "ops.gdn_decode=chunked", id="ab.99", message=message))
    for one in found if design else []:
        one["design"] = {"name": "grid", "cell": f"single method, dispatch inside, {one['id']}", "index": 0}
    return found


@pytest.mark.parametrize(("design", "stalled"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_ranking_of_five_axes_fits_a_screen(tmp_path, design, stalled):
    (tmp_path / "wide.html").write_text(page.page(wide(design, stalled), title="t"), encoding="utf-8")
    (tmp_path / "probe.html").write_text(WIDTHS)
    dom, console = chromium(tmp_path, "--window-size=1400,1000", "--dump-dom", (tmp_path / "probe.html").as_uri())
    assert console == []
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["beyond"] <= 0 and max(found["heights"]) < 80
    more = {"p99 ms", "first token ms", "bandwidth %", "kernels/token", "J/token"} | (AXES.keys() if design else set())
    assert set(found["all"]) - set(found["some"]) == more and len(found["all"]) == 19 + design + stalled


POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.mark.parametrize("guarded", [True, False])
def test_a_broken_page_would_be_noticed(report, guarded):
    """The probe sees what it looks for: a script error reaches the console, and what the page's policy keeps from happening does:
    an image from outside, and a script of another's."""
    text = (report / "report.html").read_text().replace("</body>", "<img src=https://a.example/x><script>no()</script></body>")
    assert POLICY.search(text)
    (report / "broken.html").write_text(text if guarded else POLICY.sub("", text))
    _, console = chromium(report, "--dump-dom", (report / "broken.html").as_uri())
    if guarded:
        assert any("inline script" in line for line in console) and any("a.example" in line for line in console)
    assert guarded != any("no is not defined" in line for line in console)
