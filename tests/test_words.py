"""One name for one thing: no two classes share a name, and names of earlier versions do not come back."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = [path for folder in ("moeexp", "kernels", "runner") for path in sorted((ROOT / folder).rglob("*.py"))]
PROSE = [*PRODUCT, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *sorted((ROOT / "conf").rglob("*.yaml")), *sorted((ROOT / "tests").rglob("*.py"))]  # fmt: skip
# Where they are named as what they were.
HISTORY = {"moeexp/record/renamed.py", "tests/test_renamed.py", "tests/test_words.py"}
# What it was, and what the field says.
OLD = {
    r"\boverlap=|\bOVERLAP|\bcan_overlap|\bstart_early|\bearly_(edges|starts?)\b|kernels (that )?start early": "pdl",
    r"\btakes_live|\bHAS_LIVE|\blive\[|\blive: Tensor": "padded, valid_len",
    r"\bGATES\b(?! *[:+])|\bclass Gate\b|\"gates?\":": "Tolerance",
    r"\bbring_home|\b_away\b|\b_come_home": "front, back, swap",
    r"\bparting\(|\b_apart\(|tokens part": "first_divergence, diverge at",
    r"tokens\.deficit|\bdeficit\b": "logit margin",
    r"\brace_of\b": "Gumbel-argmax check",
    r"\bRecipe\b|\bMAKERS\b": "MethodBuilder, EXPORTERS",
    r"\bPLANES\b|\bplane_of\b|\bwords_in_runs\b": "limbs, vector width",
    r"\bFAST\b|\bWIDEN\b": "INTERPRETED",
    r"nothing to act on|something to act on": "no effect on this device",
    r"choose for themselves|norms for itself": "router fused into the expert kernels, gated RMSNorm fused into out_proj",
}


def names(path: Path) -> list[str]:
    """Classes, and aliases of types at the top of a module."""
    tree = ast.parse(path.read_text())
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    targets = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    return found + [one.id for one in targets if isinstance(one, ast.Name) and re.fullmatch(r"[A-Z]\w*[a-z]\w*", one.id)]


def test_no_two_types_share_a_name():
    places = defaultdict(list)
    for path in PRODUCT:
        for name in names(path):
            places[name].append(path.relative_to(ROOT).as_posix())
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("pattern", OLD, ids=list(OLD.values()))
def test_old_names_do_not_come_back(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        if path.relative_to(ROOT).as_posix() not in HISTORY
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == [], f"say {OLD[pattern]}"
