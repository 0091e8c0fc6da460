"""The checkpoint that ships: complete, small, what its metrics say it is, and able to read English."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moeexp.check.pure_torch import pure_torch
from moeexp.checkpoints import loss_tiny, train_tiny
from moeexp.checkpoints.text_tiny import BOOKS, HELD_OUT, VALIDATION, format_verses, share_known, split_books, words_of
from moeexp.config.architecture import Architecture

TINY = Path(train_tiny.__file__).parent / "tiny"
MIB = 2**20


@pytest.fixture(scope="module")
def metrics():
    return json.loads((TINY / "metrics.json").read_text())


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3_5MoeForCausalLM

    with pure_torch():
        yield Qwen3_5MoeForCausalLM.from_pretrained(TINY, dtype=torch.float32, experts_implementation="eager")


# --- the files


def test_shapes_are_those_of_the_card():
    arch = Architecture.from_folder(TINY)
    assert (arch.hidden_size, arch.num_hidden_layers, arch.vocab_size) == (128, 8, 256)
    assert arch.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    assert (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, arch.rotary_dim) == (4, 2, 64, 16)
    assert (arch.linear_num_key_heads, arch.linear_num_value_heads) == (2, 4)
    assert (arch.linear_key_head_dim, arch.linear_value_head_dim) == (64, 64)
    assert (arch.num_experts, arch.num_experts_per_tok) == (24, 4)
    assert (arch.moe_intermediate_size, arch.shared_expert_intermediate_size) == (64, 64)
    assert not arch.tie_word_embeddings


def test_shards_hold_exactly_the_index_in_bf16():
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in TINY.glob("*.safetensors"))
    assert len(shards) >= 2
    assert set(index["weight_map"].values()) == set(shards)
    found, values = {}, 0
    for name in shards:
        with safe_open(TINY / name, framework="pt") as shard:
            for key in shard.keys():
                tensor = shard.get_tensor(key)
                assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all(), key
                found[key] = name
                values += tensor.numel()
    assert found == index["weight_map"]
    assert 6_000_000 < values < 6_200_000
    assert sum((TINY / name).stat().st_size for name in shards) <= 12 * MIB


def test_heldout_text_is_the_held_out_books_and_small():
    text = (TINY / "heldout.txt").read_bytes()
    assert 40_000 <= len(text) <= 128 * 1024
    headings = re.findall(r"^([1-3]? ?[A-Z][A-Za-z ]+) \d+$", text.decode("ascii"), re.MULTILINE)
    assert list(dict.fromkeys(headings)) == list(HELD_OUT)


def test_metrics_belong_to_these_weights(metrics):
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in TINY.glob("model*.safetensors")}
    assert metrics["weights_sha256"] == digests
    assert metrics["training"]["text_bytes"]["heldout"] == (TINY / "heldout.txt").stat().st_size


def test_card_and_curve_stand_beside_it(metrics):
    card = (TINY / "README.md").read_text()
    for figure in (
        f"{metrics['heldout_bits_per_byte']:.3f} bits per byte",
        f"{metrics['sample_words_known']:.1%}",
        f"Seed {metrics['training']['arguments']['seed']}",
        "bible-kjv-text",
        "loss.png",
    ):
        assert figure in card
    assert (TINY / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(metrics["training"]["curve"]) >= 5


# --- it has learnt


def test_recorded_figures_reach_the_goal(metrics):
    assert metrics["heldout_bits_per_byte"] <= 2.0
    assert metrics["sample_words_known"] >= 0.9
    assert len(metrics["sample"]) == train_tiny.SAMPLE_BYTES  # ASCII: a byte is a character


def test_it_really_predicts_heldout_text(model):
    data = torch.frombuffer(bytearray((TINY / "heldout.txt").read_bytes()[: 6 * 1024]), dtype=torch.uint8)
    bpb, load = loss_tiny.bits_per_byte(model, data, batch=3)
    assert bpb <= 2.1  # six windows of sixty
    assert load.shape == (8, 24) and float(load.max()) < 0.25, "a layer sends everything to the same experts"


# --- the parts of the training script


def verses() -> list[str]:
    return [f"B{chr(97 + i // 26)}{chr(97 + i % 26)}{chapter}:1 Verse {i}." for i in range(66) for chapter in (1, 2)]


def test_books_are_split_whole():
    parts = split_books(format_verses(verses()))
    assert sum(map(len, parts.values())) == len(format_verses(verses()))
    for i, book in enumerate(BOOKS):
        home = "heldout" if book in HELD_OUT else "validation" if book in VALIDATION else "train"
        assert [name for name, text in parts.items() if f"Verse {i}.\n" in text] == [home]
    assert parts["heldout"].startswith("Ruth 1\n\nVerse 7.\n\nRuth 2\n\nVerse 7.\n")


def test_text_without_a_book_is_refused():
    with pytest.raises(ValueError, match="Revelation"):
        split_books(format_verses(verses()[:-2]))
    with pytest.raises(ValueError, match="not a verse"):
        format_verses(["Genesis"])


def test_share_known_ignores_the_cut_words_at_both_ends():
    known = set(words_of("and the king's son"))
    assert share_known("xyz And the king's son abc", known) == 1.0
    assert share_known("xyz and zzz the son abc", known) == 0.75


def test_bits_per_byte_of_a_uniform_model_is_eight():
    class Uniform(torch.nn.Module):
        config = type("Config", (), {"num_experts_per_tok": 1})

        def forward(self, tokens, **_):
            logits = torch.zeros(*tokens.shape, 256)
            return type("Out", (), {"logits": logits, "router_logits": (torch.randn(tokens.numel(), 4),)})

    data = torch.zeros(2 * loss_tiny.WINDOW + 100, dtype=torch.uint8)
    bpb, load = loss_tiny.bits_per_byte(Uniform(), data, batch=1)
    assert bpb == pytest.approx(8.0, rel=1e-6)
    assert load.sum().item() == pytest.approx(1.0)


def test_balance_loss_is_one_when_even_and_grows_when_not():
    even = torch.eye(4).repeat(8, 1) * 20
    assert loss_tiny.balance_loss((even, even), 1)[0].item() == pytest.approx(1.0, rel=1e-4)
    skewed = torch.tensor([20.0, 0, 0, 0]).repeat(32, 1)
    loss, load = loss_tiny.balance_loss((even, skewed), 1)
    assert loss.item() == pytest.approx((1 + 4) / 2, rel=1e-4)
    assert load.tolist() == [[0.25] * 4, [1.0, 0, 0, 0]]


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [train_tiny.learning_rate(i / 100, 1.0) for i in range(101)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == rates[3] and rates[100] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))


def test_dropout_acts_in_training_only():
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    small = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4}
    config = Qwen3_5MoeTextConfig(**train_tiny.CONFIG | small | {"num_experts_per_tok": 2})
    tokens = torch.arange(8)[None]
    with pure_torch(), torch.no_grad():
        torch.manual_seed(0)
        net = Qwen3_5MoeForCausalLM._from_config(config, experts_implementation="eager")
        plain = net.eval()(tokens, use_cache=False).logits
        loss_tiny.residual_dropout(net, 0.5)
        assert torch.equal(net.eval()(tokens, use_cache=False).logits, plain)
        assert not torch.allclose(net.train()(tokens, use_cache=False).logits, plain, atol=1e-3)


def test_samples_are_seeded(model):
    short = train_tiny.SAMPLE_BYTES
    try:
        train_tiny.SAMPLE_BYTES = 12
        with torch.inference_mode():
            first, again, other = (train_tiny.sample(model, seed) for seed in (0, 0, 1))
    finally:
        train_tiny.SAMPLE_BYTES = short
    assert first == again != other and len(first) == train_tiny.SAMPLES
