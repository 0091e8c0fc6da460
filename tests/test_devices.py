"""GPUs as the driver tells of them, chosen and counted. No GPU needed."""

import threading
from types import SimpleNamespace

import fake_nvml
import pynvml
import pytest
import torch
from moeexp_runner import nvml

from moeexp.record import environment, gpus
from moeexp.record.gpus import Gpu, choose, others_on, visible_gpus

THREE = [Gpu(0, "GPU-aaaa", "A"), Gpu(1, "GPU-bbbb", "A"), Gpu(2, "GPU-bbcc", "B")]
NAMES = {gpu.id: gpu.name for gpu in THREE}


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fake_nvml.install(monkeypatch, *(fake_nvml.FakeGpu(gpu.id, gpu.name) for gpu in THREE))


@pytest.mark.parametrize(
    "shown, ids",
    [
        (None, ["GPU-aaaa", "GPU-bbbb", "GPU-bbcc"]),
        ("2,0", ["GPU-bbcc", "GPU-aaaa"]),
        ("GPU-bbcc", ["GPU-bbcc"]),
        ("GPU-aa", ["GPU-aaaa"]),
        ("GPU-bb,0", ["GPU-bbbb", "GPU-aaaa"]),
        ("", []),
        ("-1", []),
        ("1,9,0", ["GPU-bbbb"]),
    ],
)
def test_what_cuda_visible_devices_leaves(three, shown, ids):
    found = visible_gpus({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
    assert [gpu.id for gpu in found] == ids and [gpu.name for gpu in found] == [NAMES[one] for one in ids]
    assert shown is None or [gpu.index for gpu in found] == list(range(len(ids)))


@pytest.mark.parametrize("shown", ["MIG-1", "MIG-GPU-aaaa/1/0"])
def test_part_of_a_gpu_is_what_torch_says(three, monkeypatch, shown):
    monkeypatch.setattr(gpus, "_ask_torch", lambda: [Gpu(0, shown, "A MIG 1g")])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": shown}) == [Gpu(0, shown, "A MIG 1g")]


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_where_nvml_does_not_tell_torch_is_asked(three, monkeypatch, error):
    fake_nvml.install(monkeypatch, error=error)
    monkeypatch.setattr(gpus, "_ask_torch", lambda: [Gpu(0, "0", "A")])
    assert visible_gpus({}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}) == [Gpu(0, "0", "A")]


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
    fake_nvml.install(monkeypatch, fake_nvml.FakeGpu("GPU-bbbb", processes=1), fake_nvml.FakeGpu("GPU-aaaa", processes=listed))
    assert others_on("GPU-aaaa", own=own) == expected


def test_a_driver_that_does_not_answer_tells_nothing(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: answered.wait(30))
    monkeypatch.setattr(nvml, "PATIENCE_S", 0.1)
    try:
        assert others_on("GPU-aaaa", own=1) is None
        assert environment.gpu_state() == {"error": "NVML does not answer within 0.1 s"}
        assert environment.driver() == "unknown (NVML does not answer within 0.1 s)"
    finally:
        answered.set()


def test_without_a_driver_nothing_is_told(monkeypatch):
    fake_nvml.install(monkeypatch, error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert others_on("GPU-aaaa", own=1) is None and environment.driver() == "unknown (NVML: NVML Shared Library Not Found)"
    assert environment.gpu_state() == {"error": "NVML: NVML Shared Library Not Found"}


def test_the_state_of_torch_s_first_gpu(monkeypatch):
    refuses = {"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_NOT_SUPPORTED}
    fake_nvml.install(monkeypatch, fake_nvml.FakeGpu("GPU-b", fails=refuses), fake_nvml.FakeGpu("GPU-a"))
    assert environment.gpu_state() == {
        "sm_mhz": 1980, "memory_mhz": 2619, "power_w": None, "power_limit_w": 700.0, "temperature_c": 61,
        "memory_used_mib": 3,
    }  # fmt: skip
    assert environment.driver() == "580.1"
    refuses["nvmlDeviceGetTemperature"] = pynvml.NVML_ERROR_GPU_IS_LOST
    assert environment.gpu_state() == {"error": "NVML: GPU is lost"}
    part_of_one = SimpleNamespace(uuid="elsewhere")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: part_of_one)
    assert environment.gpu_state() == {"error": "NVML: Not Found"}


def test_our_own_mistake_in_a_question_is_no_silence_of_the_driver(monkeypatch):
    fake_nvml.install(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        nvml.ask(lambda: 1 / 0)
