"""The machine while it is timed: the GPU's clocks, power, temperature and reasons for slowing down; a CPU's load and
frequency. Sampled by a thread a few times a second, so that the timed thread does not notice."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

INTERVAL_S = 0.1
MAX_SAMPLES = 200  # kept in the record, evenly chosen; statistics are over all

# NVML's bits. Idle and the application's own clock setting are no throttling.
REASONS = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
}

Reader = Callable[[], dict[str, float]]


class Telemetry:
    """What was read, in the order of time. `summary` is the record's `telemetry`."""

    def __init__(self, kind: str, read: Reader):
        self.kind, self._read = kind, read
        self.samples: list[dict[str, float]] = []
        self.error: str | None = None
        self._start = time.monotonic()

    def sample(self) -> None:
        try:
            found = self._read()
            if found:
                self.samples.append({"t_s": round(time.monotonic() - self._start, 3)} | found)
        except Exception as error:  # NVML's, whose module may be absent; the timing goes on, and the record says why
            self.error = f"{type(error).__name__}: {error}"

    def summary(self) -> dict[str, Any] | None:
        """{kind, n, interval_s, <quantity>: {min, median, max}, throttle_reasons, samples}; None where nothing can be read."""
        if not self.samples:
            return None if self.error is None else {"kind": self.kind, "n": 0, "error": self.error}
        names = [name for name in self.samples[0] if name not in ("t_s", "reasons")]
        result: dict[str, Any] = {"kind": self.kind, "n": len(self.samples), "interval_s": INTERVAL_S}
        for name in names:
            values = [sample[name] for sample in self.samples if name in sample]
            result[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        if "reasons" in self.samples[0]:
            result["throttle_reasons"] = throttled(int(sample["reasons"]) for sample in self.samples)
        step = -(-len(self.samples) // MAX_SAMPLES)
        return result | {"samples": self.samples[::step]} | ({"error": self.error} if self.error else {})


def throttled(bits: Iterator[int]) -> dict[str, float]:
    """Reason -> share of the samples in which it held."""
    seen = list(bits)
    shares = {name: sum(bool(value & bit) for value in seen) / len(seen) for bit, name in REASONS.items()}
    return {name: round(share, 3) for name, share in shares.items() if share}


@contextmanager
def watch(device: str) -> Iterator[Telemetry]:
    """Samples while the block runs; `device` is `cpu` or `cuda`."""
    telemetry = Telemetry(device, gpu_reader() if device == "cuda" else read_cpu)
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(INTERVAL_S):
            telemetry.sample()

    thread = threading.Thread(target=loop, name="telemetry", daemon=True)
    telemetry.sample()
    thread.start()
    try:
        yield telemetry
    finally:
        ended.set()
        thread.join()
        telemetry.sample()


def gpu_reader() -> Reader:
    """Of the GPU that torch calls 0. Reads nothing where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return dict
    import torch

    uuid = "GPU-" + str(torch.cuda.get_device_properties(0).uuid)
    handles: list[Any] = []

    def read() -> dict[str, float]:
        if not handles:
            pynvml.nvmlInit()
            handles.append(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        return read_gpu(pynvml, handles[0])

    return read


def read_gpu(nvml: ModuleType, handle: Any) -> dict[str, float]:
    return {
        "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    }


def read_cpu(frequency: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")) -> dict[str, float]:
    """Load average over a minute; MHz where Linux tells."""
    found = {"load": os.getloadavg()[0]}
    if frequency.is_file():
        return found | {"mhz": int(frequency.read_text()) / 1e3}
    info = Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if line.startswith("cpu MHz")] if info.is_file() else []
    return found | ({"mhz": float(lines[0].split(":")[1])} if lines else {})
