"""Every seeded fault is seen by the check, at the smallest size; docs/check_power.md says by which part on `tiny`."""

from pathlib import Path

import pytest
from common import EVEN, build_snapshot

from moeexp.check.faults import FAULTS, PROMPT_LEN, Fault
from moeexp.power import INTRODUCTION, QUANT, Shared, _phases, configured, markdown, seen_by, table
from moeexp.stack.factory import build_model

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "check_power.md"
IDS = ",".join(str(1 + i % 50) for i in range(PROMPT_LEN))
FAULTY = [fault for fault in FAULTS if fault.name != "none"]

# The part that has to see it, whatever others do.
EXPECTED = {
    "the second-best token is generated": "tokens",
    "reading: one expert more per token": "trace",
    "reading: one expert less per token": "trace",
    "config.json: a rope_scaling that we do not read": "config",
    "map: gate and up of the experts swapped": "weights",
    "map: experts in another order": "weights",
    "map: layers 0 and 1 swapped": "loading",  # of two kinds here
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    build_snapshot(folder, EVEN, layout="per_expert")
    cfg = configured([f"model.weights={folder}", "dtype=float32", "device=cpu", f"prompt_ids=[{IDS}]", "new_tokens=4"])
    with _phases(cfg) as phases:
        return cfg, build_model(cfg, phases), Shared()


def test_without_a_fault_nothing_fails(run):
    assert seen_by(Fault("none"), *run) == []


@pytest.mark.parametrize("fault", FAULTY, ids=lambda fault: fault.name)
def test_is_seen(run, fault):
    expected = "weights" if fault.model else "float32"
    assert EXPECTED.get(fault.name, expected) in seen_by(fault, *run)


def test_nothing_of_a_fault_is_left_behind(run):
    for fault in FAULTY[:1] + FAULTY[-1:]:
        seen_by(fault, *run)
    assert seen_by(Fault("none"), *run) == []


def rows() -> dict[str, list[str]]:
    lines = [line.strip("| \n").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines[1:]}


def test_the_document_is_of_these_faults():
    assert DOCUMENT.read_text().startswith(INTRODUCTION.format(prompt=PROMPT_LEN, new=6))
    assert list(rows()) == [fault.name for fault in FAULTS]
    assert not [name for name, cells in rows().items() if any("nothing sees it" in cell for cell in cells)]


def test_a_fault_that_nothing_sees_is_shown_as_such():
    cells = {"none": dict.fromkeys(QUANT, []), "x": {"none": ["float32"], "int8": [], "int4": ["weights", "tokens"]}}
    last = markdown(cells, new_tokens=6).splitlines()[-2:]
    assert last[0] == "| none |" + " passes, as it must |" * 3
    assert last[1] == "| x | float32 | **nothing sees it** | weights, tokens |"


@pytest.mark.slow
def test_the_document_is_what_the_command_finds():
    """Noise of bfloat16 may tip `timed` and `tokens` on another machine; the other parts may not."""

    def firm(cell: str) -> list[str]:
        return [part for part in cell.split(", ") if part not in ("timed", "tokens", "generate")]

    found = {name: [firm(", ".join(cells[quant])) for quant in QUANT] for name, cells in table().items() if name != "none"}
    assert found == {name: [firm(cell) for cell in cells] for name, cells in rows().items() if name != "none"}
