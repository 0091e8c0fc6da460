"""A driver that is made up: NVML as pynvml asks it, over the GPUs that a test lists."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import torch

VALUES = {
    "nvmlDeviceGetClockInfo": {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 2619}.__getitem__,
    "nvmlDeviceGetPowerUsage": lambda: 350_500,
    "nvmlDeviceGetPowerManagementLimit": lambda: 700_000,
    "nvmlDeviceGetTemperature": {pynvml.NVML_TEMPERATURE_GPU: 61}.__getitem__,
    "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: 0x4 | 0x1,
    "nvmlDeviceGetTotalEnergyConsumption": lambda: 2500,
    "nvmlDeviceGetMemoryInfo": {pynvml.nvmlMemory_v2: SimpleNamespace(used=(3 << 20) + 5)}.__getitem__,
}


@dataclass
class FakeGpu:
    uuid: str
    name: str = "A"
    processes: int = 0
    fails: dict[str, int] = field(default_factory=dict)  # function -> NVML's error

    def ask(self, function, *arguments):
        if function in self.fails:
            raise pynvml.NVMLError(self.fails[function])
        return VALUES[function](*arguments)


def install(monkeypatch, *gpus, error=None):
    """`error`: NVML's, where there is no driver. torch's first GPU is the first of these."""

    def start():
        if error is not None:
            raise pynvml.NVMLError(error)

    def by_uuid(uuid):
        for gpu in gpus:
            if gpu.uuid == uuid:
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    functions = {
        "nvmlInit": start,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetName": lambda gpu: gpu.name,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [object()] * gpu.processes,
    }
    for function in VALUES:
        functions[function] = lambda gpu, *arguments, function=function: gpu.ask(function, *arguments)
    for name, function in functions.items():
        assert hasattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, function)
    if gpus:
        known = SimpleNamespace(uuid=gpus[0].uuid.removeprefix("GPU-"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
