"""The machine while it is timed: the GPU's clocks, power, temperature and reasons for slowing down; a CPU's load and
frequency. Sampled by a thread a few times a second, so that the timed thread does not notice. And, over the whole of the
timing, how much work other processes did on the same cores."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
from moeexp_runner import nvml

from moeexp.record import cpus

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

# Times of a CPU in which it worked or, in a virtual machine, was given to another one. What guests use is part of user's.
WORK = ("user", "nice", "system", "irq", "softirq", "steal")
ONLINE = Path("/sys/devices/system/cpu/online")

Sensor = Callable[[], dict[str, float]]


class Telemetry:
    """What was read, in the order of time. `summary` is the record's `telemetry`."""

    def __init__(self, kind: str, read: Sensor):
        self.kind, self._read = kind, read
        self.samples: list[dict[str, float]] = []
        self.error: str | None = None
        self.other_load: dict[str, float] | None = None
        self._start = time.monotonic()

    def sample(self) -> None:
        try:
            found = self._read()
            if found:
                self.samples.append({"t_s": round(time.monotonic() - self._start, 3)} | found)
        except Exception as error:  # the timing goes on, and the record says why
            self.error = f"{type(error).__name__}: {error}"

    def summary(self) -> dict[str, Any] | None:
        """{kind, n, interval_s, <quantity>: {min, median, max}, throttle_reasons, other_load, samples}; None where nothing
        can be read."""
        others = {"other_load": self.other_load} if self.other_load else {}
        if not self.samples:
            found = others | ({"error": self.error} if self.error else {})
            return {"kind": self.kind, "n": 0} | found if found else None
        names = [name for name in self.samples[0] if name not in ("t_s", "reasons")]
        result: dict[str, Any] = {"kind": self.kind, "n": len(self.samples), "interval_s": INTERVAL_S}
        for name in names:
            values = [sample[name] for sample in self.samples if name in sample]
            result[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
        if "reasons" in self.samples[0]:
            result["throttle_reasons"] = throttled(int(sample["reasons"]) for sample in self.samples)
        step = -(-len(self.samples) // MAX_SAMPLES)
        return result | others | {"samples": self.samples[::step]} | ({"error": self.error} if self.error else {})


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
    before = CpuTime.now()
    try:
        yield telemetry
    finally:
        telemetry.other_load = before.others_until(CpuTime.now())
        ended.set()
        thread.join()
        telemetry.sample()


@dataclass(frozen=True)
class CpuTime:
    """Seconds: of the clock, of work on the cores that this process may use, and of this process's own work (any thread)."""

    clock: float
    work: float | None
    own: float
    cores: int

    @classmethod
    def now(cls) -> CpuTime:
        cores = cpus.usable()
        return cls(time.monotonic(), work_on(cores), time.process_time(), len(cores))

    def others_until(self, end: CpuTime) -> dict[str, float] | None:
        """{cores, of}: how many cores' worth of work other processes did, of how many cores; None where it is not known."""
        seconds, own = end.clock - self.clock, end.own - self.own
        if self.work is None or end.work is None or seconds <= 0 or self.cores != end.cores:
            return None
        work = end.work - self.work
        if work < own / 2:  # counters that miss our own work would miss that of others
            return None
        return {"cores": round(max(work - own, 0.0) / seconds, 3), "of": self.cores}


def work_on(cores: Sequence[int]) -> float | None:
    """Seconds since the machine started in which one of these cores worked. None where the system does not tell. A
    container's quota is not seen."""
    try:
        times = psutil.cpu_times(percpu=True)
    except OSError:  # a container hides it
        return None
    # A CPU that is switched off is not listed, and moves those behind it.
    moved = ONLINE.is_file() and ONLINE.read_text().strip() not in ("0", f"0-{len(times) - 1}")
    if not cores or max(cores) >= len(times) or moved:
        return None
    return sum(getattr(times[core], name, 0.0) for core in cores for name in WORK)


def gpu_reader() -> Sensor:
    """Of the GPU that torch calls 0."""
    handles: list[Any] = []

    def read() -> dict[str, float]:
        if not handles:
            handles.append(nvml.handle_of(0))
        return read_gpu(handles[0])

    return read


def read_gpu(gpu: Any) -> dict[str, float]:
    found = {name: read(gpu) for name, read in nvml.READINGS.items()}
    return found | {"reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)}


def read_cpu(frequency: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")) -> dict[str, float]:
    """Load average over a minute; MHz of the first CPU where Linux tells. psutil asks every CPU, which disturbs them: only
    where there is no such file, and it reads the kernel's list."""
    found = {"load": os.getloadavg()[0]}
    if frequency.is_file():
        return found | {"mhz": int(frequency.read_text()) / 1e3}
    listed = psutil.cpu_freq(percpu=True)
    return found | ({"mhz": listed[0].current} if listed else {})
