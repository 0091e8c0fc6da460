"""Reports of records: `python -m moeexp.report DIR… [--to md|html|wandb] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moeexp.config.errors import Parser, answered
from moeexp.record import streams
from moeexp.record.record import write_atomically
from moeexp.report.records import load_records


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m moeexp.report", description="Report of every record.json under DIR…")
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run's or a sweep's folder, or a record")
    parser.add_argument("--to", choices=("md", "html", "wandb"), help="default: by FILE's ending, else md")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to write; default: md to stdout, report.html")
    parser.add_argument("--title", default="moeexp report")
    parser.add_argument("--project", help="--to wandb: the project to save in; default: the runs' own")
    parser.add_argument("--entity", help="--to wandb: its entity; default: the runs' own, else the one logged in")
    options = parser.parse_args(arguments)
    ending = options.out.suffix if options.out else ""
    options.to = options.to or {".html": "html", ".htm": "html"}.get(ending, "md")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(lambda: _write(_parse(arguments)))


def _write(options: argparse.Namespace) -> int:
    left_out: list[str] = []
    records = load_records(options.folders, left_out=left_out)
    for line in left_out:
        print(streams.fitted(f"left out: {line}"), file=sys.stderr)
    if left_out:
        print(f"{len(left_out)} of {len(records) + len(left_out)} records left out", file=sys.stderr)
    if not records:
        return 2
    # Imported here: the end of a sweep needs the table alone.
    if options.to == "wandb":
        from moeexp.report import wandb

        specification = wandb.specification(records, title=options.title, project=options.project, entity=options.entity)
        if options.out is None:
            print(wandb.save(specification))
            return 0
        text, out = wandb.dump(specification), options.out
    elif options.to == "html":
        from moeexp.report.html import page

        text, out = page.page(records, title=options.title), options.out or Path("report.html")
    else:
        from moeexp.report import markdown

        text, out = markdown.document(records), options.out
    if out is None:
        print(text, end="")
    else:
        write_atomically(out, text)
        print(f"{options.to} report of {len(records)} runs: {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
