"""How many threads a run has, on machines that grant part of themselves: control groups of both versions as folders, affinity for
real. And that the choice reaches torch, Inductor, the processes of a sweep and the record."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import common  # noqa: F401  before any module of the packages
import pytest
import synthetic
import torch

from moeexp import cli
from moeexp.config import axes, threads
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.config.sources import load_architecture
from moeexp.config.threads import Choice, Grant, choose, cpu_quota, granted, physical_cores
from moeexp.config.validate import check_values
from moeexp.model.checkpoint import pieces
from moeexp.record import environment
from moeexp.record.record import plain
from moeexp.report.conditions import unlike
from moeexp.stack import artifact_config, artifact_key, artifact_manifest, inductor
from moeexp.stack.compile_cache import MethodSpec, key_of
from moeexp.stack.methods import torch_compiled
from moeexp.sweep import process

V2 = "31 23 0:28 / {mount} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n32 31 0:30 / /elsewhere rw - cgroup cgroup rw,cpuset\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Of 64 cores with two CPUs each, without limits until a test sets some."""
    for name in (threads.OWN, threads.OPENMP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(128)))
    for cpu in range(128):
        topology = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 64},{cpu % 64 + 64}\n")
    monkeypatch.setattr(threads.physical_cores, "__defaults__", (tmp_path / "cpu",))
    monkeypatch.setattr(threads.cpu_quota, "__defaults__", (tmp_path / "proc",))
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder):
        self.proc, self.mount = folder / "proc", folder / "sys fs" / "cgroup"
        self.proc.mkdir()

    def mounts(self, text, cgroup, root="/"):
        mount = str(self.mount).replace(" ", "\\040")
        (self.proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + text.format(mount=mount, root=root))
        (self.proc / "cgroup").write_text(cgroup)

    def group(self, path="", **files):
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"cpu.{name}").write_text(f"{text}\n")


def test_without_limits_it_is_what_the_affinity_says(machine):
    assert granted() == Grant(cpus=128, physical=64, quota=None, own=None)
    assert (granted().cores, granted().threads) == (128, 64)


def test_a_container_that_may_use_2_of_64_cores(machine):
    machine.mounts(V2, "0::/\n")
    machine.group(max="200000 100000")
    assert granted().quota == 2 and (granted().cores, granted().threads) == (2, 2)


@pytest.mark.parametrize(
    ("text", "quota", "cores"),
    [
        ("max 100000", None, 128), ("150000 100000", 1.5, 1), ("50000 100000", 0.5, 1), ("250000 100000", 2.5, 2),
        ("300000 50000", 6.0, 6), ("99900000 100000", 999.0, 128),
    ],
)  # fmt: skip
def test_a_quota_is_rounded_down_to_whole_cores_and_to_one_at_least(machine, text, quota, cores):
    machine.mounts(V2, "0::/a\n")
    machine.group("a", max=text)
    assert (cpu_quota(), granted().cores) == (quota, cores)


@pytest.mark.parametrize(
    "outer, middle, inner", [("max", 300_000, "max"), (300_000, "max", 800_000), (900_000, 700_000, 300_000)]
)
def test_the_tightest_of_nested_groups_counts(machine, outer, middle, inner):
    machine.mounts(V2, "0::/slice/pod/container\n")
    machine.group("slice", max=f"{outer} 100000")
    machine.group("slice/pod", max=f"{middle} 100000")
    machine.group("slice/pod/container", max=f"{inner} 100000")
    machine.group("slice/other", max="100000 100000")
    assert cpu_quota() == 3


def test_version_1_and_both_at_once(machine):
    machine.mounts(V1, "9:cpuset:/x\n4:cpu,cpuacct:/pod/c\n0::/unlimited\n")
    machine.group("pod", cfs_quota_us=400_000, cfs_period_us=100_000)
    machine.group("pod/c", cfs_quota_us=-1, cfs_period_us=100_000)
    assert cpu_quota() == 4
    machine.group("pod/c", cfs_quota_us=150_000)
    assert cpu_quota() == 1.5


@pytest.mark.parametrize("root, path", [("/docker/c0", "/docker/c0/job"), ("/docker/c0", "/elsewhere"), ("/", "/not/there")])
def test_inside_a_container_the_host_s_path_is_not_a_folder(machine, root, path):
    machine.mounts(V1, f"4:cpu,cpuacct:{path}\n", root=root)
    machine.group("", cfs_quota_us=200_000, cfs_period_us=100_000)
    if path.endswith("job"):
        machine.group("job", cfs_quota_us=100_000, cfs_period_us=100_000)
    assert cpu_quota() == (1 if path.endswith("job") else 2)


def test_affinity_and_quota_and_cores_of_two_cpus(machine, monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 64, 65})
    assert (granted().cores, granted().threads) == (4, 2), "0 and 64 are one core"
    machine.mounts(V2, "0::/\n")
    machine.group(max="300000 100000")
    assert (granted().cores, granted().threads) == (3, 2)
    monkeypatch.setenv(threads.OWN, "1")
    assert (granted().cores, granted().threads) == (1, 1)


def test_where_linux_does_not_tell_each_cpu_is_a_core(tmp_path):
    assert physical_cores([0, 3, 7], tmp_path) == 3 and cpu_quota(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux tells it")
def test_a_real_affinity():
    """That of `taskset`, and of a cpuset: the kernel takes what a cpuset leaves out from every affinity."""
    code = "\n".join([
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
        "from moeexp.config import threads; print(threads.granted().cores)",
    ])  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def adopted(overrides):
    return artifact_config.adopt(compose(overrides), overrides)


MODELS = {"nano": 1, "tiny": 1, "small": 26, "qwen3_5_35b_a3b": 64}


@pytest.mark.parametrize("model", MODELS)
def test_as_many_as_the_model_feeds_of_those_that_are_granted(machine, model):
    arch = load_architecture(compose([f"model={model}"]).model)
    found = choose("auto", arch)
    assert found.number == MODELS[model] and found.why.startswith("auto: ")
    machine.mounts(V2, "0::/\n")
    machine.group(max="200000 100000")
    assert choose("auto", arch).number == min(MODELS[model], 2)


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_a_token_multiplies(model):
    """Every matrix of the model, of the experts those that are chosen, and the embedding only as the head."""
    arch = load_architecture(compose([f"model={model}"]).model)
    total = 0
    for name, parts in pieces(arch).items():
        size = sum(math.prod(part.shape) for part in parts if len(part.shape) > 1 and 1 not in part.shape[1:])
        if name.endswith(("moe.gate_up.weight", "moe.down.weight")):
            size = size * arch.num_experts_per_tok // arch.num_experts
        total += 0 if name == "embed_tokens.weight" and not arch.tie_word_embeddings else size
    assert arch.weights_per_token == total


def test_the_config_wins_over_openmp_and_that_over_auto(machine, monkeypatch):
    arch = load_architecture(compose(["model=small"]).model)
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert choose("auto", arch) == Choice(5, "OMP_NUM_THREADS=5") and choose(3, arch) == Choice(3, "threads=3")
    for wrong in ("0", "many", "-1", "1.5", "100000"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS={wrong} is not a number of 1 to 1024: set one, or unset it"):
            choose("auto", arch)


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "true", "many", "null", "2000", "'2'"])
def test_what_threads_may_be(value):
    with pytest.raises(ValueError, match="allowed: auto, or a number of at least 1 and at most 1024"):
        check_values(compose([f"threads={value}"]))
    for right in ("auto", "1", "16"):
        check_values(compose([f"threads={right}"]))


def test_resolved_on_a_cpu_and_no_setting_on_a_gpu(machine):
    assert resolve(compose(["model=tiny"]), cuda_available=False).threads == 1
    assert resolve(compose(["model=tiny", "threads=7"]), cuda_available=False).threads == 7
    assert resolve(compose(["model=small"]), cuda_available=True).threads == "auto"


SPEC = MethodSpec("decode", {"ops": {}, "bits": 16, "dtype": "float32", "batch": 1, "max_seq_len": 64, "device": "cpu"})


def test_a_package_of_a_cpu_is_compiled_for_its_threads():
    """Inductor's loops keep partial results in arrays of as many: loaded by a process with more they would overflow."""
    before, keys = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert inductor.inductor_config(method="decode", device="cpu")["cpp.threads"] == number
            assert "cpp.threads" not in inductor.inductor_config(method="decode", device="cuda")
            keys.add(key_of(SPEC))
    finally:
        torch.set_num_threads(before)
    assert len(keys) == 3


@pytest.mark.parametrize("device, options", [("cpu", {"cpp.threads": 1}), ("meta", None)])
def test_torch_compile_writes_kernels_for_them_too(monkeypatch, device, options):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda module, **settings: seen.append(settings["options"]))
    model = SimpleNamespace(norm=torch.empty(1, device=device))
    torch_compiled(SimpleNamespace(model=model, name="decode"))
    assert seen == [options]


IN_A_PROCESS = """
import os
from moeexp.config.threads import Choice, apply
import torch
own = {"TORCHINDUCTOR_COMPILE_THREADS": "7"}
for number, device, given in ((3, "cpu", {}), (2, "cuda", {"MOEEXP_CORES": "1"}), (1, "cuda", own)):
    os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    os.environ.update(given)
    apply(Choice(number, ""), device)
    print(torch.get_num_threads(), os.environ["TORCHINDUCTOR_COMPILE_THREADS"])
"""


def test_it_sets_torch_and_the_number_of_compilers():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["3 1", "2 1", "1 7"], done.stderr


BEFORE_TORCH = (
    "import os, sys; from moeexp.config import threads; threads.prepare(); print('torch' in sys.modules, {v!r} in os.environ)"
)


@pytest.mark.parametrize(
    "first, given, set_", [("", {}, True), ("", {"OMP_WAIT_POLICY": "active"}, False), ("import torch; ", {}, False)]
)
def test_threads_sleep_soon_at_a_barrier_unless_the_user_says_how(first, given, set_):
    """Read once, when torch is loaded: set later it would be recorded and not be so."""
    clean = {name: value for name, value in os.environ.items() if name not in (threads.SPIN, threads.POLICY)}
    command = [sys.executable, "-c", first + BEFORE_TORCH.format(v=threads.SPIN)]
    done = subprocess.run(command, env=clean | given, capture_output=True, text=True)
    assert done.stdout.split() == [str(bool(first)), str(set_)], done.stderr


def test_runs_beside_each_other_share_the_cores(machine, tmp_path, monkeypatch):
    machine.mounts(V2, "0::/\n")
    machine.group(max="800000 100000")
    started = []
    monkeypatch.setattr(process.subprocess, "Popen", lambda command, env, **options: started.append(env))
    for at_once, share in ((1, 8), (2, 4), (3, 2), (16, 1)):
        process.Process(tmp_path / "jobs", tmp_path / "output", gpu=None, timeout_s=None, at_once=at_once)
        given = started[-1].get(threads.OWN)
        foreseen = resolve(compose(["model=small", "device=cpu"]), cuda_available=True, at_once=at_once).threads
        with monkeypatch.context() as patch:
            patch.setenv(threads.OWN, given or "128")
            assert granted().cores == share
            assert resolve(compose(["model=small", "device=cpu"]), cuda_available=True).threads == foreseen == share


def experiment(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True, "threads": torch.get_num_threads()})


@pytest.mark.parametrize(
    "given, number, why", [([], 1, "auto: "), (["threads=2"], 2, "threads=2"), (["threads=40"], 40, "threads=40")]
)
def test_a_run_has_them_and_says_so(machine, tmp_path, monkeypatch, given, number, why):
    monkeypatch.chdir(tmp_path)
    machine.mounts(V2, "0::/\n")
    machine.group(max="300000 100000")
    before = torch.get_num_threads()
    try:
        arguments = ["model=nano", "tracker=jsonl", "device=cpu", *given]
        assert cli.main(arguments, experiment=experiment) == 0
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.glob("outputs/*/*/record.json")
    record = json.loads(path.read_text())
    cpu = record["environment"]["cpu"]
    assert record["check"]["threads"] == cpu["torch_threads"] == record["config"]["threads"] == number
    assert cpu["waiting"] == {name: os.environ[name] for name in (threads.SPIN, threads.POLICY) if name in os.environ}
    assert (cpu["granted_cores"], cpu["quota"]) == (3, 3.0) and cpu["threads_from"].startswith(why)
    assert any("40 threads on 3 granted core(s)" in note for note in record["notes"]) is (number == 40)


def test_an_artifact_of_a_cpu_keeps_the_threads_that_it_was_compiled_for(tmp_path, monkeypatch):
    made = plain(resolve(compose(["model=nano", "threads=3"]), cuda_available=False))
    manifest = {"config": made, "model": {"weights": False, "heldout": False}}
    monkeypatch.setattr(artifact_manifest, "read_manifest", lambda folder: manifest)
    for module, name in ((artifact_key, "check"), (artifact_manifest, "check_integrity"), (artifact_manifest, "check_runnable")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    assert adopted([f"artifact={tmp_path}"]).threads == 3
    with pytest.raises(ValueError, match=r"threads=2 is not what artifact=.* was made with \(3\)"):
        adopted([f"artifact={tmp_path}", "threads=2"])
    made["device"], made["threads"] = "cuda", "auto"
    assert adopted([f"artifact={tmp_path}", "threads=2"]).threads == 2
    assert "threads" in axes.FIXED


def test_runs_that_share_a_process_share_its_threads():
    from moeexp.config.axes import shares_weights

    one, two = (shares_weights(compose(["model=nano", f"threads={number}"])) for number in (1, 2))
    assert one != two


def test_an_environment_without_a_run_chooses_nothing():
    assert environment.collect("cpu")["cpu"].keys() == {"name", "cores", "torch_threads"}


def test_workers_of_the_tests_are_the_cores_that_are_granted(monkeypatch):
    import conftest

    monkeypatch.setattr(threads, "granted", lambda: SimpleNamespace(cores=3))
    assert conftest.pytest_xdist_auto_num_workers(None) == 3
    assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"


def test_threads_of_a_gpu_s_host_are_no_condition_of_its_speed():
    records = [synthetic.record(device=device) for device in ("cpu", "cpu", "cuda", "cuda")]
    for record, number in zip(records, (1, 2, 1, 2), strict=True):
        record["environment"] = record["environment"] | {"cpu": {"name": "a CPU", "cores": 16, "torch_threads": number}}
    assert unlike(*records[:2]) == ["CPU threads: 1 / 2"] and unlike(*records[2:]) == []
