"""The machine while it is timed, with a GPU that is made up."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import fake_nvml
import psutil
import pynvml
import pytest

from moeexp.record import telemetry
from moeexp.record.telemetry import CpuTime, Telemetry, gpu_reader, read_cpu, throttled, watch, work_on


def test_a_gpu_s_state_is_read_in_our_units(monkeypatch):
    fake_nvml.install(monkeypatch, fake_nvml.FakeGpu("GPU-ab"))
    expected = {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.5, "temperature_c": 61, "reasons": 5}
    assert gpu_reader()() == expected


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


def test_without_a_driver_the_summary_says_so(monkeypatch):
    fake_nvml.install(monkeypatch, error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    found = Telemetry("cuda", gpu_reader())
    found.sample()
    error = "NVMLError_LibraryNotFound: NVML Shared Library Not Found"
    assert found.summary() == {"kind": "cuda", "n": 0, "error": error}


def test_a_cpu_s_load_and_frequency(tmp_path):
    file = tmp_path / "freq"
    file.write_text("2600000\n")
    found = read_cpu(file)
    assert found["mhz"] == 2600 and found["load"] >= 0
    assert read_cpu(tmp_path / "missing")["load"] >= 0


@pytest.mark.parametrize("listed, mhz", [([2600.5, 800.0], 2600.5), ([], None)])
def test_the_frequency_where_there_is_no_file_of_the_first_cpu(monkeypatch, tmp_path, listed, mhz):
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: [SimpleNamespace(current=one) for one in listed if percpu])
    assert read_cpu(tmp_path / "missing").get("mhz") == mhz


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


TWO = [
    SimpleNamespace(user=4.0, nice=0.0, system=0.5, idle=45.0, iowait=0.25, irq=0.01, softirq=0.02, steal=0.1, guest=0.07),
    SimpleNamespace(user=5.0, nice=0.0, system=0.5, idle=45.0, iowait=0.25, irq=0.00, softirq=0.00, steal=0.1, guest=0.00),
]


def test_work_is_all_but_idling_on_the_cores_that_are_ours(monkeypatch, tmp_path):
    online = tmp_path / "online"
    monkeypatch.setattr(telemetry, "ONLINE", online)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: TWO)
    for listed in (None, "0-1\n"):
        if listed:
            online.write_text(listed)
        assert work_on([0]) == pytest.approx(4.63) and work_on([0, 1]) == pytest.approx(10.23)
        assert work_on([2]) is None and work_on([]) is None
    online.write_text("0,2\n")
    assert work_on([0]) is None, "the second that is listed is CPU 2"

    def hidden(percpu):
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", hidden)
    assert work_on([0]) is None


def test_the_load_of_others_is_what_is_not_our_own():
    start = CpuTime(clock=10.0, work=100.0, own=5.0, cores=4)
    assert start.others_until(CpuTime(12.0, 107.0, 8.0, 4)) == {"cores": 2.0, "of": 4}
    assert start.others_until(CpuTime(12.0, 102.9, 8.0, 4)) == {"cores": 0.0, "of": 4}
    for unknown in (CpuTime(12.0, None, 8.0, 4), CpuTime(12.0, 101.0, 8.0, 4), CpuTime(12.0, 107.0, 8.0, 2)):
        assert start.others_until(unknown) is None


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
        start, before = CpuTime.now(), psutil.Process(child.pid).cpu_times().user
        time.sleep(1)
        after, end = psutil.Process(child.pid).cpu_times().user, CpuTime.now()
    finally:
        child.kill()
        child.wait()
    if quiet.other_load is None or (busy := start.others_until(end)) is None:
        pytest.skip("the counters of this machine do not hold our own work")
    assert quiet.summary()["other_load"]["cores"] < len(telemetry.os.sched_getaffinity(0))
    used = (after - before) / (end.clock - start.clock)
    assert busy["cores"] > used - 0.1
