"""Cells: the quick composition against Hydra's own, designs, what is refused, and the time that a thousand take."""

import time
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from moeexp.cli import main
from moeexp.config import axes, compose, resolve, schema, validate
from moeexp.record.record import plain
from moeexp.report.runs import flatten
from moeexp.sweep import cells, hydra_plugins
from moeexp.sweep.history import History


@pytest.fixture(scope="module")
def composer():
    schema.register()
    hydra_plugins.register()
    OmegaConf.register_new_resolver("moeexp_id", lambda: "id", replace=True)
    with initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], RunMode.RUN)
    return cells.Composer(loader, master)


JOBS = [
    [],
    ["model=nano", "quant=int8", "batch=3", "quant.group_size=32"],
    ["model=nano", "model.architecture.num_experts=4", "prompt_ids=[1,2]", "prompt=null"],
    ["model=nano", "launcher.timeout_s=7", "tracker=jsonl", "tracker.tags=[a,b]", "cuda_graph=loop"],
    ["model=nano", "+model.architecture.extra=1", "batch=2"],
    ["model=nano", "model.architecture={vocab_size:3}"],
    ["model=nano", "sampler=gumbel", "sampler.top_p=0.5", "min_time_s=0.25", "launcher.only=[3,a]"],
]


def test_the_quick_way_gives_what_hydra_gives(composer):
    for job in JOBS + JOBS:  # a second time, on bases that the first left as they were
        assert composer.config(job) == compose.compose(job), job


@pytest.mark.parametrize("bad", ["batch=x", "nosuch=1", "quant=int9", "model.nosuch=1"])
def test_what_cannot_be_composed_is_refused_and_changes_nothing(composer, bad):
    with pytest.raises(Exception, match="batch|nosuch|int9"):
        composer.config(["model=nano", bad])
    assert composer.config(["model=nano"]) == compose.compose(["model=nano"])


def test_a_design_is_its_cells(composer):
    found = cells.cells_of(composer, [["experiment=ladder", "model=nano", "cuda_graph=loop", "launcher.only=[6,CUDA graph]"]], 0)
    assert [cell.title for cell in found] == ["shared buffers", "CUDA graph"]
    assert [cell.design["index"] for cell in found] == [6, 9] and found[0].design["name"] == "ladder"
    assert [cell.given.cuda_graph for cell in found] == [False, True], "a cell's axis is the cell's"
    assert all(cell.given.model.name == "nano" and cell.given.launcher.cells == [] for cell in found)
    # The cell's overrides alone make it again.
    assert compose.compose(found[0].overrides) == found[0].given


GRAPH = {"cuda_graph": ("false", "decode"), "pdl": ("true", "false")}  # edges of a graph: none before it
# Each rung, and what resolved settings it changes from the one before.
LADDER = [
    ("transformers eager, unquantised", {}),
    ("chunked kernels at T=1", {
        "engine": ("transformers", "moeexp"), "quant": ("none", "int4"), "ops.gdn_decode": ("null", "chunked"),
        "dispatch": ("dual", "token_by_token"), "state": ("shared", "explicit"), "shared_stream": ("true", "false"),
        "skip_output_copy": ("true", "false"),
    }),
    ("einsum recurrence", {"ops.gdn_decode": ("chunked", "einsum")}),
    ("recurrent kernel", {"ops.gdn_decode": ("einsum", "null")}),
    ("single method, torch.cond inside", {"dispatch": ("token_by_token", "cond")}),
    ("dual methods, explicit state", {"dispatch": ("cond", "dual")}),
    ("shared buffers", {"state": ("explicit", "shared")}),
    ("shared stream", {"shared_stream": ("false", "true")}),
    ("skipped output copy", {"skip_output_copy": ("false", "true")}),
    ("CUDA graph", GRAPH),
    ("loop", {"cuda_graph": ("decode", "loop")}),
    ("pdl", {"pdl": ("false", "true")}),
]  # fmt: skip


def test_each_rung_of_the_ladder_changes_one_thing(composer):
    found = cells.cells_of(composer, [["experiment=ladder", "model=qwen3_5_35b_a3b", "quant=int4"]], 0)
    assert [cell.title for cell in found] == [name for name, _ in LADDER]
    settings = []
    for cell in found:
        validate.validate(cell.given, cuda_available=True)
        config = plain(resolve.resolve(cell.given, cuda_available=True))
        settings.append({axis: value for axis, value in flatten(config).items() if not axis.startswith("quant.")})
    for (name, changes), before, after in zip(LADDER[1:], settings, settings[1:], strict=False):
        assert {axis: (before[axis], after[axis]) for axis in after if after[axis] != before[axis]} == changes, name
    assert {one["dtype"] for one in settings} == {"bfloat16"}
    assert "pdl" in axes.not_applicable(resolve.resolve(found[8].given, cuda_available=True))


@pytest.mark.parametrize("name", [name for name, _ in LADDER])
def test_each_rung_can_be_chosen_by_its_name(composer, name):
    (found,) = cells.cells_of(composer, [["experiment=ladder", "model=nano", f"launcher.only=['{name}']"]], 0)
    assert found.title == name


@pytest.mark.parametrize("only, index", [("0", 0), ("6", 6), ("CUDA graph", 9), ("'single method, torch.cond inside'", 4)])
def test_a_single_cell_needs_no_brackets(composer, only, index):
    (found,) = cells.cells_of(composer, [["experiment=ladder", "model=nano", f"launcher.only={only}"]], 0)
    assert found.design["index"] == index


@pytest.mark.parametrize("only", ["[]", "null"])
def test_no_choice_is_all_cells(composer, only):
    assert len(cells.cells_of(composer, [["experiment=ladder", "model=nano", f"launcher.only={only}"]], 0)) == 12


def test_a_title_has_no_escapes(composer):
    jobs = [[r"ops.router=own\:router", r"prompt=a\ \(b\)"], ["ops.router=null", r"prompt='a\:b'"]]
    found = cells.cells_of(composer, [["model=nano", *job] for job in jobs], 0)
    assert [cell.title for cell in found] == ["ops.router=own:router prompt=a (b)", r"ops.router=null prompt='a\:b'"]
    assert found[0].given.ops.router == "own:router" and found[0].given.prompt == "a (b)"


def test_a_design_that_cannot_be_read(composer):
    for job, words in (
        (["experiment=ladder", "launcher.only=[nosuch]"], "allowed: 0 \\(transformers eager, unquantised\\)"),
        (["experiment=ladder", "launcher.only=13"], "launcher.only=13 is not a cell of the design; allowed: 0"),
        (["launcher.cells=[{name: a, set: []}, {name: a, set: ['seed=1']}]"], "two cells named 'a'"),
    ):
        with pytest.raises(ValueError, match=words):
            cells.cells_of(composer, [job], 0)


def test_a_design_is_no_single_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["model=nano", "experiment=ladder", "hydra.mode=RUN", "tracker=jsonl"]) == 2
    assert " runs, and this is one: add -m" in capsys.readouterr().err


def test_judged_cells_have_a_hash_or_a_reason(composer):
    found = cells.cells_of(composer, [["model=nano", "seed=1"], ["model=nano", "cuda_graph=true"]], 5)
    cells.judge(found, gpus=[], history=History([]), fingerprint="f", rerun="failed")
    assert [cell.number for cell in found] == [5, 6]
    assert found[0].config_hash and found[0].refusal is None and found[0].again
    assert found[1].config_hash is None and "needs CUDA" in str(found[1].refusal)


@pytest.mark.slow
def test_a_thousand_cells_are_listed_in_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import moeexp_kernels.registry  # noqa: F401  imports torch and Triton: no part of the listing

    arguments = ["-m", "model=nano", "dry_run=true", "quant=none,int4", "export=eager,aoti", "seed=range(250)"]
    start = time.process_time()
    assert main(arguments) == 0
    assert time.process_time() - start < 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1001 and lines[0].startswith("[0] ") and lines[-1].startswith("1000 cells, 1000 to run")
    assert list(Path(".").iterdir()) == [Path("multirun")] and not list(Path(".").rglob("*.yaml"))


def test_a_dry_run_gives_reasons_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["model=nano", "new_tokens=0", "dry_run=true"]) == 0
    assert "unsupported  new_tokens=0 is out of range" in capsys.readouterr().out
    assert not list(Path(".").rglob("record.json"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["launcher.isolation=banana"], "launcher.isolation=banana"),
        (["rerun=sometimes"], "allowed: failed, all, none"),
        (["launcher.gpus=[7]"], "GPU 7 is not there"),
        (["launcher.gpus=0"], "not a number of 1 or more"),
        (["launcher.timeout_s=0"], "out of range"),
        (["rerun=all,none"], "settings of a whole sweep"),
    ],
)
def test_wrong_settings_of_a_sweep_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "model=nano", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and words in line
