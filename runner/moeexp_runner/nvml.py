"""What NVIDIA's driver tells of its GPUs through its library NVML, without CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")
PATIENCE_S = 10.0  # calls hang for minutes where a driver is in trouble

# NVML's handle of a GPU -> a number in the unit of its name. `NVMLError` where the GPU does not tell.
READINGS: dict[str, Callable[[Any], float]] = {
    "sm_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "memory_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
    "power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
}


def ask(question: Callable[[], T]) -> T:
    """What it answers with NVML started. `RuntimeError` where there is no driver, or none that answers."""
    answer: Future[T] = Future()

    def put() -> None:
        try:
            pynvml.nvmlInit()
            answer.set_result(question())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=put, name="nvml", daemon=True).start()
    try:
        return answer.result(PATIENCE_S)
    except TimeoutError:
        raise RuntimeError(f"NVML does not answer within {PATIENCE_S:g} s") from None
    except pynvml.NVMLError as error:
        raise RuntimeError(f"NVML: {error}") from error


def handle_of(device: Any) -> Any:
    """NVML's handle of a GPU of torch's, `cuda:0` or its number. `NVMLError` where there is none."""
    import torch

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
