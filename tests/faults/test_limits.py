"""Numbers that no run can have, and models that no device here can hold: known to validation, by name and with the sum."""

import contextlib
import dataclasses
import math
import re
from types import SimpleNamespace

import pynvml
import pytest
from common import EVEN, ODD
from moeexp_runner.arena import Arena
from moeexp_runner.explicit import ExplicitState
from sabotage import experiment

from moeexp.cli import main
from moeexp.config import axes
from moeexp.config.compose import compose
from moeexp.config.memory_need import GIB, check_fits, need_of
from moeexp.config.resolve import resolve, resolved
from moeexp.config.validate import validate
from moeexp.model.qwen3_5_moe import state_shapes
from moeexp.record import free_memory
from moeexp.record.gpus import Gpu
from moeexp.record.record import read_record
from moeexp.stack.factory import build_model

BASE = ["model=nano", "tracker=jsonl", "export=eager"]
BEYOND = [
    "min_time_s=inf", "min_time_s=nan", "min_time_s=-1", "min_time_s=1e9", "repeats=100000000000000000000",
    "seed=18446744073709551616", "model.seed=18446744073709551616", "sampler.seed=-1", "batch=1000000000",
    "max_seq_len=1000000000000", "new_tokens=1000000000", "prompt_len=1000000000", "min_samples=1000000000",
    "loop_ahead=1000000000", "prefill_graph_lengths=[1000000000]", "prefill_graph_lengths=[8,0]", "sampler.temperature=inf",
    "sampler.temperature=0", "sampler.top_k=1000000000000", "sampler.top_p=1.5", "sampler.top_p=0", "quant.group_size=-64",
    "tracker.timeout_s=inf", "launcher.timeout_s=inf", "launcher.timeout_s=nan", "eval_bytes=1000000000000", "threads=100000",
]  # fmt: skip
# What bounds them instead: the vocabulary, the machine, the cells, names.
BOUNDED_OTHERWISE = {"prompt_ids", "launcher.gpus", "launcher.only", "quant.bits"}


@pytest.mark.parametrize("override", BEYOND)
def test_a_number_beyond_its_bounds_is_one_line(override):
    name, _, value = override.partition("=")
    with pytest.raises(ValueError) as caught:
        validate(compose([*BASE, override]), cuda_available=False)
    line, row = str(caught.value), axes.SETTINGS[name].axis
    assert line.startswith(f"{name}=") and f"at least {row.least} and at most {row.most}" in line and len(line) <= 400


def test_every_number_has_bounds():
    for path, row in axes.SETTINGS.items():
        if any(kind in str(row.kind) for kind in ("int", "float")) and path not in BOUNDED_OTHERWISE:
            least, most = row.axis.least, row.axis.most
            assert least is not None and most is not None and math.isfinite(most) and least < most, path


@pytest.mark.parametrize("value", ["1" + 20 * "0", "1" + 150 * "0"])
def test_a_cell_beyond_them_is_refused_and_its_record_can_be_read(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *BASE, f"repeats={value}", "seed=0"], experiment=experiment) == 0
    (path,) = tmp_path.rglob("record.json")
    record = read_record(path)
    assert record["status"] == "unsupported" and record["error"]["message"].startswith("repeats=1000")


CASES = [
    ["model=nano"],
    ["model=nano", "quant=none", "batch=3", "max_seq_len=97"],
    ["model=nano", "state=explicit", "dtype=bfloat16"],
    ["model=tiny", "quant=none"],
    ["model=tiny", "quant=int4", "state=explicit", "batch=2"],
    ["model=tiny", "quant=int8", "quant.skip=[embedding,router,shared_expert_gate,head,out_proj]"],
]


@pytest.mark.parametrize("overrides", CASES, ids=map(" ".join, CASES))
def test_weights_and_state_are_those_that_a_run_has(overrides):
    cfg = resolved(compose(overrides), cuda_available=False)
    model = build_model(cfg, SimpleNamespace(progress=_silent))
    assert need_of(cfg).weights == _weights_of(model)
    shapes = state_shapes(model.arch, batch=cfg.batch, max_seq_len=cfg.max_seq_len, dtype=model.embed_tokens.weight.dtype)
    arena = Arena(shapes, device="meta")
    assert need_of(cfg).state == (ExplicitState(arena) if cfg.state == "explicit" else arena).nbytes()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("arch", [EVEN, ODD], ids=["even", "odd"])
def test_of_shapes_that_agree_in_nothing_and_of_a_tied_head(arch, quant, tied):
    shapes = dataclasses.replace(arch, tie_word_embeddings=tied).to_hf()
    group = ["quant.group_size=4"] if quant == "int4" else []
    given = compose(["model=nano", f"quant={quant}", *group, "max_seq_len=128"])
    given.model.architecture = shapes
    given.model.tokenizer, given.prompt_len = "none", 8
    cfg = resolve(given, cuda_available=False)
    assert need_of(cfg).weights == _weights_of(build_model(cfg, SimpleNamespace(progress=_silent)))


def _weights_of(model):
    """As `moeexp.run.memory` counts them for a record."""
    return sum({buffer.data_ptr(): buffer.nbytes for buffer in model.buffers()}.values())


@contextlib.contextmanager
def _silent(what, *, total):
    yield lambda steps=1: None


LARGE = {"35b": "qwen3_5_35b_a3b", "122b": "qwen3_5_122b_a10b", "397b": "qwen3_5_397b_a17b"}
H100 = int(79.1 * GIB)


def large(name, *overrides):
    return resolve(compose([f"model={LARGE[name]}", "quant=int4", "device=cuda", *overrides]), cuda_available=True)


def test_what_fits_80_gb_and_what_does_not():
    for fits in (
        large("35b"),
        large("35b", "quant=none", "max_seq_len=8192"),
        large("122b"),
        large("122b", "max_seq_len=262144", "check=off"),
    ):
        check_fits(fits, lambda device: H100)
    with pytest.raises(ValueError) as caught:
        check_fits(large("397b"), lambda device: H100)
    line = str(caught.value)
    numbers = [float(number) for number in re.findall(r"(?:weights|state|workspace|=|needed,) ([\d.]+)", line)]
    weights, state, workspace, needed, available = numbers
    assert 195 < weights < 200 and needed == pytest.approx(weights + state + workspace, abs=0.1) and available == 79.1
    assert "on the GPU" in line and len(line) <= 400 and "quant=int4, " not in line


@pytest.mark.parametrize(
    "overrides, advice",
    [
        (["batch=65536"], "less than batch=65536"),
        (["max_seq_len=16777216", "batch=64"], "max_seq_len=16777216"),
        (["quant=none", "model.architecture.num_experts=4096"], "use quant=int4"),
        (["model.architecture.hidden_size=1048576", "quant=none"], "a smaller model"),
        (["model.architecture.num_hidden_layers=1024"], "a smaller model"),
        (["batch=4096", "prompt_len=1000000", "max_seq_len=16777216"], "less than prefill_chunk=8131"),
        (["batch=4096", "prompt_len=1000000", "max_seq_len=16777216", "dispatch=token_by_token"], "a shorter prompt"),
    ],
)
def test_sizes_that_no_machine_has(overrides, advice):
    given = compose(["model=qwen3_5_35b_a3b", "quant=int4", *overrides])
    with pytest.raises(ValueError, match="GiB needed, 79.1 GiB available") as caught:
        check_fits(resolved(given, cuda_available=False), lambda device: H100)
    assert advice in str(caught.value) and len(str(caught.value)) <= 400


def test_logits_and_activations_are_part_of_it():
    small, wide = (need_of(large("35b", f"batch={batch}", "prompt_len=512")) for batch in (1, 64))
    assert wide.workspace == 64 * small.workspace and small.workspace == 512 * (2048 + 12352 + 4096 + 16384) * 2
    assert need_of(large("35b", "prompt_len=512", "dispatch=token_by_token")).workspace == 248320 * 2


def test_where_the_device_does_not_tell_nothing_is_refused():
    check_fits(large("397b"), lambda device: None)


def test_a_run_and_a_dry_run_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(free_memory, "of_host", lambda: 1 << 20)
    assert main(["model=tiny", "tracker=jsonl"], experiment=experiment) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model=tiny quant=int4 does not fit: weights 0.003") and "available on this machine" in line
    grid = ["-m", *BASE, "quant=none,int4", "model=nano,tiny", "dry_run=true"]
    assert main([*grid, "check=off"], experiment=experiment) == 0
    shown = capsys.readouterr().out
    assert shown.count("does not fit: weights") == 3 and "1 to run" in shown and "0.0009766 GiB available" in shown
    assert main(grid, experiment=experiment) == 0
    shown = capsys.readouterr().out
    assert shown.count("GiB needed, 0.0009766 GiB available on this machine") == 4 and "0 to run" in shown
    assert "check=inline of 1 x 64 positions does not fit: weights" in shown, "the one that runs without"
    assert main(["-m", *BASE, "model=tiny", "seed=0,1"], experiment=experiment) == 0
    assert not (tmp_path / "ran").exists()
    assert sorted(read_record(path)["status"] for path in tmp_path.rglob("record.json")) == [
        "failed",
        "unsupported",
        "unsupported",
    ]


def control_group(folder, controllers, group, **files):
    (folder / "proc").mkdir()
    kind = "cgroup2 cgroup2 rw" if controllers == "" else f"cgroup cgroup rw,{controllers}"
    (folder / "proc" / "mountinfo").write_text(f"33 31 0:29 / {folder} rw,relatime - {kind}\n")
    (folder / "proc" / "cgroup").write_text(f"0:{controllers}:/{group}\n")
    (folder / group).mkdir()
    for name, text in files.items():
        (folder / group / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_container_has_what_its_limit_leaves(tmp_path):
    stat = "anon 100\ninactive_file 300\nactive_file 50"
    control_group(tmp_path, "", "pod", memory__max=10_000, memory__current=1000, memory__stat=stat)
    assert free_memory.of_host(tmp_path / "proc") == 10_000 - 1000 + 350, "files that were read give way"
    (tmp_path / "pod" / "memory.max").write_text("max\n")
    assert free_memory.of_host(tmp_path / "proc") > 1 << 20, "no limit: what the machine has"


def test_a_container_of_the_first_version(tmp_path):
    stat = "total_inactive_file 300"
    control_group(tmp_path, "memory", "pod", memory__limit_in_bytes=9000, memory__usage_in_bytes=9400, memory__stat=stat)
    assert free_memory.of_host(tmp_path / "proc") == 0
    (tmp_path / "pod" / "memory.usage_in_bytes").write_text("5000\n")
    assert free_memory.of_host(tmp_path / "proc") == 4300


def test_of_several_gpus_the_one_with_most_counts(monkeypatch):
    left = {"GPU-a": 5, "GPU-b": 9}
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr("pynvml.nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(free=left[handle]))
    assert free_memory.of_gpus([Gpu(0, "GPU-a", ""), Gpu(1, "GPU-b", "")]) == 9

    def part_of_a_gpu(uuid):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)

    monkeypatch.setattr("pynvml.nvmlDeviceGetHandleByUUID", part_of_a_gpu)
    assert free_memory.of_gpus([Gpu(0, "MIG-a", "")]) is None
