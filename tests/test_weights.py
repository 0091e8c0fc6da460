"""The loader: every layout that a snapshot may have gives the same model, and everything else is refused by name."""

import json
from pathlib import Path

import common
import pytest
import torch
from common import EVEN, ODD, build_snapshot, load_model, random_tokens
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from moeexp.check.pure_torch import pure_torch
from moeexp.config.architecture import Architecture
from moeexp.config.quantisation import KINDS, NEVER_QUANTISED, check_skip, kind_of
from moeexp.model.checkpoint import Snapshot
from moeexp.model.weights import Random


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


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_one_tensor_in_flight(tmp_path, monkeypatch, layout):
    """Each is read once, and the memory of none is still held, by a view or otherwise, when the next is read."""
    build_snapshot(tmp_path / "s", ODD, layout=layout)
    source, read, alive, keys = open_snapshot(tmp_path / "s"), Snapshot.read, [], []

    def spy(self, key):
        held = [name for name, storage in zip(keys, alive, strict=True) if not storage.expired()]
        assert not held, f"{held} held while {key} is read"
        tensor = read(self, key)
        alive.append(StorageWeakRef(tensor.untyped_storage()))
        keys.append(key)
        return tensor

    monkeypatch.setattr(Snapshot, "read", spy)
    load_model(source)
    assert len(keys) == len(set(keys)) == sum(len(parts) for parts in source.pieces.values())


def test_no_unquantised_matrix_outlives_its_quantisation(monkeypatch):
    assemble, wide = Random.assemble, {}

    def spy(self, name, buffer):
        held = [other for other, storage in wide.items() if not storage.expired()]
        assert not held, f"{held} held while {name} is made"
        assemble(self, name, buffer)
        if kind_of(name) not in (None, *NEVER_QUANTISED):
            wide[name] = StorageWeakRef(buffer.untyped_storage())

    monkeypatch.setattr(Random, "assemble", spy)
    model = load_model(Random(EVEN, 0), bits=4)
    assert len(wide) == 1 + 3 * (2 + 4), "the head; per layer two projections and four matrices of experts"
    assert all(model.get_buffer(name).dtype == torch.uint8 for name in wide)


def test_random_weights_repeat_by_seed_and_stay_of_order_one():
    deep = common.dataclasses.replace(EVEN, num_hidden_layers=12, layer_types=EVEN.layer_types * 4)
    first, again, other = (load_model(Random(deep, seed)) for seed in (0, 0, 1))
    for name, buffer in first.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name
    assert not torch.equal(first.head.weight, other.head.weight)
    logits = logits_of(first, random_tokens(1, 40))
    assert 0.3 < float(logits.std()) < 3.0


VARIANTS = [{"layout": layout, "prefix": prefix} for layout in ("fused", "per_expert") for prefix in common.PREFIXES]


@pytest.mark.parametrize("bits", [16, 4])
def test_layouts_prefixes_and_shards_give_the_same_bits(tmp_path, bits):
    models = []
    for i, options in enumerate([*VARIANTS, {"shards": 4}, {"vision": True}]):
        build_snapshot(tmp_path / str(i), EVEN, **options)
        models.append(load_model(open_snapshot(tmp_path / str(i)), bits=bits))
    for name, buffer in models[0].named_buffers():
        assert all(torch.equal(model.get_buffer(name), buffer) for model in models[1:]), name


def test_layers_may_differ_in_layout(tmp_path):
    model = build_snapshot(tmp_path / "s", EVEN)
    fused, split = (common.transformers_tensors(model, layout=layout) for layout in ("fused", "per_expert"))
    mixed = {key: value for key, value in fused.items() if "layers.1.mlp.experts" not in key}
    mixed |= {key: value for key, value in split.items() if "layers.1.mlp.experts" in key}
    common.write_snapshot(tmp_path / "m", EVEN, mixed)
    one, two = (load_model(open_snapshot(tmp_path / name)) for name in "sm")
    assert all(torch.equal(buffer, two.get_buffer(name)) for name, buffer in one.named_buffers())


@pytest.mark.parametrize("bits", [16, 8])
def test_a_tied_head_is_the_embedding(tmp_path, bits):
    build_snapshot(tmp_path / "s", EVEN, tied=True)
    model = load_model(open_snapshot(tmp_path / "s"), bits=bits)
    if bits == 16:
        assert model.head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    else:
        assert model.head.weight.dtype == torch.uint8 and model.embed_tokens.weight.dtype == torch.float32
    kept = load_model(open_snapshot(tmp_path / "s"), bits=bits, skip=(*NEVER_QUANTISED, "head"))
    assert kept.head.weight.data_ptr() == kept.embed_tokens.weight.data_ptr() and kept.head.scales is None


def test_a_tied_snapshot_may_bring_an_equal_head(tmp_path):
    build_snapshot(tmp_path / "s", ODD, tied=True)
    edit(tmp_path / "s", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(open_snapshot(tmp_path / "s"))


def test_skipped_kinds_stay_as_they_are():
    for kind, pattern in KINDS.items():
        model = load_model(Random(EVEN, 0), bits=4, skip=tuple({*NEVER_QUANTISED, kind}))
        for name, buffer in model.named_buffers():
            if kind_of(name) is not None:
                quantised = kind_of(name) not in (*NEVER_QUANTISED, kind)
                assert (buffer.dtype == torch.uint8) == quantised, (kind, name)
        assert any(pattern.search(name) for name, _ in model.named_buffers()), f"{kind} names nothing"


@pytest.mark.parametrize(
    ("skip", "message"),
    [((*NEVER_QUANTISED, "heads"), "'heads'; the kinds are head, "), (("embedding",), "must name 'r")],
)
def test_skip_names_known_kinds(skip, message):
    check_skip(NEVER_QUANTISED)
    with pytest.raises(ValueError, match=message):
        check_skip(skip)


def test_every_buffer_is_reported_once():
    from moeexp.model.weights import load

    seen = {}
    model = load(
        EVEN, Random(EVEN, 0), dtype=torch.float32, device=torch.device("cpu"), bits=4, group_size=16,
        skip=NEVER_QUANTISED, on_buffer=lambda name, nbytes: seen.update({name: seen.get(name, 0) + nbytes}),
    )  # fmt: skip
    expected = {n: b.nbytes for n, b in model.named_buffers() if n != "inv_freq" and not n.endswith(".scales")}
    assert seen == expected


def index_of(folder):
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"weight_map": []}', b"\xff\xfe"])
def test_a_broken_index_is_named(tmp_path, content):
    build_snapshot(tmp_path / "s", ODD, shards=2)
    path = index_of(tmp_path / "s")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="model.safetensors.index.json is not a safetensors index"):
        open_snapshot(tmp_path / "s")


def test_shards_that_the_index_does_not_name_are_refused(tmp_path):
    folder = tmp_path / "s"
    build_snapshot(folder, ODD, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.rename(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError) as caught:
        open_snapshot(folder)
    assert "1 missing: model-00002-of-00002.safetensors; 1 not named by it: model-00002-of-00003" in str(caught.value)
    (folder / "model-00002-of-00003.safetensors").rename(second)
    (folder / "tokenizer.safetensors").write_bytes(b"no shard by its name")
    open_snapshot(folder)
    (folder / "model.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="1 not named by it: model.safetensors"):
        open_snapshot(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    build_snapshot(tmp_path / "s", ODD)
    path = tmp_path / "s" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors cannot be read.*fetch the file again"):
        open_snapshot(tmp_path / "s")


def test_the_same_tensor_under_two_prefixes_occurs_twice(tmp_path):
    build_snapshot(tmp_path / "s", ODD)
    edit(tmp_path / "s", lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"].clone()}))
    with pytest.raises(ValueError, match="'norm.weight' occurs twice, in model.safetensors and model.safetensors"):
        open_snapshot(tmp_path / "s")


def test_a_long_list_of_keys_is_cut(tmp_path):
    build_snapshot(tmp_path / "s", ODD)
    edit(tmp_path / "s", lambda t: t.update({f"extra.{i}": torch.zeros(1) for i in range(20)}))
    with pytest.raises(ValueError, match="20 unexpected: extra.0, .* and 12 more$"):
        open_snapshot(tmp_path / "s")


def test_another_architecture_is_refused_by_shape(tmp_path):
    build_snapshot(tmp_path / "s", ODD)
    other = common.dataclasses.replace(ODD, num_experts=4)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is \(5, 48, 28\), expected \(4, 48, 28\)"):
        Snapshot(tmp_path / "s", other)


DEEP = common.dataclasses.replace(EVEN, num_hidden_layers=12, layer_types=EVEN.layer_types * 4)


def test_random_activations_stay_of_order_one_through_every_layer(monkeypatch):
    """The residual stream after each of 12 layers, and what routing and decays look like."""
    from moeexp_kernels import registry

    stream, right = [], registry.OPS["moe_prefill"]["reference"]
    monkeypatch.setitem(registry.OPS["moe_prefill"], "reference", lambda **inputs: stream.append(right(**inputs)) or stream[-1])
    session = common.build_session(load_model(Random(DEEP, 0)), batch=2, max_seq_len=64)
    logits = session.prefill(random_tokens(2, 64), torch.arange(64))
    scales = [float(x.square().mean().sqrt()) for x in stream]
    assert len(scales) == 12 and min(scales) > 0.5 and max(scales) < 4.0, scales
    assert 0.3 < float(logits.square().mean().sqrt()) < 3.0
    for i in range(12):
        ids = session.arena.tensors[f"layers.{i}.expert_ids"][:, :-1].flatten()
        share = torch.bincount(ids, minlength=8).float() / ids.numel()
        assert share.min() > 0.01 and share.max() < 0.5, f"layer {i} routes {share.tolist()}"


def test_random_decays_are_spread_over_short_and_long_memories():
    arch = common.dataclasses.replace(EVEN, linear_num_value_heads=64, linear_num_key_heads=2)
    mixer = load_model(Random(arch, 0)).layers[0].mixer
    half_life = 0.6931 / (mixer.a_log.exp() * torch.nn.functional.softplus(mixer.dt_bias))  # tokens, at an input of 0
    assert half_life.min() < 3 and half_life.max() > 30 and torch.isfinite(half_life).all()


def test_random_weights_do_not_depend_on_the_order_or_the_quantisation():
    plain = load_model(Random(EVEN, 0))
    partly = load_model(Random(EVEN, 0), bits=4, skip=(*NEVER_QUANTISED, "experts"))
    for name in ("layers.2.moe.gate_up.weight", "embed_tokens.weight", "layers.1.moe.router", "layers.0.mixer.a_log"):
        assert torch.equal(plain.get_buffer(name), partly.get_buffer(name)), name
