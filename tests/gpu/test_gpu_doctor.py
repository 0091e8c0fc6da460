"""The probe that sees a GPU."""

from moeexp import probes


def test_torch_sees_the_gpu():
    finding = probes.run("torch")
    assert finding.verdict == "ok" and "CUDA" in finding.detail, finding
