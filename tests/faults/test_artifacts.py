"""An artifact from a stranger, or damaged: nothing of it is imported or loaded before its user trusts it and it is whole, and
what does not fit is one line."""

import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import record_fuzz
import torch
from common import slow_after
from record_fuzz import dumped, nodes, replaced, seeded
from safetensors.torch import load_file, save_file
from snapshot_fuzz import VALUES, broken
from test_artifact import NANO, OWN_OP, RUN, phases, reseal, resolved, written

from moeexp import cli, export, reproduce
from moeexp.config import resolve
from moeexp.config.compose import compose
from moeexp.model.weights import layout
from moeexp.report import command_line
from moeexp.stack import artifact, artifact_config, artifact_key, artifact_manifest, factory

FEW = 40
EVIL = "from pathlib import Path\nPath('ran').touch()\n" + OWN_OP


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One with an op of its maker's, which no test may import unseen."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        Path("evil_sdpa.py").write_text(EVIL)
        written(folder / "A", ["quant=int4", "ops.sdpa_decode=evil_sdpa:own"], patch)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != made])
    loads = []
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda *_, **__: loads.append(1))
    forget()
    yield tmp_path / "A"
    forget()
    assert not loads, "native code was loaded"


def forget():
    sys.modules.pop("evil_sdpa", None)
    Path("ran").unlink(missing_ok=True)


def refusal(folder, *more, what=""):
    """The line that refuses it, with nothing imported unless it is the last thing that was looked at; None where it is read."""
    forget()
    with record_fuzz.in_time(what):
        try:
            overrides = [f"artifact={folder}", *more]
            cfg = resolve.resolved(artifact_config.adopt(compose(overrides), overrides), cuda_available=False)
            artifact.load_model(cfg, torch.device("cpu"), phases())
            for name in ("prefill", "decode"):
                artifact.method(cfg, name)
        except ValueError as error:
            said = str(error)
            assert len(said.replace(str(folder), "")) <= 330 and said.isprintable(), (what, said)
            return said
    return None


def untouched(folder, *more):
    """As `refusal`, of one whose code may not run."""
    said = refusal(folder, *more)
    assert said is not None and "evil_sdpa" not in sys.modules and not Path("ran").exists(), said
    return said


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_what_was_made_here_is_read(folder):
    assert refusal(folder) is None and Path("ran").exists()
    path = artifact_key.key_file()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == 32


def other_key(folder):
    artifact_key.key_file().write_bytes(os.urandom(32))


STRANGERS = {
    "another key": other_key,
    "no key": lambda folder: artifact_key.key_file().unlink(),
    "changed and sealed anew": lambda folder: reseal(folder, lambda m: m.update(moeexp="x"), ours=False),
    "its own word": lambda folder: reseal(folder, lambda m: m.update(artifact_trust=True, trusted=True), ours=False),
    "trusted by its config": lambda folder: reseal(folder, lambda m: m["config"].update(artifact_trust=True), ours=False),
    "its digest as its code": lambda folder: (folder / "manifest.json").write_text(
        json.dumps((found := manifest_of(folder)) | {"made_by": found["sha256"]})
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_strangers_needs_trust_before_anything_of_it_runs(folder, case, capsys):
    STRANGERS[case](folder)
    said = untouched(folder)
    assert "was not made on this machine by this user" in said and "artifact_trust=true" in said
    assert cli.main([f"artifact={folder}", *RUN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "artifact_trust=true" in line and len(line) <= 400 and not Path("ran").exists()
    assert refusal(folder, "artifact_trust=true") is None and Path("ran").exists()


def test_a_strangers_is_a_refused_cell_of_a_sweep(folder, capsys):
    other_key(folder)
    assert cli.main(["-m", f"artifact={folder}", "artifact_trust=false,true", "dry_run=true", *RUN]) == 0
    out = capsys.readouterr().out
    assert "artifact_trust=true" in out and out.count("unsupported") >= 1, out


KEYS = {
    "others can read it": lambda path: path.chmod(0o644),
    "too short": lambda path: path.write_bytes(b"x" * 31),
    "too long": lambda path: path.write_bytes(b"x" * 33),
    "empty": lambda path: path.write_bytes(b""),
    "a link": lambda path: (path.rename(path.with_name("k")), path.symlink_to("k")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_that_is_none_is_one_line_here_and_at_export(folder, case, capsys):
    KEYS[case](artifact_key.key_file())
    assert "the key of artifacts" in untouched(folder) and refusal(folder, "artifact_trust=true") is None
    capsys.readouterr()
    assert export.main(["model=nano", "out=B"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the key of artifacts" in line and "remove it, and export again" in line and not Path("B").exists()


def test_a_key_that_cannot_be_kept_stops_an_export_before_it_compiles(folder, monkeypatch, capsys):
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").absolute()))
    assert export.main(["model=nano", "out=B"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be kept in" in line and "set XDG_STATE_HOME" in line


def test_one_made_before_is_one_line(folder):
    reseal(folder, lambda manifest: manifest.update(version=4))
    assert "has version 4, this moeexp reads 5; export it again" in untouched(folder)


OUTSIDE = ("../{}", "{}", "a/../../{}", "..", "", "C:\\{}", "\\{}", "a\0", "x" * 300)


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
@pytest.mark.parametrize("what", slow_after(1, ["a method", "weights", "a file", "a digest"]))
def test_a_manifest_names_files_below_its_folder_alone(folder, tmp_path, what, name):
    source = folder / ("methods/decode.pt2" if what == "a method" else "weights/00000.safetensors")
    shutil.copy(source, tmp_path / "outside")  # as it should be, and with the right digest
    name = name.format("outside" if ".." in name else tmp_path / "outside")

    def change(manifest):
        found = manifest["files"][source.relative_to(folder).as_posix()]
        if what != "a file":
            manifest["files"][name] = found
        if what == "a method":
            manifest["methods"]["decode"]["file"] = name
        if what in ("weights", "a file"):
            manifest["weights"] = [name]

    reseal(folder, change)
    for more in ((), ("artifact_trust=true",)):
        assert "is no name of a file below its folder" in untouched(folder, *more)


@pytest.mark.parametrize("name", ["methods/more.pt2", "weights/more.safetensors", "model/config.json", "model/heldout.txt"])
def test_no_file_is_read_that_has_no_digest(folder, name):
    (folder / name).write_text("{}")

    def change(manifest):
        manifest["methods"]["decode"]["file"] = name if "pt2" in name else manifest["methods"]["decode"]["file"]
        manifest["weights"] += [name] * ("weights" in name)
        manifest["model"] = {"weights": "config" in name, "heldout": "heldout" in name}

    reseal(folder, change)
    assert f"'{name}' has no digest" in untouched(folder)


def test_weights_and_texts_are_not_read_from_elsewhere(folder, tmp_path):
    """A manifest without a model of its own, whose config names one."""
    for change in ({"weights": str(tmp_path)}, {"weights": "shipped"}, {"heldout": str(tmp_path / "evil_sdpa.py")}):
        reseal(folder, lambda manifest, change=change: manifest["config"]["model"].update(change))
        assert "that it does not hold" in untouched(folder)
        reseal(folder, lambda manifest: manifest["config"]["model"].update(weights="random", heldout=None))


def test_a_link_in_an_artifact_is_refused(folder, tmp_path):
    (folder / "methods" / "decode.pt2").rename(tmp_path / "decode.pt2")
    (folder / "methods" / "decode.pt2").symlink_to(tmp_path / "decode.pt2")
    assert "methods/decode.pt2 is a link" in untouched(folder)


@pytest.mark.parametrize("name", ["methods/decode.pt2", "weights/00000.safetensors"])
def test_every_digest_is_compared_before_an_op_is_imported(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    for more in ((), ("artifact_trust=true",)):
        assert f"{name} is not the file that was written" in untouched(folder, *more)


def test_an_op_of_the_sampler_is_the_runs_own(folder):
    """What the maker sampled with is not imported: no method holds it."""
    Path("evil_sampler.py").write_text("raise SystemExit('imported')")
    reseal(folder, lambda manifest: manifest["config"]["ops"].update(sample="evil_sampler:f"))
    assert refusal(folder) is None and "evil_sampler" not in sys.modules


def test_another_number_of_ops_or_machines_is_not_the_same(folder):
    reseal(folder, lambda manifest: manifest["ops"].pop("linear"))
    assert "holds another source of ops.linear" in refusal(folder)
    reseal(folder, lambda manifest: manifest["ops"].update(linear="reference") or manifest["runs_on"].update(gpu_arch="sm_90"))
    assert "was made for gpu_arch sm_90, and this is None" in refusal(folder)


def rewrite(folder, change):
    """Other weights, with digests that fit."""
    path = folder / "weights" / "00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    digest = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    reseal(folder, lambda manifest: manifest["files"].update({"weights/00000.safetensors": digest}))


HEAD = "layers.0.mixer.in_proj.weight"
WEIGHTS = {
    "a shape": (lambda t: t.update(norm=t["norm"][:-1]), "norm is [63] float32 and should be [64] float32"),
    "a dtype": (lambda t: t.update(norm=t["norm"].half()), "norm is [64] float16 and should be [64] float32"),
    "another format": (lambda t: t.update({HEAD: t[HEAD].float()}), f"{HEAD} is ["),
    "one too few": (lambda t: t.pop("norm"), "'norm' has no value"),
    "no scales": (lambda t: t.pop(HEAD.replace("weight", "scales")), "scales' has no value"),
    "one too many": (lambda t: t.update(more=t["norm"].clone()), "'more' belongs to no such model"),
    "an odd type": (lambda t: t.update(norm=t["norm"].double()), "norm is [64] F64 and should be [64] float32"),
    "one with a name": (lambda t: t.update({"\x1b[31m" + "x" * 500: t["norm"].clone()}), "belongs to no such model"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_tensors_that_do_not_fit_the_config_are_named(folder, case):
    change, said = WEIGHTS[case]
    rewrite(folder, change)
    found = refusal(folder)
    assert "does not fit its config" in found and said in found


def constant(**change):
    spec = {"shape": [64], "dtype": "torch.float32", "stride": [1]} | change
    return lambda manifest: manifest["methods"]["decode"]["constants"].update({"model.norm": spec})


MANIFESTS = {
    "a shape of a constant": (constant(shape=[65]), "decode asks for 'model.norm', [65] float32"),
    "a dtype of a constant": (constant(dtype="torch.int8"), "decode asks for 'model.norm', [64] "),
    "a constant of none": (lambda m: m["methods"]["decode"]["constants"].update(x=constant.__defaults__ or {
        "shape": [1], "dtype": "torch.float32", "stride": [1]}), "decode asks for 'x'"),
    "ties": (lambda m: m.update(tied={"head.weight": "embed_tokens.weight"}), "other tensors are tied"),
    "ties of none": (lambda m: m.update(tied={"a": "b"}), "other tensors are tied"),
    "other shapes": (lambda m: m["config"]["model"]["architecture"].update(num_experts=4), "and should be"),
    "another group": (lambda m: m["config"]["quant"].update(group_size=16), "and should be"),
    "weights twice": (lambda m: m.update(weights=m["weights"] * 2), "a file is named for two things"),
    "no weights": (lambda m: m.update(weights=[]), "has no value"),
    "auto": (lambda m: m["config"].update(dtype="auto"), "its dtype='auto' is none that a run resolves to"),
    "a device": (lambda m: m["config"].update(device="mps"), "its device='mps' is none"),
    "a machine of its own": (lambda m: m["runs_on"].update({"\x1b[31m": "x"}), "Extra inputs are not permitted"),
    "a field less": (lambda m: m["config"].pop("batch"), "its config has no batch"),
    "a field of a group less": (lambda m: m["config"]["quant"].pop("skip"), "its config has no quant.skip"),
    "a field more": (lambda m: m["config"].update(_target_="os.system"), "which is no setting of moeexp"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_one_line(folder, case):
    change, said = MANIFESTS[case]
    reseal(folder, change)
    assert said in (found := refusal(folder)), found


def test_a_constant_that_fits_is_taken(folder):
    reseal(folder, constant())
    assert refusal(folder) is None


@pytest.mark.parametrize("overrides", [["quant=int4"], ["quant=int8", "quant.skip=[embedding,router,shared_expert_gate,head]"],
                                       ["quant=none", "dtype=bfloat16"]])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_is_that_of_a_loaded_model(overrides, tied):
    cfg = resolved([*NANO, "device=cpu", *overrides, f"model.architecture.tie_word_embeddings={tied}"])
    model = factory.build_model(cfg, phases())
    wanted, ties = layout(
        model.arch,
        dtype=getattr(torch, cfg.dtype),
        bits=cfg.quant.bits,
        group_size=cfg.quant.group_size or 0,
        skip=(*cfg.quant.skip,),
    )
    assert wanted == {name: (tuple(b.shape), b.dtype) for name, b in model.named_buffers(remove_duplicate=False)}
    same = model.head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert ties == ({"head.weight": "embed_tokens.weight"} if same else {}) and same == (tied and cfg.quant.name != "int4")


def damages(folder):
    """Every place of the manifest, with every value; of the digests and constants a few."""
    manifest = manifest_of(folder)
    for place in nodes(manifest):
        if place and place[0] not in artifact_manifest.UNSEALED:
            for value in VALUES:
                yield f"{'.'.join(map(str, place))} = {value!r:.60}", place, value


def damage(folder, cases):
    """Sealed by this machine's own key: what the key does not tell has to be seen by itself."""
    whole = manifest_of(folder)
    refused = 0
    for what, place, value in cases:
        changed = {key: item for key, item in replaced(whole, place, value).items() if key not in artifact_manifest.UNSEALED}
        try:
            changed["sha256"] = artifact_manifest.seal(changed)
            changed["made_by"] = artifact_key.code(changed)
        except (ValueError, UnicodeEncodeError):
            continue
        (folder / "manifest.json").write_bytes(dumped(changed))
        refused += refusal(folder, what=what) is not None
    return refused


def test_a_value_of_any_kind_in_a_manifest_is_read_or_one_line(folder):
    damage(folder, seeded().sample(list(damages(folder)), FEW))


@pytest.mark.slow
def test_every_value_at_every_place_of_a_manifest_is_read_or_one_line(folder):
    cases = list(damages(folder))
    refused = damage(folder, cases)
    assert len(cases) / 2 < refused < len(cases), (refused, len(cases))


def says_the_same(data, whole):
    """As JSON: one kind of white space for another is no damage."""
    try:
        one, other = (json.dumps(json.loads(text), sort_keys=True) for text in (data, whole))
    except (ValueError, RecursionError):
        return False
    return one == other


def break_files(folder, count):
    generator = seeded()
    for name in ("manifest.json", "weights/00000.safetensors"):
        whole = (folder / name).read_bytes()
        for what, data in itertools.islice(broken(whole, generator), count):
            if data != whole and not says_the_same(data, whole):
                (folder / name).write_bytes(data)
                assert refusal(folder, what=f"{name}: {what}") is not None, what
        (folder / name).write_bytes(whole)
    assert refusal(folder) is None


def test_a_few_broken_files_are_one_line(folder):
    break_files(folder, 9)


@pytest.mark.slow
def test_many_broken_files_are_one_line(folder):
    break_files(folder, 300)


def test_a_record_does_not_say_whom_to_trust(folder, monkeypatch):
    """Its command names no trust; who runs it again with --trust does."""
    record = record_fuzz.bases()[2]  # of today
    record["config"] |= {"artifact": str(folder), "artifact_trust": True}
    arguments = command_line.arguments_of(record, trust=True)
    assert any(one.startswith("artifact=") for one in arguments) and not any("artifact_trust" in one for one in arguments)
    with pytest.raises(ValueError, match="is not shown"):
        command_line.given_of(record | {"command": ["python", "-m", "moeexp"], "overrides": ["artifact_trust=true"]})
    started = []
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda words, **_: started.append(words) or type("R", (), {"returncode": 2})()
    )
    with pytest.raises(RuntimeError):
        reproduce.run_again(record, Path("again"), trust=True)
    assert "artifact_trust=true" in started[0]
    with pytest.raises(ValueError, match="--trust"):
        reproduce.run_again(record, Path("again"))
