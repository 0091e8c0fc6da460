"""The machine while it is timed, with a GPU that is made up."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from moeexp.record import telemetry
from moeexp.record.telemetry import CpuTime, Telemetry, gpu_reader, read_cpu, read_gpu, throttled, watch, work_on

NVML = SimpleNamespace(
    NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
    nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980, 2: 2619}[kind],
    nvmlDeviceGetPowerUsage=lambda handle: 350_500,
    nvmlDeviceGetTemperature=lambda handle, kind: 61,
    nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4 | 0x1,
)  # fmt: skip


def test_a_gpu_s_state_is_read_in_our_units():
    expected = {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.5, "temperature_c": 61, "reasons": 5}
    assert read_gpu(NVML, None) == expected


def test_reasons_are_shares_of_the_samples():
    assert throttled(iter([0x4, 0x4 | 0x40, 0x1, 0x0])) == {"software power cap": 0.5, "hardware thermal slowdown": 0.25}
    assert throttled(iter([0x1, 0x0])) == {}


def test_summary():
    values = iter([(1000, 0x4), (1200, 0x0), (1100, 0x0)])

    def read():
        clock, reasons = next(values)
        return {"sm_mhz": clock, "reasons": reasons}

    found = Telemetry("cuda", read)
    for _ in range(3):
        found.sample()
    summary = found.summary()
    assert summary["n"] == 3 and summary["sm_mhz"] == {"min": 1000, "median": 1100, "max": 1200}
    assert summary["throttle_reasons"] == {"software power cap": 0.333}
    assert [sample["sm_mhz"] for sample in summary["samples"]] == [1000, 1200, 1100]


def test_few_samples_are_kept_of_many():
    found = Telemetry("cpu", lambda: {"load": 1.0})
    for _ in range(1001):
        found.sample()
    assert found.summary()["n"] == 1001 and len(found.summary()["samples"]) <= telemetry.MAX_SAMPLES


def test_what_cannot_be_read_is_said_and_stops_nothing():
    def fails():
        raise OSError("no driver")

    with_error = Telemetry("cuda", fails)
    with_error.sample()
    assert with_error.summary() == {"kind": "cuda", "n": 0, "error": "OSError: no driver"}


def test_without_nvidia_ml_py_there_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = Telemetry("cuda", gpu_reader())
    found.sample()
    assert found.summary() is None


def test_a_cpu_s_load_and_frequency(tmp_path):
    file = tmp_path / "freq"
    file.write_text("2600000\n")
    found = read_cpu(file)
    assert found["mhz"] == 2600 and found["load"] >= 0
    assert read_cpu(tmp_path / "missing")["load"] >= 0


def test_it_samples_while_the_block_runs_and_not_after(monkeypatch):
    monkeypatch.setattr(telemetry, "INTERVAL_S", 0.01)
    start = time.monotonic()
    with pytest.raises(KeyError), watch("cpu") as found:
        time.sleep(0.2)
        while len(found.samples) < 5:  # on a busy machine a thread waits for its turn
            assert time.monotonic() < start + 60, "it does not sample"
            time.sleep(0.01)
        raise KeyError
    count, elapsed = len(found.samples), time.monotonic() - start
    assert not any(thread.name == "telemetry" for thread in threading.enumerate())
    times = [sample["t_s"] for sample in found.samples]
    assert count <= elapsed / 0.01 + 2 and times == sorted(times) and 0.2 <= times[-1] <= elapsed + 0.001
    time.sleep(0.05)
    assert len(found.samples) == count


STAT = """cpu  900 0 100 9000 50 0 0 20 0 0
cpu0 400 0 50 4500 25 1 2 10 7 0
cpu1 500 0 50 4500 25 0 0 10 0 0
intr 5 0
"""


def test_work_is_all_but_idling_on_the_cores_that_are_ours(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(STAT)
    tick = 1 / telemetry.os.sysconf("SC_CLK_TCK")
    assert work_on([0], stat) == pytest.approx(463 * tick) and work_on([0, 1], stat) == pytest.approx(1023 * tick)
    assert work_on([2], stat) is None and work_on([], stat) is None and work_on([0], tmp_path / "missing") is None


def test_the_load_of_others_is_what_is_not_our_own():
    start = CpuTime(clock=10.0, work=100.0, own=5.0, cores=4)
    assert start.others_until(CpuTime(12.0, 107.0, 8.0, 4)) == {"cores": 2.0, "of": 4}
    assert start.others_until(CpuTime(12.0, 102.9, 8.0, 4)) == {"cores": 0.0, "of": 4}
    for unknown in (CpuTime(12.0, None, 8.0, 4), CpuTime(12.0, 101.0, 8.0, 4), CpuTime(12.0, 107.0, 8.0, 2)):
        assert start.others_until(unknown) is None


@pytest.mark.skipif(not telemetry.Path("/proc/stat").is_file(), reason="Linux tells it")
def test_another_process_is_seen_and_our_own_work_is_not():
    def burn(seconds):
        start = time.process_time()
        while time.process_time() - start < seconds:
            pass

    with watch("cpu") as quiet:
        burn(0.5)
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        # The child's own count is taken within the machine's: what it works in between is in both.
        start, before = CpuTime.now(), telemetry.Path(f"/proc/{child.pid}/stat").read_text().split()
        time.sleep(1)
        after, end = telemetry.Path(f"/proc/{child.pid}/stat").read_text().split(), CpuTime.now()
    finally:
        child.kill()
        child.wait()
    if quiet.other_load is None or (busy := start.others_until(end)) is None:
        pytest.skip("the counters of this machine do not hold our own work")
    assert quiet.summary()["other_load"]["cores"] < len(telemetry.os.sched_getaffinity(0))
    used = (int(after[13]) - int(before[13])) / telemetry.os.sysconf("SC_CLK_TCK") / (end.clock - start.clock)
    assert busy["cores"] > used - 0.1
