"""The tables of launch parameters: which row serves a shape, and that nothing but a table decides it."""

from __future__ import annotations

import json
from pathlib import Path

import kernels_common  # noqa: F401  before triton
import pytest
import torch
from moeexp_kernels.ops.linear import gemv_config
from moeexp_kernels.parts import tuning

from moeexp.run.identity import code_fingerprint
from moeexp.stack.compile_cache import MethodSpec, key_of


def test_a_row_serves_what_its_key_begins_and_the_longest_wins():
    find = tuning.lookup
    assert find("attention_decode", "half/256", "sm_90")["BLOCK_N"] == 32
    assert find("attention_decode", "half/64", "sm_90")["BLOCK_N"] == 64
    assert find("router_gemv", "plain16/255x2048", "sm_90") == find("router_gemv", "", "sm_90")
    assert find("router_gemv", "plain16/256x2048", "sm_90") == tuning.table("sm_90")["router_gemv"]["plain16/256x2048"]
    assert find("gdn_decode", "128x128/few", "sm_90") == tuning.table("sm_90")["gdn_decode"]["128x128"]
    assert find("gdn_decode", "64x64/few", "sm_90") == find("gdn_decode", "", "default")


def test_the_source_of_a_row_can_be_told():
    assert tuning.source("gdn_decode", "128x128/few", "sm_90") == "sm_90"
    assert tuning.source("gdn_decode", "64x64/few", "sm_90") == "default"
    assert tuning.source("gdn_decode", "128x128/few", "sm_89") == "default"
    assert tuning.source("gemv", "int4/7x64", "sm_90") == "default"
    assert tuning.sources("sm_90")["gemv"] == "sm_90"
    assert set(tuning.sources("sm_75").values()) == {"default"}


def test_parts_of_a_key_are_whole_words():
    """`int4/12352x2048` must not serve `int4/12352x20480`."""
    assert tuning.source("gemv", "int4/12352x2048", "sm_90") == "sm_90"
    assert tuning.source("gemv", "int4/12352x20480", "sm_90") == "default"


def test_a_missing_row_is_an_error_unless_the_op_has_a_rule():
    with pytest.raises(LookupError, match="gemv 'int4/7x64'"):
        tuning.lookup("gemv", "int4/7x64", "sm_90")
    assert tuning.lookup("gemv", "int4/7x64", "sm_90", rule={"BLOCK_N": 3}) == {"BLOCK_N": 3}
    assert gemv_config(bits=4, rows=7, in_features=64, arch="sm_90")["BLOCK_N"] == 4
    head = tuning.table("sm_90")["gemv"]["int4/248320x2048"]
    assert gemv_config(bits=4, rows=248320, in_features=2048, arch="sm_90") == head


def test_the_default_table_serves_every_op_of_every_table():
    tables = [path.stem for path in tuning.FOLDER.glob("*.json")]
    assert {"default", "sm_90"} <= set(tables)
    for name in tables:
        for op, rows in tuning.table(name).items():
            for key, row in rows.items():
                fields = set(row)
                if op != "gemv":  # the one op with a rule
                    assert set(tuning.lookup(op, key, "sm_75")) == fields, (name, op, key)
                for field, value in row.items():
                    if field.lower().startswith("block") or field.startswith("num_warps"):
                        assert value & (value - 1) == 0 and value > 0, (name, op, key, field)


def test_override_reaches_the_keys_that_it_begins_and_ends_with_its_block():
    before = tuning.lookup("gemm", "int4/half/8x8", "cpu")
    with tuning.override("gemm", "int4", {"BLOCK_M": 1}), tuning.override("gemm", "int4/half/8x8", {"BLOCK_M": 2}):
        assert tuning.lookup("gemm", "int4/half/8x8", "cpu") == {"BLOCK_M": 2}
        assert tuning.lookup("gemm", "int4/single/8x8", "cpu") == {"BLOCK_M": 1}
        assert tuning.lookup("gemm", "int8/single/8x8", "cpu") != {"BLOCK_M": 1}
    assert tuning.lookup("gemm", "int4/half/8x8", "cpu") == before and not tuning.OVERRIDES


def test_the_cpu_never_asks_cuda(monkeypatch):
    def refuse(*_):
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    assert tuning.architecture(torch.device("cpu")) == "cpu"
    assert tuning.lookup("gemm", "int4/half", "cpu") == tuning.table("default")["gemm"]["int4/half"]


def test_an_architecture_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0))
    device = torch.device("cuda", 97)  # which no machine has, so that what is kept of it harms no other test
    assert [tuning.architecture(device) for _ in range(3)] == ["sm_90"] * 3
    assert asked == [97]


def test_a_written_table_reads_back_and_replaces_what_was_cached(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    try:
        tuning.write_table("default", {"gemm": {"int4": {"BLOCK_M": 16}}}, {"device": "none"})
        assert tuning.lookup("gemm", "int4/half", "sm_1") == {"BLOCK_M": 16}
        tuning.write_table("sm_1", {"gemm": {"int4/half": {"BLOCK_M": 32}}}, {"device": "one"})
        assert tuning.lookup("gemm", "int4/half", "sm_1") == {"BLOCK_M": 32}
        assert tuning.source("gemm", "int4/half", "sm_1") == "sm_1"
        assert json.loads((tmp_path / "sm_1.json").read_text())["_about"] == {"device": "one"}
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["default.json", "sm_1.json"]
    finally:
        tuning.forget()


@pytest.mark.parametrize("digest", [lambda: key_of(MethodSpec("decode", {"device": "cpu"})), code_fingerprint])
def test_the_caches_keys_cover_the_tables(digest, monkeypatch):
    """A launch parameter is compiled into a package and changes what a run measures."""
    read, names = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
    digest()
    assert {"sm_90.json", "default.json", "tuning.py"} <= set(names)
