"""What a result is reused for: the contents of what a run read, through whatever path, and the software that it ran on."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import build_snapshot
from test_digests import opened

from moeexp import cli
from moeexp.config import compose, resolve, sources
from moeexp.config.architecture import Architecture
from moeexp.record import cpus, environment
from moeexp.record.record import plain, read_record
from moeexp.run import identity
from moeexp.run.identity import Identities, code_fingerprint, config_hash
from moeexp.run.job import Job
from moeexp.stack import allocator, source_files
from moeexp.stack.digests import Digests

ARCH = replace(
    Architecture.from_hf(compose.compose(["model=nano"]).model.architecture),
    num_hidden_layers=2, layer_types=("linear_attention", "full_attention"), num_experts=2,
)  # fmt: skip
SHARDS = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                   "chat_template.jinja", "added_tokens.json", "tokenizer.model")  # fmt: skip


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Two snapshots, of files of the same names and sizes and other weights."""
    folder = tmp_path_factory.mktemp("snapshots")
    for seed in (0, 1):
        one = folder / f"{seed}"
        build_snapshot(one, ARCH, shards=SHARDS, seed=seed)
        (one / "generation_config.json").write_text("{}")
        for name in TOKENIZER_FILES:
            (one / name).write_text(f'{{"a": "{name} {0}"}}')
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, snapshots):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(snapshots / "0", "weights")
    Path("heldout.txt").write_text("a text " * 100)
    return tmp_path


def measured(cfg, *, run_dir, record, phases):
    record.set(check={"passed": True, "parts": [], "failures": []}, decode_tok_s=10.0)


QUIET = ["-m", "model=nano", "tracker=jsonl", "export=eager", "quant=none", "seed=0,1"]


def sweep(*overrides, capsys, weights="weights", experiment=measured):
    """How many of the two cells were reused, as the command says; and the same as a dry run says it beforehand."""
    arguments = [*QUIET, f"model.weights={weights}", "model.heldout=heldout.txt", "launcher.isolation=none", *overrides]
    capsys.readouterr()
    assert cli.main([*arguments, "dry_run=true"]) == 0
    planned = capsys.readouterr().out.count("  done  ")
    assert cli.main(arguments, experiment=experiment) == 0
    found = re.search(r"(\d) of 2 cells had run before", capsys.readouterr().out)
    reused = int(found[1]) if found else 0
    assert planned == reused
    return reused


def same_stamps(path, change):
    """`change` the file, and give it the size and mtime that it had."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def flip(path, at=-1):
    """One bit of the payload, which safetensors does not notice."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard(folder, index=1):
    return folder / f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"


def replace_folder(here, snapshots):
    shutil.rmtree("weights")
    shutil.copytree(snapshots / "1", "weights")


def replace_in_place(here, snapshots):
    for path in (snapshots / "1").glob("*.safetensors"):
        target = Path("weights") / path.name
        same_stamps(target, lambda path=path, target=target: shutil.copyfile(path, target))


CHANGES = {
    "another snapshot": replace_folder,
    "its shards overwritten, sizes and mtimes restored": replace_in_place,
    "one shard": lambda here, snapshots: same_stamps(shard(Path("weights")), lambda: flip(shard(Path("weights")))),
    "index": lambda here, snapshots: _append("weights/model.safetensors.index.json"),
    "config.json": lambda here, snapshots: _append("weights/config.json"),
    "generation_config.json": lambda here, snapshots: _append("weights/generation_config.json"),
    "heldout": lambda here, snapshots: same_stamps(Path("heldout.txt"), lambda: flip(Path("heldout.txt"))),
    **{name: (lambda here, snapshots, name=name: _append(f"weights/{name}")) for name in TOKENIZER_FILES},
    "a template more": lambda here, snapshots: _new("weights/additional_chat_templates/a.jinja"),
}


def _append(name):
    with open(name, "a") as file:
        file.write("\n")


def _new(name):
    Path(name).parent.mkdir()
    Path(name).touch()


TOKENS = ["model.tokenizer=auto", "prompt_ids=[1]"]


def hash_of(*overrides, weights="weights"):
    """As a new process finds it."""
    given = compose.compose(["model=nano", f"model.weights={weights}", "model.heldout=heldout.txt", *overrides])
    cfg = resolve.resolve(given, cuda_available=False)
    return config_hash(cfg, Identities().of(cfg, gpu=None))


def test_a_shard_that_only_the_index_names_is_part_of_it(here):
    index, moved = Path("weights/model.safetensors.index.json"), Path("weights/below/a.safetensors")
    moved.parent.mkdir()
    shard(Path("weights")).rename(moved)
    index.write_text(index.read_text().replace(shard(Path("weights")).name, "below/a.safetensors"))
    before = hash_of()
    same_stamps(moved, lambda: flip(moved))
    changed = hash_of()
    for damage in ("{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(damage)
        assert hash_of() not in (before, changed), "the loader says what is wrong with it"
    assert before != changed


@pytest.mark.parametrize("change", CHANGES)
def test_other_contents_at_the_same_path_are_another_run(here, snapshots, change):
    before = hash_of(*TOKENS)
    assert hash_of(*TOKENS) == before
    CHANGES[change](here, snapshots)
    assert hash_of(*TOKENS) != before


@pytest.mark.slow
@pytest.mark.parametrize("change", ["its shards overwritten, sizes and mtimes restored", "heldout", "tokenizer.json"])
def test_a_sweep_runs_them_again(here, snapshots, capsys, change):
    assert sweep(*TOKENS, capsys=capsys) == 0
    assert sweep(*TOKENS, capsys=capsys) == 2
    CHANGES[change](here, snapshots)
    assert sweep(*TOKENS, capsys=capsys) == 0
    assert sweep(*TOKENS, capsys=capsys) == 2


def test_what_is_not_read_changes_nothing(here):
    """A text tokenizer beside tokens that are bytes, notes, and a held-out text that is not scored."""
    off = ["model.tokenizer=bytes", "eval_bytes=0"]
    before = hash_of(*off)
    for name in ("heldout.txt", "weights/tokenizer.json"):
        _append(name)
    Path("weights/README.md").touch()
    assert hash_of(*off) == before


def test_a_second_sweep_reads_no_contents(here, capsys, monkeypatch):
    with opened(here) as read:
        sweep("model.tokenizer=auto", "prompt_ids=[1]", capsys=capsys)
    # The first bytes of the held-out text are part of each validation: it must be UTF-8.
    contents = [path for path in read if path.endswith((".safetensors", ".txt")) and not path.endswith("heldout.txt")]
    assert sorted(contents) == sorted(set(contents)), "once for all cells, the dry run and the runs"
    assert len(contents) == SHARDS + 1
    with opened(here / "weights") as read:
        assert sweep("model.tokenizer=auto", "prompt_ids=[1]", capsys=capsys) == 2
    # Which hold the shapes, the ids that end a sequence, and the names of the shards.
    assert {Path(path).name for path in read} <= {"config.json", "generation_config.json", "model.safetensors.index.json"}


@pytest.mark.slow
def test_the_path_is_no_part_of_it(here, snapshots, capsys, monkeypatch):
    assert sweep(capsys=capsys) == 0
    before = hash_of()
    monkeypatch.setenv("HOME", str(here))
    Path("link").symlink_to("weights")
    shutil.copytree("weights", "copy")
    for path in (here / "weights", f"../{here.name}/weights", "'~/weights'", "link", "copy", snapshots / "0"):
        assert hash_of(weights=path) == before, path
    Path("weights").rename("moved")
    assert sweep(weights="moved", capsys=capsys) == 2


def test_a_link_that_leads_elsewhere_runs_again(here, snapshots, capsys):
    Path("link").symlink_to(snapshots / "0")
    assert sweep(weights="link", capsys=capsys) == 0
    Path("link").unlink()
    Path("link").symlink_to(snapshots / "1")
    assert sweep(weights="link", capsys=capsys) == 0


def test_a_blob_of_the_hub_cache_that_is_another_is_another_run(here, snapshots):
    blobs, revision = Path("hub/blobs"), Path("hub/snapshots/abc")
    blobs.mkdir(parents=True), revision.mkdir(parents=True)
    for number, path in enumerate(sorted((snapshots / "0").iterdir())):
        shutil.copyfile(path, blobs / f"{number}")
        (revision / path.name).symlink_to(os.path.relpath(blobs / f"{number}", revision))
    found = {hash_of(), hash_of(weights=revision)}
    assert len(found) == 1
    blob = shard(revision).resolve()
    same_stamps(blob, lambda: flip(blob))
    found.add(hash_of(weights=revision))
    other = blob.with_name("other")
    shutil.copyfile(shard(snapshots / "1"), other)
    shard(revision).unlink()
    shard(revision).symlink_to(os.path.relpath(other, revision))
    assert len(found | {hash_of(weights=revision)}) == 3


@pytest.mark.slow
def test_a_whole_run_of_other_weights(here, snapshots, capsys):
    """Nothing replaced by a stub: the tokens are those of the weights that the record names."""
    from moeexp.run.job import default_experiment

    short = ["new_tokens=8", "repeats=1", "min_samples=1", "min_time_s=0", "eval_bytes=64", "model.tokenizer=bytes"]
    found = []
    for change in (None, replace_in_place):
        if change:
            change(here, snapshots)
        assert sweep(*short, capsys=capsys, experiment=default_experiment) == 0
        newest = max(Path("multirun").rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
        found.append(read_record(newest))
    assert sweep(*short, capsys=capsys) == 2
    one, two = (record["identity"] for record in found)
    assert one["weights"]["sha256"] != two["weights"]["sha256"] and re.fullmatch("[0-9a-f]{64}", two["weights"]["sha256"])
    assert one["weights"]["files"] == SHARDS + 3 and one["weights"]["bytes"] == two["weights"]["bytes"] > 100_000
    assert one["heldout"] == two["heldout"] == Digests().of([Path("heldout.txt")])[0] and one["tokenizer"] is None
    assert one["software"]["torch"] == torch.__version__
    assert found[0]["generated_ids"] != found[1]["generated_ids"]
    assert found[0]["bits_per_byte"] != found[1]["bits_per_byte"]
    assert [record["random_weights"] for record in found] == [False, False]


@pytest.mark.slow
def test_a_process_of_its_own_finds_the_same_identity(here, capsys):
    """The sweep's parent looks for what its runs wrote."""
    assert sweep("seed=0", "launcher.isolation=run", capsys=capsys) == 0
    assert re.search("1 of 1 cells had run before", _again("seed=0", "launcher.isolation=run", capsys=capsys))


def _again(*overrides, capsys):
    arguments = [*QUIET, "model.weights=weights", "model.heldout=heldout.txt", *overrides]
    assert cli.main(arguments, experiment=measured) == 0
    return capsys.readouterr().out


SOFTWARE = {
    "torch": lambda patch: version(patch, "torch"),
    "triton": lambda patch: version(patch, "triton"),
    "hqq": lambda patch: version(patch, "hqq"),
    "transformers": lambda patch: version(patch, "transformers"),
    "cuda": lambda patch: patch.setattr(torch.version, "cuda", "99.9"),
    "python": lambda patch: patch.setattr(identity.platform, "python_version", lambda: "3.99.0"),
    "CPU": lambda patch: patch.setattr(cpus, "name", lambda: "another CPU"),
    "cores": lambda patch: patch.setattr(cpus, "usable", lambda: list(range(1000))),
    "Inductor's settings": lambda patch: patch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
}


def version(patch, of):
    known = environment.version
    patch.setattr(environment, "version", lambda name: "99.9" if name == of else known(name))


@pytest.mark.parametrize("what", SOFTWARE)
def test_other_software_is_another_run(here, monkeypatch, what):
    before = hash_of()
    with monkeypatch.context() as patch:
        SOFTWARE[what](patch)
        assert hash_of() != before
    assert hash_of() == before


@pytest.mark.slow
def test_after_an_upgrade_a_sweep_runs_again(here, capsys):
    assert sweep(capsys=capsys) == 0
    with pytest.MonkeyPatch.context() as patch:
        version(patch, "torch")
        assert sweep(capsys=capsys) == 0
    assert sweep(capsys=capsys) == 2, "and back again"


def on_gpu(monkeypatch, *overrides, gpu="H100", driver="580"):
    monkeypatch.setattr(environment, "driver", lambda: driver)
    cfg = resolve.resolve(compose.compose(["model=nano", "device=cuda", *overrides]), cuda_available=True)
    return config_hash(cfg, Identities().of(cfg, gpu=gpu))


def test_driver_gpu_and_allocator_are_part_of_it(monkeypatch):
    for name in (allocator.VARIABLE, allocator.GENERAL):
        monkeypatch.delenv(name, raising=False)
    known = on_gpu(monkeypatch)
    assert on_gpu(monkeypatch) == known
    found = {known, on_gpu(monkeypatch, gpu="H200"), on_gpu(monkeypatch, driver="590")}
    found.add(on_gpu(monkeypatch, "allocator=cuda_malloc_async"))
    monkeypatch.setenv(allocator.GENERAL, "expandable_segments:True")
    found.add(on_gpu(monkeypatch))
    assert len(found) == 5
    # A sweep's parent, and the process that it starts for a run with the other backend.
    parent = on_gpu(monkeypatch, "allocator=cuda_malloc_async")
    for name, value in allocator.environment_of("cuda_malloc_async").items():
        monkeypatch.setenv(name, value)
    assert on_gpu(monkeypatch, "allocator=cuda_malloc_async") == parent


def test_the_hash_ignores_the_tracker_and_sees_the_rest():
    def digest(*overrides):
        cfg = compose.compose(["model=nano", *overrides])
        return config_hash(cfg, Identities().of(cfg, gpu=None))

    assert digest() == digest("tracker=jsonl") == digest("tracker.project=x") == digest("launcher.strict=true")
    others = [digest("seed=1"), digest("quant=int8"), digest("model.seed=1"), digest("device=cuda"), digest("model=tiny")]
    assert len({digest(), *others}) == 6


def test_random_weights_are_their_seed(here):
    cfg = compose.compose(["model=nano", "model.seed=3", "model.heldout=heldout.txt"])
    found = Identities().of(cfg, gpu=None)
    assert (found["weights"], found["heldout"], found["tokenizer"]) == ({"seed": 3}, None, None)


def test_the_shipped_checkpoint_is_its_contents(here):
    shipped = compose.compose(["model=tiny"])
    shutil.copytree(sources.SHIPPED_CHECKPOINT, "tiny")
    own = replace(shipped, model=replace(shipped.model, weights="tiny", heldout="tiny/heldout.txt"))
    hashes = [config_hash(cfg, Identities().of(cfg, gpu=None)) for cfg in (shipped, own)]
    assert hashes[0] == hashes[1]
    flip(Path("tiny/model-00002-of-00004.safetensors"))
    assert config_hash(own, Identities().of(own, gpu=None)) != hashes[0]


def test_weights_that_change_while_they_are_loaded_end_the_run(here, capsys):
    """Between the look at them and the end of loading: which of the two was measured nobody knows."""
    from moeexp.stack import factory

    load = factory.load

    def slow(*arguments, **named):
        flip(shard(Path("weights")))
        return load(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "load", slow)
        arguments = [*QUIET[1:-1], "model.weights=weights", "new_tokens=4"]
        assert cli.main(arguments) == 1
    assert "weights of model.weights=weights changed while the run loaded them" in capsys.readouterr().err


@pytest.mark.slow
def test_each_of_a_group_has_what_was_loaded(here, monkeypatch):
    """The weights are loaded once for all; one whose look at them was another's ends, and no other."""
    from moeexp.run import group

    jobs = []
    for number in range(2):
        Path(f"{number}").mkdir()
        overrides = ["model=nano", "model.weights=weights", "tracker=jsonl", "export=eager", "quant=none", "new_tokens=4"]
        config = plain(compose.compose([*overrides, "repeats=1", "min_samples=1", "min_time_s=0"]))
        jobs.append(Job(f"ab.{number}", f"{number}", config, overrides, ["python"], sweep=True))
    prepare = group._prepare

    def slow(member):
        prepare(member)
        if member.job.id == "ab.0":
            flip(shard(Path("weights")))

    monkeypatch.setattr(group, "_prepare", slow)
    assert group.run_group(jobs) == 1
    first, second = (read_record(Path(f"{number}/record.json")) for number in range(2))
    assert (first["status"], second["status"]) == ("failed", "ok"), (first["error"], second["error"])
    assert "changed while the run loaded them" in first["error"]["message"]
    assert first["identity"]["weights"]["sha256"] != second["identity"]["weights"]["sha256"]


def test_a_file_that_cannot_be_read_refuses_its_cells_alone(here, capsys):
    (here / "weights" / "broken.safetensors").mkdir()  # no file, so no part of it
    assert sweep(capsys=capsys) == 0
    target = shard(here / "weights")
    known = Digests.of

    def refuse(self, paths, *more):
        paths = list(paths)
        if target in [path.resolve() for path in paths]:
            raise ValueError(f"{target} cannot be read")
        return known(self, paths, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digests, "of", refuse)
        arguments = [*QUIET, "model.weights=weights,random", "dry_run=true"]
        assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("unsupported ") == 2 and out.count("  to run  ") == 2


def test_a_thousand_cells_look_at_a_snapshot_once(here, snapshots):
    cfg = resolve.resolve(compose.compose(["model=nano", "model.weights=weights"]), cuda_available=False)
    identities, asked = Identities(), []
    of = identities._digests.of
    identities._digests.of = lambda paths, *more: asked.append(paths) or of(paths, *more)
    found = [identities.of(replace(cfg, seed=seed), gpu=None) for seed in range(1000)]
    assert len(asked) == 1 and all(one == found[0] for one in found)


def test_code_fingerprint_sees_every_source(tmp_path, monkeypatch):
    package = tmp_path / "moeexp_probe"
    (package / "below").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "below/b.py", "below/tuned/t.json"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(identity, "PACKAGES", ("moeexp_probe",))
    found = [code_fingerprint()]
    for name in ("a.py", "below/b.py", "below/tuned/t.json"):
        (package / name).write_text("x = 2\n")
        found.append(code_fingerprint())
    (package / "a.py").rename(package / "c.py")
    assert len({*found, code_fingerprint()}) == 5
    monkeypatch.undo()
    assert re.fullmatch(r"[0-9a-f]{16}", code_fingerprint())


def test_a_package_without_sources_is_our_own_bug(tmp_path, monkeypatch):
    (tmp_path / "moeexp_probe").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="no source file"):
        source_files.files_of("moeexp_probe")


def test_it_fits_a_record(here):
    cfg = resolve.resolve(compose.compose(["model=nano", "model.weights=weights"]), cuda_available=False)
    assert len(json.dumps(Identities().of(cfg, gpu=None))) < 2000
