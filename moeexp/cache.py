"""`python -m moeexp.cache [--clear | --limit GIB]`: what the cache of compiled code holds, and how to make it smaller."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moeexp.config.errors import Parser, answered
from moeexp.run import signals
from moeexp.stack import cache_entries
from moeexp.stack.cache_entries import Entry
from moeexp.stack.caches import LIMIT, cache_dir, limit_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 invalid arguments or a folder that cannot be changed, 130 interrupted."""
    with signals.handled():  # SIGTERM as Ctrl-C
        return answered(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser("python -m moeexp.cache", description="What the cache of compiled code holds.")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--clear", action="store_true", help="remove all that is not in use")
    change.add_argument("--limit", metavar="GIB", help="remove the least recently used beyond so much, none of the last hour's")
    options = parser.parse_args(arguments)
    limit = limit_bytes() if options.limit is None else limit_bytes(options.limit, "--limit")
    if options.clear or options.limit is not None:
        found = cache_entries.entries()
        removed = [one for one in found if cache_entries.remove(one)] if options.clear else cache_entries.trim(limit)
        print(f"removed {len(removed)} entries, {_mib(removed)} MiB")
    show(cache_entries.entries(), limit)
    return 0


def show(found: Sequence[Entry], limit: float) -> None:
    """The most recently used first. `limit`: bytes."""
    table = Table("kind", "name", "MiB", "last use", box=None)
    for entry in reversed(found):
        used = time.strftime("%F %T", time.localtime(entry.used))
        table.add_row(escape(entry.kind), escape(entry.name), _mib([entry]), used)
    if found:
        Console().print(table)
    print(f"{cache_dir()}: {len(found)} entries, {_mib(found)} MiB; limit: {limit / 2**30:g} GiB ({LIMIT})")


def _mib(found: Sequence[Entry]) -> str:
    return f"{sum(entry.size for entry in found) / 2**20:.1f}"


if __name__ == "__main__":
    sys.exit(main())
