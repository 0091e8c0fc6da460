"""CONTRIBUTING's exercise asks for lines that are there, each in the room that its answer names; pages link to what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "kernels/moeexp_kernels",
    "runner/moeexp_runner",
    *(f"moeexp/{room}" for room in ("record", "config", "model", "report", "stack", "check", "run", "sweep")),
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def lines_of(room):
    return {line.strip() for path in (ROOT / room).rglob("*.py") for line in path.read_text().splitlines()}


def exercise():
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Exercise")[2]
    questions, answers = (dict(re.findall(r"^(\d+)\. `(.+)`$", part, re.MULTILINE)) for part in text.split("<details>"))
    return [(questions[number], answers[number]) for number in questions]


def test_it_asks_for_each_room():
    assert sorted(room for _, room in exercise()) == sorted(ROOMS)


@pytest.mark.parametrize("line, room", exercise())
def test_the_line_is_in_that_room_alone(line, room):
    assert {name for name in ROOMS if line in lines_of(name)} == {room}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
