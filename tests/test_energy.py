"""Energy of decoding, with a GPU that is made up: its power, its counter that moves now and then, its clock."""

import fake_nvml
import pynvml
import pytest
import torch
from moeexp_runner import energy
from moeexp_runner.energy import of_decoding


class Gpu:
    """Watts of a prefill and of a decode step, their seconds, and what a generation takes besides. The counter shows what was
    taken until its last movement, every `period` seconds."""

    def __init__(self, monkeypatch, *, prefill=(400.0, 0.05), step=(250.0, 0.002), idle=(90.0, 0.001), period=0.1, start=7.03):
        self.now, self.joules, self.shown, self.period = start, 5000.0, 5000.0, period
        self.prefill, self.step, self.idle = prefill, step, idle
        self.generations = []
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(energy.time, "sleep", lambda seconds: self.run(self.idle[0], seconds))

    def run(self, watts, seconds):
        while seconds > 0:
            part = min(seconds, self.period - self.now % self.period + 1e-9)
            crossed = self.now // self.period != (self.now + part) // self.period
            self.now, self.joules, seconds = self.now + part, self.joules + watts * part, seconds - part
            if crossed:
                self.shown = self.joules

    def generate(self, new_tokens):
        self.generations.append(new_tokens)
        self.run(*self.idle)
        self.run(*self.prefill)
        self.run(self.step[0], self.step[1] * (new_tokens - 1))
        return new_tokens - 1

    def read(self):
        return self.shown


@pytest.mark.parametrize("period", [0.02, 0.1])
@pytest.mark.parametrize("new_tokens", [8, 32, 128, 4000])
@pytest.mark.parametrize("prefill", [(400.0, 0.005), (650.0, 0.05), (100.0, 0.3)])
def test_it_is_that_of_decoding_alone(monkeypatch, period, new_tokens, prefill):
    for seed in range(5):
        gpu = Gpu(monkeypatch, prefill=prefill, period=period, start=3.0 + 0.017 * seed)
        found = of_decoding(lambda n, gpu=gpu: 4 * gpu.generate(n), new_tokens, read=gpu.read)
        assert found["tokens"] == 4 * (new_tokens - 1)
        assert found["joules"] == pytest.approx(0.5 * (new_tokens - 1), abs=0.003 * found["joules_per_generation"])
        assert found["joules"] == found["joules_per_generation"] - found["joules_per_prefill"]
        assert set(gpu.generations) == {1, new_tokens} and found["seconds"] >= 2 * energy.SECONDS
        assert gpu.generations == [new_tokens] * found["generations"] + [1] * found["prefills"]


def test_the_pass_is_bounded(monkeypatch):
    gpu = Gpu(monkeypatch)
    begin = gpu.now
    assert of_decoding(gpu.generate, 32, read=gpu.read) is not None
    assert gpu.now - begin < 2 * (energy.SECONDS + energy.IDLE_S + 4 * gpu.period)


@pytest.mark.parametrize("readings", ["none", "stuck", "stuck later"])
def test_a_counter_that_does_not_tell_gives_nothing(monkeypatch, readings):
    gpu = Gpu(monkeypatch)
    read = {"none": None, "stuck": lambda: 5.0, "stuck later": lambda: min(gpu.shown, 5060.0)}[readings]
    begin = gpu.now
    assert of_decoding(gpu.generate, 32, read=read) is None
    assert gpu.now - begin < energy.SECONDS + 3 * energy.PATIENCE_S


def test_nothing_is_decoded_or_nothing_is_left(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert of_decoding(gpu.generate, 1, read=gpu.read) is None and gpu.generations == []
    free = Gpu(monkeypatch, step=(0.0, 0.002), prefill=(400.0, 0.0503))
    lower = {1: 1.0, 32: 0.5}

    def generate(new_tokens):
        free.run(400.0 * lower[new_tokens], 0.05)
        return new_tokens - 1

    assert of_decoding(generate, 32, read=free.read) is None, "not positive"
    stopped = Gpu(monkeypatch)
    assert of_decoding(lambda n: 0 * stopped.generate(n), 32, read=stopped.read) is None, "each ended at once"


def test_without_a_gpu_there_is_no_counter():
    assert energy.counter(torch.device("cpu")) is None


def test_the_counter_is_that_of_torch_s_gpu_in_joules(monkeypatch):
    gpu = fake_nvml.FakeGpu("GPU-ab")
    fake_nvml.install(monkeypatch, gpu, fake_nvml.FakeGpu("GPU-cd"))
    read = energy.counter(torch.device("cuda"))
    assert read is not None and read() == 2.5
    gpu.fails["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert energy.counter(torch.device("cuda")) is None
    fake_nvml.install(monkeypatch, error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert energy.counter(torch.device("cuda")) is None
