"""`python -m moeexp`, and the command `moeexp`."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Before the first record and after the last. At once: what an interrupt raises in the middle of an import may be swallowed
    there, or become another error."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    from moeexp import cli  # takes a second

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
