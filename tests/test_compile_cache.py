"""The cache of compiled methods, with a compiler that writes a few bytes and counts how often it ran."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from common import ODD
from moeexp_runner.binding import TensorSpec

from moeexp.config import axes
from moeexp.config.compose import compose
from moeexp.config.resolve import resolve
from moeexp.stack import compile_cache, factory, source_files
from moeexp.stack.compile_cache import MethodSpec, cache_dir, get_or_compile, key_of

SPEC = MethodSpec(
    method="decode",
    settings={
        "architecture": ODD.to_hf(),
        "ops": {"linear": "reference", "sample": "reference"},
        "bits": 4,
        "group_size": 16,
        "skip": ["embedding", "router"],
        "dtype": "float32",
        "batch": 1,
        "max_seq_len": 32,
        "device": "cpu",
        "state": "shared",
    },
)
CHANGES = {
    "state": "explicit",
    "padded": True,
    "count": 2,
    "method": "prefill",
    "architecture": ODD.to_hf() | {"rms_norm_eps": 1e-6},
    "ops": {"linear": "triton", "sample": "reference"},
    "bits": 8,
    "group_size": 32,
    "skip": ["embedding"],
    "dtype": "bfloat16",
    "batch": 2,
    "max_seq_len": 33,
    "device": "cuda",
}


def changed(**changes):
    own = {name: changes.pop(name) for name in ("method", "padded", "count") if name in changes}
    return dataclasses.replace(SPEC, settings=SPEC.settings | changes, **own)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3, 4))
        self.register_buffer("state", torch.zeros(2, 4), persistent=False)
        self.register_buffer("unused", torch.zeros(5, 5))

    def forward(self, x):
        self.state.add_(1)
        return x @ self.weight + self.state[0]


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Small(), (torch.zeros(2, 3),), strict=False)


@pytest.fixture
def cache(tmp_path, monkeypatch, program):
    """Counts exports and compilations in files, so that other processes count as well."""
    monkeypatch.setenv("MOEEXP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile_cache, "_compiler", lambda: "g++: 1.0")

    class Counter:
        folder = tmp_path / "cache" / "compiled"

        def log(self, what):
            with (tmp_path / "log").open("a") as file:
                file.write(what + "\n")

        def count(self, what):
            path = tmp_path / "log"
            return path.read_text().split().count(what) if path.exists() else 0

        def export(self):
            self.log("export")
            return program

        def get(self, **changes):
            return get_or_compile(changed(**changes), self.export)

        def listing(self):
            return sorted(path.name for path in self.folder.iterdir() if not path.name.endswith(".lock"))

    counter = Counter()

    def compile_method(program, path, config):
        counter.log("compile")
        path.write_bytes(b"compiled " + path.name.encode())

    monkeypatch.setattr(compile_cache, "compile_method", compile_method)
    return counter


def test_a_second_call_neither_exports_nor_compiles(cache):
    first, second = cache.get(), cache.get()
    assert (first.cached, second.cached) == (False, True)
    assert dataclasses.replace(second, cached=False) == first and first.key == key_of(SPEC)
    assert first.package.read_bytes() == b"compiled decode.pt2" and first.package.parent == cache.folder / first.key
    assert cache.count("export") == cache.count("compile") == 1
    assert cache.listing() == [first.key]
    assert first.constants == {
        "weight": TensorSpec((3, 4), "torch.float32", (4, 1)),
        "state": TensorSpec((2, 4), "torch.float32", (4, 1)),
    }, "a buffer that nothing uses is not in the package"


def test_manifest_says_what_was_compiled(cache):
    manifest = json.loads((cache.get().package.parent / "manifest.json").read_text())
    assert manifest["spec"]["method"] == "decode" and manifest["spec"]["architecture"]["hidden_size"] == 48
    assert manifest["inductor"]["aot_inductor.package_constants_in_so"] is False
    assert manifest["toolchain"]["torch"] == torch.__version__ and manifest["toolchain"]["cxx"] == "g++: 1.0"
    assert len(manifest["graph_sha256"]) == len(manifest["package_sha256"]) == 64


def test_every_field_of_the_spec_is_in_the_key(monkeypatch):
    monkeypatch.setattr(compile_cache, "toolchain", lambda device: {"torch": "2"})
    assert CHANGES.keys() == SPEC.plain().keys()
    settings = axes.compiled_in(resolve(compose(["model=nano"]), cuda_available=False))
    assert SPEC.settings.keys() == {*settings, "ops"}
    keys = [key_of(SPEC)] + [key_of(changed(**{name: value})) for name, value in CHANGES.items()]
    assert len(set(keys)) == len(keys)
    assert key_of(dataclasses.replace(SPEC)) == keys[0]


def test_code_and_toolchain_are_in_the_key(monkeypatch):
    keys = {key_of(SPEC)}
    versions = compile_cache.toolchain("cpu")
    assert {"python", "torch", "triton", "cuda", "cxx", "machine", "cpu", "cpu_flags"} == versions.keys()
    for name in versions:
        with monkeypatch.context() as patch:
            patch.setattr(compile_cache, "toolchain", lambda device, name=name: versions | {name: "other"})
            keys.add(key_of(SPEC))
    for name, value in [
        ("sources", lambda: {}),
        ("inductor_config", lambda **of: {"a": 1}),
        ("MANIFEST_VERSION", -1),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(compile_cache, name, value)
            keys.add(key_of(SPEC))
    assert len(keys) == 1 + len(versions) + 3


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """{name: file} of copies of all packages, which the key is then made from; no module is imported anew."""
    for package in source_files.PACKAGES:
        shutil.copytree(source_files.folder_of(package), tmp_path / package, ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(source_files, "folder_of", lambda package: tmp_path / package)
    monkeypatch.setattr(compile_cache, "toolchain", lambda device: {})  # asks the compiler each time
    return tmp_path


def touched(path):
    path.write_text(path.read_text() + "# more\n" if path.suffix == ".py" else path.read_text() + "\n")


TRACED = (
    "stack.factory", "stack.methods", "stack.inductor", "stack.compile_cache",
    "model.qwen3_5_moe", "model.quantise", "model.weights",
    "config.architecture", "config.axes",
)  # fmt: skip
KERNELS = (
    "ops/linear", "ops/moe_prefill", "dispatch", "registry", "parts/graph_edges", "parts/tuning", "parts/int_dot", "bench/case",
)  # fmt: skip
RUNNER = ("session", "binding", "explicit", "arena", "loop", "step_graph")


def test_every_file_that_shapes_compiled_code_is_in_the_key(copied):
    """One comment more in any of them is another key; the list is that of the imports, and names what one would name."""
    found = compile_cache.sources()
    assert {f"moeexp.{name}" for name in TRACED} | {f"moeexp_runner.{name}" for name in RUNNER} <= set(found)
    assert {f"moeexp_kernels/{name}.py" for name in KERNELS} | {"moeexp_kernels/tuned/sm_90.json"} <= set(found)
    assert len(set(found.values())) == len(found), "each once"
    keys = [key_of(SPEC)]
    for path in found.values():
        touched(path)
        keys.append(key_of(SPEC))
    assert len(set(keys)) == len(found) + 1


def test_kernels_in_folders_are_in_the_key(copied):
    before = key_of(SPEC)
    folder = copied / "moeexp_kernels" / "ops" / "deep"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text("a = 1\n")
    first = key_of(SPEC)
    (folder / "new.py").write_text("a = 2\n")
    second = key_of(SPEC)
    (folder / "new.py").rename(folder.parent / "new.py")
    moved = key_of(SPEC)
    (folder.parent / "tuned").mkdir()
    (folder.parent / "tuned" / "sm_1.json").write_text("{}")
    assert len({before, first, second, moved, key_of(SPEC)}) == 5


def test_what_the_tracing_code_comes_to_import_is_in_the_key(copied):
    """In a folder, by a relative import of a function of its own."""
    folder = copied / "moeexp" / "room"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "noun.py").write_text("from . import other\n")
    (folder / "other.py").write_text("")
    before = key_of(SPEC)
    touched(folder / "noun.py")
    assert key_of(SPEC) == before, "nothing imports it yet"
    model = copied / "moeexp" / "model" / "qwen3_5_moe.py"
    model.write_text(model.read_text() + "def f():\n    from ..room.noun import g\n")
    assert {"moeexp.room", "moeexp.room.noun", "moeexp.room.other"} <= set(compile_cache.sources())


def test_reports_are_not_in_the_key(copied):
    before = key_of(SPEC)
    others = (
        "report/__main__", "report/markdown", "report/html/page", "report/html/svg", "report/intervals", "report/terminal",
        "check/check", "record/tracker", "sweep/sweep", "sweep/cells", "run/experiment",
    )  # fmt: skip
    for name in others:
        touched(copied / "moeexp" / f"{name}.py")
    (copied / "moeexp" / "new.py").write_text("")
    assert key_of(SPEC) == before


def test_an_empty_list_of_sources_is_our_own_bug(copied, monkeypatch):
    monkeypatch.setattr(compile_cache, "TRACING", ("moeexp.moved",))
    with pytest.raises(AssertionError, match="moeexp.moved"):
        compile_cache.sources()
    monkeypatch.undo()


def test_variables_that_change_what_is_compiled_are_in_the_key(monkeypatch):
    keys = [key_of(SPEC)]
    for name, value in (("TRITON_INTERPRET", "other"), ("TORCHINDUCTOR_MAX_AUTOTUNE", "1")):
        monkeypatch.setenv(name, value)
        keys.append(key_of(SPEC))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # of each process its own
        monkeypatch.setenv(name, "/elsewhere")
    assert len(set(keys)) == 3 and key_of(SPEC) == keys[-1]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def rewrite(path, change):
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "flipped package": lambda folder: flip(folder / "decode.pt2"),
    "truncated package": lambda folder: (folder / "decode.pt2").write_bytes(b"comp"),
    "no package": lambda folder: (folder / "decode.pt2").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "truncated manifest": lambda folder: (folder / "manifest.json").write_text('{"version": 1, '),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{"),
    "manifest null": lambda folder: (folder / "manifest.json").write_text("null"),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "no constants": lambda folder: rewrite(folder / "manifest.json", lambda m: m.pop("constants")),
    "garbled constants": lambda folder: rewrite(folder / "manifest.json", lambda m: m.update(constants={"w": {}})),
    "other version": lambda folder: rewrite(folder / "manifest.json", lambda m: m.update(version=0)),
    "other architecture": lambda folder: rewrite(folder / "manifest.json", lambda m: m["spec"].update(batch=9)),
    "other GPU": lambda folder: rewrite(folder / "manifest.json", lambda m: m["toolchain"].update(gpu_arch="sm_1")),
    "other torch": lambda folder: rewrite(folder / "manifest.json", lambda m: m["toolchain"].update(torch="1.0")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_artifact_is_compiled_again(cache, damage):
    first = cache.get()
    damage(first.package.parent)
    again = cache.get()
    assert not again.cached and cache.count("compile") == 2
    assert again.package.read_bytes() == b"compiled decode.pt2" and again.constants == first.constants
    assert cache.get().cached and cache.listing() == [first.key]


def test_a_failed_compilation_leaves_nothing_and_can_be_repeated(cache, monkeypatch):
    works = compile_cache.compile_method

    def fails(program, path, config):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(compile_cache, "compile_method", fails)
    with pytest.raises(OSError, match="disk full"):
        cache.get()
    assert cache.listing() == []
    monkeypatch.setattr(compile_cache, "compile_method", works)
    assert not cache.get().cached and cache.get().cached


def in_child(function):
    """Starts a forked process, which inherits the fake compiler."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_two_processes_at_once_compile_once(cache, monkeypatch):
    quick = compile_cache.compile_method

    def slow(program, path, config):
        time.sleep(0.5)
        quick(program, path, config)

    monkeypatch.setattr(compile_cache, "compile_method", slow)
    processes = [in_child(lambda: cache.log(f"cached={cache.get().cached}")) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert cache.count("compile") == cache.count("export") == 1
    assert cache.count("cached=False") == 1 and cache.count("cached=True") == 2


@pytest.mark.parametrize("moment", ["while compiling", "before the rename"])
def test_a_killed_process_leaves_nothing_under_the_final_name(cache, monkeypatch, moment):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(program, path, config):
        path.write_bytes(b"half")
        die()

    with monkeypatch.context() as patch:
        if moment == "while compiling":
            patch.setattr(compile_cache, "compile_method", half_written)
        else:
            patch.setattr(compile_cache.os, "replace", die)
        process = in_child(cache.get)
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert cache.listing() == [f".{key_of(SPEC)}.partial"], "nothing under the final name"
    assert not cache.get().cached and cache.get().cached
    assert cache.listing() == [key_of(SPEC)], "what the killed process left is gone"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MOEEXP_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "moeexp"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_dir()) == "/x/moeexp"
    monkeypatch.setenv("MOEEXP_CACHE_DIR", "/own")
    assert str(cache_dir()) == "/own"


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_a_missing_compiler_is_named(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(RuntimeError, match=f"{command}.*set CXX"):
        key_of(SPEC)


def test_buffers_that_inductor_would_freeze_are_refused():
    class Short(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.ones(3))

        def forward(self, x):
            return x + self.bias

    with pytest.raises(AssertionError, match="bias"):
        compile_cache._constants(torch.export.export(Short(), (torch.zeros(2, 3),)))


def test_inductors_own_cache_is_of_these_sources(monkeypatch):
    """It knows our ops by their names: code for an argument that has another name now would be found and run."""
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    factory.EXPORTERS["compile"](SimpleNamespace(cfg=None, methods={}), None)
    assert torch.compiler.config.cache_key_tag == compile_cache.source_digest()
