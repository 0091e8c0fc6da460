"""The doctor finds what is set up wrong: each trap that can be set here is set, and must be seen."""

import json
import stat
import sys
import tomllib
from pathlib import Path

import fake_nvml
import pynvml
import pytest
import torch

from moeexp import doctor, probes
from moeexp.probes import Finding

ROOT = Path(__file__).resolve().parents[1]


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_links_dynamically_is_ok():
    finding = probes.run("static libstdc++")
    assert finding.verdict == "ok", finding


@pytest.mark.slow
def test_a_compiler_that_links_libstdcxx_statically_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "g++", '#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n'))
    finding = probes.run("static libstdc++")
    assert finding.verdict == "broken" and "statically" in finding.detail and "CXX=/usr/bin/g++" in finding.remedy


@pytest.mark.parametrize("text", [None, "#!/bin/sh\necho no such language >&2\nexit 1\n"])
def test_a_compiler_that_does_not_work_is_found(tmp_path, monkeypatch, text):
    path = tmp_path / "c++"
    monkeypatch.setenv("CXX", script(path, text) if text else str(path))
    finding = probes.run("static libstdc++")
    assert finding.verdict == "broken" and "compiles no shared object" in finding.detail
    assert ("no such language" in finding.detail) == bool(text)


def test_what_does_not_load_is_found(tmp_path, monkeypatch):
    lines = '#!/bin/sh\nfor last; do :; done\nprintf "libstdc++.so and no library" > "$last"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", lines))
    finding = probes.run("static libstdc++")
    assert finding.verdict == "broken" and "does not load" in finding.detail


def test_a_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "new"))
    assert probes.run("cache folder").verdict == "ok"
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "file"))
    finding = probes.run("cache folder")
    assert finding.verdict == "broken" and "MOEEXP_CACHE_DIR" in finding.remedy
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(probes, "LEAST_FREE", 1 << 60)
    assert probes.run("cache folder").verdict == "warning"


@pytest.mark.slow
def test_a_kernels_package_that_is_not_the_hubs_is_found(tmp_path, monkeypatch):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version  # what transformers would use

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    metadata = tmp_path / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = doctor.probe("package names")
    assert finding.verdict == "broken" and str(tmp_path / "kernels") in finding.detail


def test_two_installations_are_found(tmp_path, monkeypatch):
    (tmp_path / "moeexp_runner").mkdir()
    (tmp_path / "moeexp_runner" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = doctor.probe("package names")
    assert finding.verdict == "broken" and "two installations" in finding.detail


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [("triton", "triton"), ("hqq", "hqq")])
def test_a_broken_import_is_found(tmp_path, monkeypatch, module, name):
    (tmp_path / f"{module}.py").write_text("raise ImportError('libsomething.so: cannot open')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = doctor.probe(name)
    assert finding.verdict == "broken" and "cannot open" in finding.detail


def test_a_probe_that_crashes_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", "#!/bin/sh\nkill -SEGV $$\n"))
    finding = doctor.probe("torch")
    assert finding.verdict == "broken" and finding.detail == "killed by SIGSEGV"


def test_torch_of_the_supported_range():
    requirement = f"torch>={'.'.join(map(str, probes.TORCH[0]))},<{'.'.join(map(str, probes.TORCH[1]))}"
    assert requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert probes.run("torch").verdict in ("ok", "warning")


@pytest.mark.parametrize(("version", "broken"), [("2.10.1", True), ("2.11.0+cu130", False), ("2.15.0", True)])
def test_torch_out_of_range(monkeypatch, version, broken):
    monkeypatch.setattr(torch, "__version__", version)
    assert (probes.run("torch").verdict == "broken") == broken


@pytest.mark.parametrize("cuda, remedy", [(None, "wheel for CUDA"), ("13.0", "CUDA_VISIBLE_DEVICES")])
def test_a_gpu_that_torch_does_not_see(monkeypatch, cuda, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    fake_nvml.install(monkeypatch, fake_nvml.FakeGpu("GPU-ab"))
    finding = probes.run("torch")
    assert finding.verdict == "warning" and remedy in finding.remedy
    fake_nvml.install(monkeypatch, error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    finding = probes.run("torch")
    assert finding.verdict == "warning" and ("RM has detected an NVML/RM version mismatch" in finding.detail) == bool(cuda)
    for nothing in ({}, {"error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}):
        fake_nvml.install(monkeypatch, **nothing)
        assert probes.run("torch").verdict == "ok"


def answers(monkeypatch, **verdicts):
    findings = {name: Finding(verdicts.get(name, "ok"), f"about {name}", "do [this]") for name in probes.PROBES}
    monkeypatch.setattr(doctor, "probe", findings.__getitem__)


def test_json_and_exit_codes(monkeypatch, capsys):
    answers(monkeypatch, triton="broken", hqq="warning")
    assert doctor.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["broken"] == ["triton"] and [probe["name"] for probe in told["probes"]] == list(probes.PROBES)
    assert told["versions"]["torch"] and told["versions"]["CXX"] and told["versions"]["wandb runs"]
    answers(monkeypatch, hqq="warning", torch="warning")
    assert doctor.main(["--json"]) == 0


def test_the_table_says_what_to_do(monkeypatch, capsys):
    answers(monkeypatch, triton="broken")
    monkeypatch.setenv("COLUMNS", "160")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "about triton" in out and "do [this]" in out and out.endswith("broken: triton\n")


def test_an_unknown_argument_is_one_line(capsys):
    assert doctor.main(["--banana"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--banana" in line and "python -m moeexp.doctor --help" in line
