"""A snapshot from a stranger, or damaged: read as it is or refused in one line; what its files name stays below its folder."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import record_fuzz
import snapshot_fuzz
from record_fuzz import seeded
from snapshot_fuzz import broken, configs, refusal

from moeexp.cli import main
from moeexp.config.config_keys import AT_MOST, MOST_LABELS
from moeexp.config.files import is_inside
from moeexp.model.own_tokenizer import own_tokenizer
from moeexp.run.identity import weight_files

FEW = 60
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return snapshot_fuzz.build(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folders(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made]


OUTSIDE = (
    "../outside", "{}/outside", "a/../../outside", "./../outside", "..", ".", "", "/", "C:\\outside", "C:outside", "..\\outside",
    "a//b", "outside\0", "\x1b[31m", "x" * 300, "a/" * 600 + "b", None, 1, True, ["../outside"], {"a": 1}, "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name)[:20])
def test_an_index_names_files_below_its_folder_alone(folders, tmp_path, name):
    folder = folders[0]
    index = json.loads((folder / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (folder / shard).rename(tmp_path / "outside")  # whole and readable: only the name is wrong
    name = name.format(tmp_path) if isinstance(name, str) else name
    index["weight_map"] = {key: name if value == shard else value for key, value in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    said = refusal(folder, repr(name))
    assert said is not None and INDEX in said and "is no name of a file below its folder" in said
    assert all(path.parent == folder for path in weight_files(folder)), "no digest is made of it either"


@pytest.mark.parametrize("name", ["a.safetensors", "a/b.safetensors", "..a", "a..", "é", "a b", "x" * 255])
def test_any_other_name_is_one(name):
    assert is_inside(name)


def test_a_shard_in_a_folder_below_and_links_of_a_cache_are_read(folders, tmp_path):
    folder = folders[0]
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    (folder / "sub").mkdir()
    (folder / first).rename(folder / "sub" / "first.safetensors")
    (tmp_path / "blobs").mkdir()
    (folder / second).rename(tmp_path / "blobs" / "0")
    (folder / second).symlink_to("../blobs/0")
    index["weight_map"] = {key: "sub/first.safetensors" if name == first else name for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert refusal(folder, "links") is None


def config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("key", [*AT_MOST, "num_labels"])
def test_a_size_beyond_all_models_is_refused_at_once(folders, key):
    for value in (10**9 + 7, 2**40):
        if value > (most := AT_MOST.get(key, MOST_LABELS)):
            config(folders[0], **{key: value})
            said = refusal(folders[0], f"{key} = {value}")
            assert f"{key}={value} in the model config must be" in said and str(most) in said and "config.json" in said


def test_a_size_that_a_model_may_have_is_no_list_of_tensors(folders):
    """Of a checkpoint that names every expert: there are not so many."""
    path = folders[1] / "config.json"
    found = json.loads(path.read_text())
    found["text_config"] |= {"num_experts": AT_MOST["num_experts"]}
    path.write_text(json.dumps(found))
    with record_fuzz.in_time("experts", 5):
        assert "num_experts=16384 in 3 layers are at least" in refusal(folders[1], "experts")


@pytest.mark.parametrize("place", [("vision_config",), ("text_config",), ("vision_config", "deeper")])
def test_a_billion_names_of_labels_are_made_nowhere(folders, place):
    found = json.loads((folders[1] / "config.json").read_text())
    inner = found
    for key in place:
        inner = inner.setdefault(key, {})
    inner["num_labels"] = 10**9
    config(folders[1], **found)
    assert f"{'.'.join(place)}.num_labels=1000000000 in the model config must be" in refusal(folders[1], "labels")


NAMES_A_FILE = [
    {"vocab": "{}/vocab.json", "merges": "{}/merges.txt"},
    {"vocab": "../outside/vocab.json", "merges": "../outside/merges.txt"},
    {"vocab_file": "{}/vocab.json"},
    {"tokenizer_file": "/etc/hostname"},
    {"fast_tokenizer_files": ["tokenizer.9.0.0.json", "../outside/tokenizer.4.0.0.json"]},
    {"fast_tokenizer_files": "../outside/tokenizer.4.0.0.json"},
]


@pytest.mark.parametrize("names", NAMES_A_FILE, ids=lambda names: next(iter(names)))
def test_a_tokenizer_reads_no_vocabulary_outside(tmp_path, names):
    outside, folder = tmp_path / "outside", tmp_path / "s"
    outside.mkdir()
    folder.mkdir()
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (outside / "tokenizer.4.0.0.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (outside / "vocab.json").write_text(json.dumps(model["vocab"]))
    (outside / "merges.txt").write_text("#version: 0.2\na b\n")
    text = json.dumps({"tokenizer_class": "Qwen2TokenizerFast"} | names).replace("{}", str(outside))
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=next(iter(names))) as caught:
        own_tokenizer(folder)
    assert "tokenizer_config.json" in str(caught.value) and len(str(caught.value)) <= 400


def byte_tokenizer(folder, **config):
    folder.mkdir()
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "0": 2}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return folder


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt", "vocab.txt"])
def test_a_text_of_gigabytes_is_not_read_into_memory(tmp_path, name):
    path = byte_tokenizer(tmp_path / "s") / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 3 << 30)
    with record_fuzz.in_time(name, 5), pytest.raises(ValueError, match=f"{name} has more than 134,217,728 bytes"):
        own_tokenizer(tmp_path / "s")


def test_a_tokenizer_that_fails_at_its_first_text_is_refused_as_it_is_loaded(tmp_path):
    assert own_tokenizer(byte_tokenizer(tmp_path / "whole"))("ab")["input_ids"] == [0, 1]
    with pytest.raises(ValueError, match="transformers cannot load the tokenizer of .*TypeError"):
        own_tokenizer(byte_tokenizer(tmp_path / "s", model_max_length="x"))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_what_is_no_file_is_not_waited_for(folders, name):
    (folders[0] / name).unlink(missing_ok=True)
    os.mkfifo(folders[0] / name)
    assert refusal(folders[0], name) is not None


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_of_megabytes_is_not_parsed(folders, name):
    (folders[0] / name).write_text('{"a": [' + "1," * (1 << 22) + "1]}")
    with record_fuzz.in_time(name, 2):
        assert f"{name} has more than 8,388,608 bytes" in refusal(folders[0], name)


def strange(tmp_path, folders):
    config(folders[1], num_hidden_layers=10**9)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    return [
        folders[1],
        "x" * 5000,
        "~nobody/s",
        tmp_path / "file",
        tmp_path / "file" / "s",
        tmp_path / "loop",
        tmp_path / "empty",
    ]


def test_a_folder_that_cannot_be_one_is_one_line(tmp_path, folders):
    for place in strange(tmp_path, folders):
        assert refusal(place, str(place)) is not None


def test_bad_snapshots_are_refused_cells_of_a_sweep(tmp_path, folders, capsys):
    bad = strange(tmp_path, folders)
    places = ",".join(f"'{place}'" for place in [folders[0], *bad])
    more = [one for one in snapshot_fuzz.overrides(folders[0]) if not one.startswith("model.weights")]
    assert main(["-m", *more, f"model.weights={places}", "dry_run=true", "tracker=jsonl"]) == 0
    out = capsys.readouterr().out
    assert f"{len(bad)} unsupported" in out or out.count("unsupported") >= len(bad), out


def read_config(folder, what, data):
    (folder / "config.json").write_bytes(data)
    return refusal(folder, what)


def test_a_value_of_any_kind_in_a_config_is_read_or_one_line(folders):
    generator, cases = seeded(), [(folder, *case) for folder in folders for case in configs(folder)]
    for folder, what, data in generator.sample(cases, FEW):
        read_config(folder, what, data)


@pytest.mark.slow
def test_every_value_at_every_place_of_a_config_is_read_or_one_line(folders):
    refused = total = 0
    for folder in folders:
        for what, data in configs(folder):
            total += 1
            refused += read_config(folder, what, data) is not None
    assert total / 2 < refused < total, (refused, total)


FILES = ("config.json", INDEX, "model-00001-of-00002.safetensors")


def break_files(folder, count):
    generator = seeded()
    for name in FILES:
        whole = (folder / name).read_bytes()
        for what, data in itertools.islice(broken(whole, generator), count):
            (folder / name).write_bytes(data)
            refusal(folder, f"{name}: {what}")
        (folder / name).write_bytes(whole)
    assert refusal(folder, "whole again") is None


def test_a_few_broken_files_are_one_line(folders):
    break_files(folders[0], 9)


@pytest.mark.slow
def test_many_broken_files_are_one_line(folders):
    break_files(folders[0], 300)
