"""What others offer for the same operation: one file each, measured beside our ops in the same run.

A file names its package, says whether it compiles when called, and offers, by op, functions that take a case and return a
`Peer`, or None where the case is not theirs. A peer holds the same weights in its own layout, and its result is checked
before its time is shown.
"""

from __future__ import annotations

from moeexp_kernels.bench.peers import executorch, fla, gemlite, humming, torch_int4, torch_ops
from moeexp_kernels.bench.peers.peer import Peer, Unavailable

SOURCES = {module.NAME: module for module in (torch_ops, torch_int4, fla, executorch, gemlite, humming)}

__all__ = ["SOURCES", "Peer", "Unavailable"]
