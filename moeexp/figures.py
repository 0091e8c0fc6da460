"""`python -m moeexp.figures [--check] [FILE…]`: README's and docs' figures and charts, derived from the records in results/,
and docs' table of axes, from the schema.

A block stands between `<!-- figures: NAME -->` and `<!-- /figures -->`; the command replaces what is between them. With
--check nothing is written, and the exit code is 1 where a block is not what it is derived from says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from moeexp.config.errors import Parser, answered
from moeexp.record.record import write_atomically

MARKER = re.compile(r"^<!-- (figures: [^\n]*|/figures) -->$", re.MULTILINE)
BLOCK = re.compile(r"^(<!-- figures: ([a-z0-9-]+) -->\n)(.*?)^(<!-- /figures -->)$", re.MULTILINE | re.DOTALL)


def rewritten(text: str, results: Path, *, name: str = "the text") -> tuple[str, list[str]]:
    """The text with every block as the records have it, and the names of those that were not. `ValueError` for a block that
    nobody makes, or whose marker has no other end."""
    from moeexp.report.figure_blocks import BLOCKS

    stale = []

    def replace(match: re.Match[str]) -> str:
        opening, block, old, closing = match.groups()
        if block not in BLOCKS:
            raise ValueError(f"{name}: no figures are called {block}; there are {', '.join(BLOCKS)}")
        try:
            made = BLOCKS[block](results)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: a record of {results} has not what {block} shows ({what}): mend or remove it") from error
        new = f"\n{made.strip()}\n\n" if made else ""
        if new != old:
            stale.append(block)
        return opening + new + closing

    found = BLOCK.sub(replace, text)
    markers = [match[1] for match in MARKER.finditer(text)]
    if len(markers) != 2 * len(BLOCK.findall(text)) or markers[1::2] != ["/figures"] * (len(markers) // 2):
        raise ValueError(f"{name}: a block of figures is <!-- figures: NAME -->, what is made, <!-- /figures -->, in turn")
    return found, stale


def outside(text: str) -> str:
    """The text without what the blocks hold."""
    return BLOCK.sub(r"\1\4", text)


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    from moeexp.report.figure_blocks import AXES, CHARTS

    about = "The figures of README.md and docs/ from the records, and the table of axes from the schema."
    parser = Parser(prog="python -m moeexp.figures", description=about)
    parser.add_argument(
        "files", metavar="FILE", nargs="*", type=Path, help="default: README.md, docs/*.md and the charts in docs"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a block or a chart differs")
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"), help="default: results")
    options = parser.parse_args(arguments)
    files = options.files or [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if path.is_file()]
    if not options.results.is_dir() or not files:
        raise ValueError(f"no {options.results} or no README.md here: run it where the repository's README.md lies")
    differ = [line for path in files for line in _file(path, options.results, write=not options.check)]
    for name, make in {} if options.files else CHARTS.items():
        differ += _chart(Path(name), make(options.results), write=not options.check)
    for line in differ:
        source = "the schema says" if line.endswith(f": {AXES}") else "the records say"
        print(f"{line} {f'is not what {source}' if options.check else 'rewritten'}")
    return 1 if options.check and differ else 0


def _file(path: Path, results: Path, *, write: bool) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found, stale = rewritten(text, results, name=str(path))
    if write and found != text:
        write_atomically(path, found)
    return [f"{path}: {block}" for block in stale]


def _chart(path: Path, made: str, *, write: bool) -> list[str]:
    if not made or (path.is_file() and path.read_text(encoding="utf-8") == made):
        return []
    if write:
        write_atomically(path, made)
    return [str(path)]


if __name__ == "__main__":
    sys.exit(main())
