"""The allocator is chosen in the environment, before torch is there."""

import dataclasses
import subprocess
import sys

import pytest

from moeexp.config.compose import compose
from moeexp.stack import allocator


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (allocator.VARIABLE, allocator.GENERAL):
        monkeypatch.delenv(name, raising=False)


def test_the_default_needs_nothing():
    assert allocator.environment_of("native") == {}
    assert allocator.environment_of("cuda_malloc_async") == {allocator.VARIABLE: "backend:cudaMallocAsync"}


def test_what_else_is_set_is_kept_and_a_backend_is_replaced(monkeypatch):
    monkeypatch.setenv(allocator.VARIABLE, "expandable_segments:True, backend:native")
    monkeypatch.setenv(allocator.GENERAL, "max_split_size_mb:64")
    assert allocator.environment_of("cuda_malloc_async") == {
        allocator.VARIABLE: "backend:cudaMallocAsync,expandable_segments:True",
        allocator.GENERAL: "backend:cudaMallocAsync,max_split_size_mb:64",
    }
    monkeypatch.setenv(allocator.VARIABLE, "backend:cudaMallocAsync")
    monkeypatch.delenv(allocator.GENERAL)
    assert allocator.environment_of("native") == {allocator.VARIABLE: "backend:native"}


def test_a_run_sets_it_before_torch_is_imported():
    code = (
        "import os, sys\n"
        "from moeexp.stack import allocator\n"
        "from moeexp.config.compose import compose\n"
        "assert 'torch' not in sys.modules\n"
        "allocator.prepare(compose(['allocator=cuda_malloc_async']))\n"
        "print(os.environ['PYTORCH_CUDA_ALLOC_CONF'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "backend:cudaMallocAsync"


def test_a_process_with_another_allocator_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    config = dataclasses.replace(compose(["allocator=cuda_malloc_async"]), device="cuda")
    with pytest.raises(RuntimeError, match="backend:cudaMallocAsync"):
        allocator.check(config)
    allocator.check(dataclasses.replace(config, allocator="native"))
    allocator.check(dataclasses.replace(config, device="cpu"))


def test_a_launch_gets_addresses_and_everything_else_as_it_is():
    import torch
    from moeexp_kernels.parts.launch import by_address

    class Launcher:
        def __call__(self, *arguments):
            self.got = arguments

    launcher, tensor, kernel = Launcher(), torch.zeros(4)[1:], object()
    by_address(Launcher)
    by_address(Launcher)
    launcher(1, 2, 3, kernel, tensor, 0.5, None)
    assert launcher.got == (1, 2, 3, kernel, tensor.data_ptr(), 0.5, None)
