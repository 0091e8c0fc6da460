"""Whether the head of a multimodal snapshot is the embedding: the outer `tie_word_embeddings` decides, as in transformers."""

import json
from pathlib import Path

import pytest
import torch
from common import ODD_CONFIG, slow_after
from safetensors.torch import load_file

from moeexp import cli
from moeexp.config.architecture import Architecture
from moeexp.config.schema import ModelConfig
from moeexp.model.config_agreement import check_agreement, text_config

VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 48,
    "num_position_embeddings": 16, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
PROMPT = [5, 17, 42, 42, 1, 9]
CASES = [(True, None), (True, False), (True, True), (False, None), (False, False), (False, True)]


def save(folder, outer, inner):
    """As transformers saves a model of these configs; returns the model. `inner` None: as by default."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    inside = {key: value for key, value in ODD_CONFIG.items() if key not in ("model_type", "tie_word_embeddings", "eos_token_id")}
    inside |= {} if inner is None else {"tie_word_embeddings": inner}
    torch.manual_seed(0)
    config = Qwen3_5MoeConfig(text_config=inside, vision_config=VISION, tie_word_embeddings=outer)
    model = Qwen3_5MoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(("outer", "inner"), slow_after(2, [(True, False), (False, True), *CASES]))
def test_it_runs_with_the_tokens_of_transformers(tmp_path, monkeypatch, outer, inner):
    from transformers import Qwen3_5MoeForConditionalGeneration

    monkeypatch.chdir(tmp_path)
    save(tmp_path / "s", outer, inner)
    assert ("lm_head.weight" in load_file(tmp_path / "s" / "model.safetensors")) is not outer
    command = ["model=tiny", f"model.weights={tmp_path / 's'}", "model.heldout=null", "device=cpu", "export=eager", "quant=none"]
    command += ["tracker=jsonl", f"prompt_ids={json.dumps(PROMPT, separators=(',', ':'))}", "new_tokens=8", "max_seq_len=16"]
    command += ["repeats=1", "min_samples=1", "min_time_s=0", "eval_bytes=0", "dtype=float32"]
    assert cli.main(command) == 0
    (path,) = Path("outputs").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok" and record["config"]["model"]["architecture"]["tie_word_embeddings"] is outer
    model = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "s", dtype=torch.float32, attn_implementation="eager")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is outer
    ids = torch.tensor([PROMPT])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert record["generated_ids"] == found[:, len(PROMPT) :].tolist()


@pytest.mark.parametrize(("outer", "inner"), [*CASES, (None, True), (None, False), (None, None)])
def test_both_readings_follow_the_outer_one(tmp_path, outer, inner):
    """An outer one that is not there is false, as transformers' default says, whatever stands inside."""
    inside = {key: value for key, value in ODD_CONFIG.items() if key != "tie_word_embeddings"}
    inside |= {} if inner is None else {"tie_word_embeddings": inner}
    config = {"model_type": "qwen3_5_moe", "text_config": inside}
    config |= {} if outer is None else {"tie_word_embeddings": outer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig("test", str(tmp_path), None, 0, None, "none")
    arch = Architecture.from_folder(tmp_path)
    assert arch.tie_word_embeddings is bool(outer) and text_config(model).tie_word_embeddings is bool(outer)
    check_agreement(model, arch)


def test_a_flat_config_decides_itself():
    assert Architecture.from_hf(ODD_CONFIG | {"tie_word_embeddings": True}).tie_word_embeddings is True
    assert Architecture.from_hf(ODD_CONFIG).tie_word_embeddings is False
