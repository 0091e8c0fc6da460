"""The probe that needs a GPU, and the others beside one."""

from moeexp import doctor, probes


def test_capture_of_a_package_is_ok():
    finding = doctor.probe("capture of AOTInductor")
    assert finding.verdict == "ok", finding


def test_torch_sees_the_gpu():
    finding = probes.run("torch")
    assert finding.verdict == "ok" and "CUDA" in finding.detail, finding
