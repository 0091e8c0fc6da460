"""docs/architecture.md names files that exist, rooms in their order, and walks of at most eight stops."""

import re
from pathlib import Path

from test_imports import ROOMS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
LINK = re.compile(r"\[[^\]]+\]\((\.\./[^)#]+)\)")


def test_the_files_it_names_exist():
    named = LINK.findall(DOCUMENT.read_text())
    assert len(named) > 30
    assert not [name for name in named if not (DOCUMENT.parent / name).exists()]


def test_the_rooms_stand_in_the_order_that_imports_keep():
    table = re.findall(r"^\| \[`([^`]+)`\]", DOCUMENT.read_text(), re.MULTILINE)
    names = [path.removeprefix("kernels/").removeprefix("runner/").replace("/", ".") for path in table]
    assert names == [room for room in ROOMS if room in names]
    assert {room.split(".")[1] for room in ROOMS if room.startswith("moeexp.")} <= {name.split(".")[-1] for name in names}


def test_each_walk_has_at_most_eight_stops():
    walks = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    assert [walk.splitlines()[0] for walk in walks] == [
        "One config", "One weight", "One compiled method", "One token", "One record",
    ]  # fmt: skip
    for walk in walks:
        stops = re.findall(r"^(\d+)\. ", walk, re.MULTILINE)
        assert [int(stop) for stop in stops] == list(range(1, len(stops) + 1)) and 3 <= len(stops) <= 8
