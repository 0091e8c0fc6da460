"""The portable artifact: what is written comes back bit for bit, what is damaged, foreign or contradicted is refused."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import common
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from moeexp import cli, export
from moeexp.config import compose as config_compose
from moeexp.config import resolve, schema, sources
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.run.identity import Identities, config_hash
from moeexp.stack import artifact, artifact_config, artifact_key, artifact_manifest, artifact_writer, factory, packages
from moeexp.stack.compile_cache import Artifact

NANO = ["model=nano", "export=aoti", "batch=2", "max_seq_len=96"]
RUN = ["tracker=jsonl", "new_tokens=4", "repeats=1"]


def phases():
    record = Record(Path(tempfile.mkdtemp()) / "record.json", id="export", config={}, command=[])
    return Phases(record, Console(stderr=True))


def adopted(overrides):
    return artifact_config.adopt(config_compose.compose(overrides), overrides)


def resolved(overrides):
    return resolve.resolve(config_compose.compose(overrides), cuda_available=False)


def written(out, overrides, monkeypatch):
    """An artifact whose methods are placeholders: compiling is another test's business."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = resolved([*NANO, "device=cpu", *overrides])
    stack = factory.build_stack(cfg, factory.build_model(cfg, phases()), phases(), export="eager")
    for name in ("prefill", "decode"):
        package = out.parent / f"{name}.pt2"
        package.write_bytes(name.encode())
        stack.artifacts[name] = Artifact("key", package, {}, cached=False, compile_s=1.0)
    artifact_writer.write(out, cfg, stack, made_in_s={"weights": 1.0}, identity=Identities().files(cfg))
    return stack.model


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "A", ["quant=int4"], monkeypatch)
    return tmp_path / "A"


def reseal(folder, change, *, ours=True):
    """Edits the manifest as a careful hand would: its own digest fits again. `ours`: by the key of this machine's user."""
    path = folder / artifact_manifest.MANIFEST
    manifest = json.loads(path.read_text())
    made_by = manifest.pop("made_by")
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = artifact_manifest.seal(manifest)
    path.write_text(json.dumps(manifest | {"made_by": artifact_key.code(manifest) if ours else made_by}))


@pytest.mark.parametrize("overrides", [["quant=int4"], ["quant=none", "dtype=bfloat16"], ["quant=int8"]])
def test_weights_come_back_bit_for_bit(tmp_path, monkeypatch, overrides):
    monkeypatch.setattr(artifact_writer, "SHARD_BYTES", 60_000)
    model = written(tmp_path / "A", overrides, monkeypatch)
    cfg = resolve.resolve(adopted([f"artifact={tmp_path / 'A'}"]), cuda_available=False)
    assert len(list((tmp_path / "A" / "weights").iterdir())) > 1
    loaded = artifact.load_model(cfg, torch.device("cpu"), phases())
    state = ("conv_state", "recurrent_state", "k_cache", "v_cache", "expert_ids")
    wanted = {name: b for name, b in model.named_buffers() if not name.endswith(state)}
    assert wanted.keys() == {name for name, _ in loaded.named_buffers()}
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == wanted[name].dtype and torch.equal(buffer, wanted[name]), name
        assert buffer.stride() == wanted[name].stride() and buffer.data_ptr() % 64 == 0, name
    assert loaded.head.bits == model.head.bits


def test_a_tied_head_stays_tied(tmp_path, monkeypatch):
    common.build_snapshot(tmp_path / "snapshot", common.EVEN, tied=True)
    more = [f"model.weights={tmp_path / 'snapshot'}", "quant=none", "model.tokenizer=none"]
    written(tmp_path / "A", more, monkeypatch)
    cfg = resolve.resolve(adopted([f"artifact={tmp_path / 'A'}"]), cuda_available=False)
    loaded = artifact.load_model(cfg, torch.device("cpu"), phases())
    assert loaded.head.weight.data_ptr() == loaded.embed_tokens.weight.data_ptr()


def test_the_config_is_taken_over(folder):
    cfg = adopted([f"artifact={folder}", "new_tokens=7", "sampler=gumbel"])
    assert (cfg.model.name, cfg.quant.bits, cfg.batch, cfg.max_seq_len) == ("nano", 4, 2, 96)
    assert cfg.dtype == "float32" and cfg.device == "cpu" and cfg.quant.group_size == 32
    assert cfg.new_tokens == 7 and cfg.sampler.name == "gumbel"
    assert config_compose.compose([]).model.name == "tiny"


@pytest.mark.parametrize(
    "agreeing", [["model=nano"], ["quant=int4"], ["batch=2"], ["dtype=auto"], ["ops=auto"], ["quant.group_size=32"]]
)
def test_what_the_artifact_was_made_with_may_be_said_again(folder, agreeing):
    assert adopted([f"artifact={folder}", *agreeing]).batch == 2


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("quant=none", "quant.name=none"),
        ("model=tiny", "model.name=tiny"),  # the default, said aloud
        ("batch=1", "batch=1"),
        ("max_seq_len=1024", "max_seq_len=1024"),
        ("export=eager", "export=eager"),
        ("dtype=bfloat16", "dtype=bfloat16"),
        ("model.seed=5", "model.seed=5"),
        ("ops=reference", "ops.default=reference"),
        ("ops.linear=reference", "ops.linear=reference"),
        ("quant.group_size=16", "quant.group_size=16"),
    ],
)
def test_what_contradicts_it_is_refused_in_one_line(folder, capsys, asked, path):
    assert cli.main([f"artifact={folder}", asked, *RUN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} is not what artifact=")


def test_graphs_of_prompts_need_methods_made_for_them(folder):
    def adopted(cuda_graph, *overrides):
        return artifact_config.adopt(schema.to_config(_composed([f"artifact={folder}", f"cuda_graph={cuda_graph}"])), overrides)

    assert adopted("true").cuda_graph is True and adopted("loop").cuda_graph == "loop"
    with pytest.raises(ValueError, match="cuda_graph=all .* made for cuda_graph=false"):
        adopted("all")
    reseal(folder, lambda manifest: manifest["config"].update(cuda_graph="all"))
    assert adopted("false").cuda_graph == adopted("all").cuda_graph == "all"
    with pytest.raises(ValueError, match="cuda_graph=false .* made for cuda_graph=all"):
        adopted("false", "cuda_graph=false")
    with pytest.raises(ValueError, match="cuda_graph=loop .* made for cuda_graph=all"):
        adopted("loop")


def test_a_result_is_not_taken_for_that_of_another_artifact(folder):
    def digest():
        cfg = adopted([f"artifact={folder}"])
        return config_hash(cfg, Identities().of(cfg, gpu=None))

    before = digest()
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(moved)
    assert digest() == before
    reseal(folder, lambda manifest: manifest.update(made_in_s={}))
    assert digest() != before
    resealed, weights, cfg = digest(), next((folder / "weights").iterdir()), adopted([f"artifact={folder}"])
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert config_hash(cfg, Identities().of(cfg, gpu=None)) != resealed
    with pytest.raises(ValueError, match="is not the file that was written"):
        digest()


def test_a_recipe_that_contradicts_it_is_refused(folder):
    cfg = replace(schema.to_config(_composed([f"artifact={folder}", "batch=3"])))
    with pytest.raises(ValueError, match="batch=3"):
        artifact_config.adopt(cfg, ())  # nothing on the command line


def _composed(overrides):
    from hydra import compose, initialize_config_dir

    schema.register()
    with initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
        return compose("config", overrides=overrides)


def test_defaults_are_composed_while_hydra_composes_something_else():
    with initialize_config_dir(config_dir=str(schema.conf_dir()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert outer is not None and config_compose.compose(["batch=2"]).batch == 2
        assert GlobalHydra.instance().hydra is outer


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("torch", "1.0", "torch 1.0"),
        ("machine", "riscv", "machine riscv"),
        ("cpu_flags", ["avx1024"], "a CPU with avx1024"),
        ("gpu_arch", "sm_90", "gpu_arch sm_90"),
    ],
)
def test_a_foreign_machine_is_refused(folder, monkeypatch, key, value, part):
    here = artifact_manifest.here
    monkeypatch.setattr(artifact_manifest, "here", lambda device: {"gpu_arch": "sm_80"} | here(device))
    reseal(folder, lambda manifest: manifest["runs_on"].update({key: value}))
    with pytest.raises(ValueError, match=part):
        adopted([f"artifact={folder}"])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: flip(f / "weights" / "00000.safetensors"), "weights/00000.safetensors is not the file"),
        (lambda f: flip(f / "methods" / "decode.pt2"), "methods/decode.pt2 is not the file"),
        (lambda f: (f / "methods" / "prefill.pt2").unlink(), "methods/prefill.pt2 is missing"),
        (lambda f: (f / "model" / "tokenizer.json").write_text("{}"), "model/tokenizer.json does not belong"),
    ],
)
def test_damage_is_found_before_anything_is_loaded(folder, capsys, damage, part):
    damage(folder)
    assert cli.main([f"artifact={folder}", *RUN]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: artifact=") and part in error


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "cannot be read"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"batch": 2', '"batch": 1')),
            "does not fit its own digest",
        ),
        (lambda f: reseal(f, lambda manifest: manifest.update(version=99)), "version 99"),
    ],
)
def test_a_damaged_manifest_is_refused_before_work(folder, capsys, damage, part):
    damage(folder)
    assert cli.main([f"artifact={folder}", *RUN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: artifact=") and part in line


def test_a_method_that_is_not_in_it(folder):
    cfg = adopted([f"artifact={folder}"])
    with pytest.raises(ValueError, match="holds the methods prefill, decode, and this run needs forward"):
        artifact.method(cfg, "forward")


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact_writer, "_write_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(tmp_path / "A", ["quant=none"], monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.pt2", "prefill.pt2"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["model=nano"], "out=DIR is needed once"),
        (["model=nano", "out=a", "out=b"], "out=DIR is needed once"),
        (["model=nano", "export=eager", "out=a"], "export=eager compiles nothing"),
        (["model=banana", "out=a"], "model=banana is not a choice"),
        (["new_tokens=0", "out=a"], "new_tokens=0 is out of range"),
        (["model=nano", "out=full"], "out=full exists already"),
    ],
)
def test_export_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert export.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and part in line


OWN_OP = """
from moeexp_kernels.ops.attention_reference import reference_sdpa

def own(*, q, qkv, k_cache, v_cache, positions):
    return reference_sdpa(q=q, qkv=qkv, k_cache=k_cache, v_cache=v_cache, positions=positions)
"""


@pytest.mark.slow
def test_a_snapshot_exported_runs_elsewhere_without_it(tmp_path, monkeypatch, capsys):
    """The whole way: compiled methods and int4 weights of a snapshot, which is gone when they run; own op included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("own_sdpa_exported.py").write_text(OWN_OP)
    common.build_snapshot(tmp_path / "snapshot", sources.load_architecture(config_compose.compose(["model=nano"]).model))
    what = ["model=nano", f"model.weights={tmp_path / 'snapshot'}", "model.tokenizer=none", "quant=int4"]
    what += ["ops.sdpa_decode=own_sdpa_exported:own", "max_seq_len=96"]
    assert export.main([*what, "out=made"]) == 0, capsys.readouterr().err
    assert cli.main([*what, *RUN, "prompt_len=9"]) == 0
    for path in ("snapshot", "cache"):
        shutil.rmtree(path)
    Path("made").rename("moved")
    unwanted = lambda *_, **__: pytest.fail("an artifact needs no such work")  # noqa: E731
    for module, name in ((packages, "get_or_compile"), (factory, "load"), (packages, "export_method")):
        monkeypatch.setattr(module, name, unwanted)
    assert cli.main(["artifact=moved", *RUN, "prompt_len=9"]) == 0, capsys.readouterr().err
    found = [json.loads(path.read_text()) for path in Path("outputs").rglob("record.json")]
    first, second = sorted(found, key=lambda record: record["config"]["artifact"] is not None)
    assert second["status"] == "ok" and second["check"]["passed"] and second["decode_tok_s"] > 0
    assert second["generated_ids"] == first["generated_ids"] and second["random_weights"] is False
    assert second["config"]["artifact"] == str(tmp_path / "moved")
    assert second["code_fingerprint"] == first["code_fingerprint"]
    del sys.modules["own_sdpa_exported"]
    Path("own_sdpa_exported.py").write_text(OWN_OP + "\n# changed\n")
    capsys.readouterr()
    assert cli.main(["artifact=moved", *RUN, "prompt_len=9"]) == 2
    assert "another source of ops.sdpa_decode" in capsys.readouterr().err
    del sys.modules["own_sdpa_exported"]
