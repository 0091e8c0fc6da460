"""Shared by all tests: no network, nothing skipped unseen, subprocesses find the packages."""

from __future__ import annotations

import copy
import fnmatch
import functools
import os
import signal
import tempfile
from pathlib import Path

# Tests run beside each other, one on each core: read when torch is first imported, and by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in a run; see `moeexp.config.threads`

import kernels_common  # noqa: E402  before any module that imports triton
import pytest  # noqa: E402

# A shell has what it starts in the background ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def compose_each_once():
    """Hydra takes 75 ms for a config, and tests ask for the same ones a thousand times. Before a test module imports it."""
    from moeexp.config import compose

    composed = functools.cache(compose.compose)
    compose.compose = lambda overrides=(): copy.deepcopy(composed(tuple(overrides)))


compose_each_once()


def read_little_for_the_bandwidth():
    """A run on a CPU draws and reads 256 MB for a figure whose size no test looks at: a third of a short run's time."""
    from moeexp_runner import timing

    if kernels_common.DEVICE == "cpu":
        timing.read_bandwidth = functools.partial(timing.read_bandwidth, megabytes=16)


read_little_for_the_bandwidth()


@pytest.fixture
def exact_reference(monkeypatch):
    """Float32 products are float32 on a GPU, too: of a test's reference on the device."""
    import torch

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Of a run that shows nothing and is of no config: for what builds a model or a stack, or checks one."""
    from rich.console import Console

    from moeexp.record.phases import Phases
    from moeexp.record.record import Record

    record = Record(tmp_path_factory.mktemp("run") / "record.json", id="t", config=None, command=["test"])
    return Phases(record, Console(quiet=True))


SKIPS = Path(__file__).with_name("skips.txt")
NO_GPU = "no CUDA device"

os.environ["WANDB_MODE"] = "offline"
STATE = tempfile.TemporaryDirectory()  # a user's key of artifacts is none of a test's
os.environ["XDG_STATE_HOME"] = STATE.name
PACKAGE_ROOTS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "runner")]
os.environ["PYTHONPATH"] = os.pathsep.join([*PACKAGE_ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: a worker on each core that the machine grants, by affinity and control groups."""
    from moeexp.config.threads import granted

    return granted().cores


def pytest_collection_modifyitems(items):
    wants_gpu = []
    for item in items:
        if "gpu" in item.path.relative_to(ROOT).parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu"):
            wants_gpu.append(item)
    if wants_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in wants_gpu:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def listed_skips() -> list[tuple[str, str]]:
    """(pattern of test ids, text that the reason contains) of each line of skips.txt."""
    lines = [line.split("#")[0].strip() for line in SKIPS.read_text().splitlines()]
    pairs = [line.split("|") for line in lines if line]
    return [(pattern.strip(), reason.strip()) for pattern, reason in pairs]


def refuse_unlisted_skip(report):
    """A test that is skipped tests nothing: one that skips.txt does not list fails."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(fnmatch.fnmatch(report.nodeid, pattern) and text in reason for pattern, text in listed_skips()):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped ({reason}) and tests/skips.txt does not list it"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    refuse_unlisted_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    refuse_unlisted_skip(report)
    return report
