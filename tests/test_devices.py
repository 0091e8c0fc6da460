"""GPUs as nvidia-smi tells of them, chosen and counted. No GPU needed."""

import subprocess

import pytest
import torch

from moeexp.record import gpus
from moeexp.record.gpus import Gpu, choose, others_on, visible_gpus

THREE = [Gpu(0, "GPU-aaaa", "A"), Gpu(1, "GPU-bbbb", "A"), Gpu(2, "GPU-bbcc", "B")]


@pytest.fixture
def three(monkeypatch):
    rows = [{"index": str(gpu.index), "uuid": gpu.id, "name": gpu.name} for gpu in THREE]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpus, "nvidia_smi", lambda *fields, **_: rows)


@pytest.mark.parametrize(
    "shown, ids",
    [
        (None, ["GPU-aaaa", "GPU-bbbb", "GPU-bbcc"]),
        ("2,0", ["GPU-bbcc", "GPU-aaaa"]),
        ("GPU-bbcc", ["GPU-bbcc"]),
        ("GPU-aa", ["GPU-aaaa"]),
        ("", []),
        ("-1", []),
        ("1,9,0", ["GPU-bbbb"]),
    ],
)
def test_what_cuda_visible_devices_leaves(three, shown, ids):
    found = visible_gpus({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
    assert [gpu.id for gpu in found] == ids
    assert shown is None or [gpu.index for gpu in found] == list(range(len(ids)))


def test_part_of_a_gpu_is_what_torch_says(three, monkeypatch):
    monkeypatch.setattr(gpus, "_ask_torch", lambda: [Gpu(0, "MIG-1", "A MIG 1g")])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-1"}) == [Gpu(0, "MIG-1", "A MIG 1g")]


def test_a_torch_without_cuda_sees_none(three, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert visible_gpus({}) == []


@pytest.mark.parametrize("wanted, chosen", [(1, [0]), (2, [0, 1]), ("all", [0, 1, 2]), ([2, 0], [2, 0])])
def test_chosen(wanted, chosen):
    assert [gpu.index for gpu in choose(THREE, wanted)] == chosen


def test_without_gpus_a_sweep_runs_on_the_cpu():
    assert choose([], 1) == choose([], "all") == []


@pytest.mark.parametrize("wanted", [0, -1, 4, True, "some", [], [3], [0, 0], ["0"], None, 1.5])
def test_refused(wanted):
    with pytest.raises(ValueError, match="launcher.gpus="):
        choose(THREE, wanted)


@pytest.mark.parametrize("listed, own, expected", [(0, 1, None), (1, 1, 0), (3, 1, 2), (0, 0, 0)])
def test_other_processes_are_counted(monkeypatch, listed, own, expected):
    rows = [{"gpu_uuid": "GPU-aaaa", "pid": str(i)} for i in range(listed)] + [{"gpu_uuid": "GPU-bbbb", "pid": "9"}]
    monkeypatch.setattr(gpus, "nvidia_smi", lambda *fields, query: rows)
    assert others_on("GPU-aaaa", own=own) == expected


def test_a_driver_that_does_not_answer_tells_nothing(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(gpus, "nvidia_smi", hangs)
    assert others_on("GPU-aaaa", own=1) is None
