"""A declarative experiment framework for decoding Qwen3.5-MoE."""

import time

__version__ = "0.1.0"

# time.monotonic() near the start of a process that runs this package's modules: this is the first that it imports.
STARTED = time.monotonic()
