"""Whole runs of `nano`, each checked against transformers, through every way to make methods and to dispatch between them.

`make test-torch TORCH=…` runs this file on another torch: what torch.export, AOTInductor and torch.compile take and give
changes between versions.
"""

import json
from pathlib import Path

import pytest
import torch

from moeexp import cli

RUN = ["model=nano", "quant=int4", "max_seq_len=96", "prompt_len=9", "new_tokens=6", "tracker=jsonl"]
RUN += ["repeats=1", "min_samples=1", "min_time_s=0"]
METHODS = {"dual": ["prefill", "decode"], "single": ["forward"], "token_by_token": ["decode"], "cond": ["cond"]}


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    """Of compiled methods: the decode method of two dispatches is one package. Empty, so that this torch compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEEXP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", METHODS)
@pytest.mark.parametrize("export", ["eager", "compile", "aoti"])
def test_a_run_is_checked_and_measured(tmp_path, monkeypatch, export, dispatch):
    monkeypatch.chdir(tmp_path)
    state = "explicit" if dispatch == "cond" else "shared"
    code = cli.main([*RUN, f"export={export}", f"dispatch={dispatch}", f"state={state}"])
    record = json.loads(next(Path("outputs").rglob("record.json")).read_text())
    assert (code, record["status"]) == (0, "ok"), record["error"] or record["check"]["failures"]
    assert (record["config"]["export"], record["config"]["dispatch"]) == (export, dispatch)
    assert record["check"]["passed"] and record["decode_tok_s"] > 0 and len(record["generated_ids"][0]) == 6
    # Its local part, such as +cu130, is not in every package's metadata.
    assert record["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert sorted(record["ops"]["compiled"]) == (sorted(METHODS[dispatch]) if export == "aoti" else [])
    compiled = {name for name in METHODS[dispatch] if f"compile {name}" in record["phases_s"]}
    assert compiled == (set() if export == "eager" else set(METHODS[dispatch]))
