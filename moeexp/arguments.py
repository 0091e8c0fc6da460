"""argparse for our commands: errors in one line, `~` in paths, streams of any encoding."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from moeexp import streams
from moeexp.paths import expanded


class Parser(argparse.ArgumentParser):
    """`parse_args` raises `ValueError` where argparse would print its usage and exit. `type=Path` expands `~`."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.register("type", Path, _path)
        streams.prepare()

    def error(self, message: str) -> NoReturn:
        raise ValueError(streams.fitted(f"{message}; {self.prog} --help says what there is"))


def _path(text: str) -> Path:
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
