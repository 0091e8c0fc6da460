"""The loader: every layout that a snapshot may have gives the same model, and everything else is refused by name."""

import json
from pathlib import Path

import common
import pytest
import torch
from common import EVEN, ODD, build_snapshot, load_model, random_tokens
from safetensors.torch import load_file, save_file

from moeexp.architecture import Architecture
from moeexp.pure_torch import pure_torch
from moeexp.weights import Random, Snapshot


def open_snapshot(folder: Path) -> Snapshot:
    return Snapshot(folder, Architecture.from_folder(folder))


def logits_of(model, tokens):
    session = common.build_session(model, max_seq_len=64)
    return session.prefill(tokens, torch.arange(tokens.shape[1]))


LAYOUTS = [
    {"layout": "fused"},
    {"layout": "per_expert"},
    {"layout": "fused", "prefix": "model.language_model.", "shards": 3, "vision": True},
    {"layout": "per_expert", "shards": 2, "tied": True},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("arch", [ODD, EVEN], ids=["odd", "even"])
def test_any_layout_computes_what_transformers_computes(tmp_path, arch, options):
    reference = build_snapshot(tmp_path / "s", arch, **options)
    tokens = random_tokens(1, 40)
    with torch.no_grad(), pure_torch():
        expected = reference.float().eval()(tokens, use_cache=False).logits
    ours = logits_of(load_model(open_snapshot(tmp_path / "s")), tokens)
    # A tied head makes large logits: float32 noise is relative to them.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_nothing_is_left_as_it_was_allocated(tmp_path, monkeypatch):
    build_snapshot(tmp_path / "s", ODD, layout="per_expert")
    source, empty = open_snapshot(tmp_path / "s"), torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    for name, buffer in load_model(source).named_buffers():
        assert torch.isfinite(buffer.float()).all(), name


def edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rename(tensors):
    tensors["model.norm.weights"] = tensors.pop("model.norm.weight")


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"),
            ["1 missing: layers.1.self_attn.k_proj.weight"],
        ),
        (rename, ["1 missing: norm.weight", "1 unexpected: norm.weights"]),
        (reshape, ["1 mis-shaped: norm.weight", "(47,)", "(48,)"]),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), ["1 unexpected: extra"]),
    ],
)
def test_keys_that_do_not_fit_are_listed(tmp_path, change, words):
    build_snapshot(tmp_path / "s", ODD)
    edit(tmp_path / "s", change)
    with pytest.raises(ValueError) as error:
        open_snapshot(tmp_path / "s")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    build_snapshot(tmp_path / "s", ODD, tied=True)
    edit(tmp_path / "s", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(open_snapshot(tmp_path / "s"))


def test_missing_truncated_and_doubled_files_are_named(tmp_path):
    folder = tmp_path / "s"
    build_snapshot(folder, ODD, shards=3)
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=shards[1].name):
        open_snapshot(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"1 missing: {shards[1].name}"):
        open_snapshot(folder)
    save_file(load_file(shards[0]), shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="occurs twice"):
        open_snapshot(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ODD.to_hf()))
    with pytest.raises(ValueError, match="holds no weights"):
        open_snapshot(tmp_path)


def test_one_tensor_in_flight(tmp_path, monkeypatch):
    """Each is read once, and none is still alive when the next is read."""
    import gc
    import weakref

    build_snapshot(tmp_path / "s", ODD, layout="per_expert")
    source, read, alive, keys = open_snapshot(tmp_path / "s"), Snapshot.read, [], []

    def spy(self, key):
        gc.collect()
        assert all(reference() is None for reference in alive), f"{keys[-1]} is alive while {key} is read"
        tensor = read(self, key)
        alive.append(weakref.ref(tensor))
        keys.append(key)
        return tensor

    monkeypatch.setattr(Snapshot, "read", spy)
    load_model(source)
    assert len(keys) == len(set(keys)) == sum(len(parts) for parts in source.pieces.values())


def test_random_weights_repeat_by_seed_and_stay_of_order_one():
    deep = common.dataclasses.replace(EVEN, num_hidden_layers=12, layer_types=EVEN.layer_types * 4)
    first, again, other = (load_model(Random(deep, seed)) for seed in (0, 0, 1))
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name
    assert not torch.equal(first.head.weight, other.head.weight)
    logits = logits_of(first, random_tokens(1, 40))
    assert 0.3 < float(logits.std()) < 3.0
