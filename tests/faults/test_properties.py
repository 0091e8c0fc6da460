"""Property tests: sessions, configs and records that hypothesis makes up. A failing one is printed small, with the seed and the
blob that repeat it (`--hypothesis-seed=…`, `@reproduce_failure`)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math

import pytest
import torch
from common import EVEN, build_session, load_model, slow_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeexp.cli import main
from moeexp.config import axes
from moeexp.model.weights import Random
from moeexp.record.record import read_record
from moeexp.report.__main__ import main as report

ROOM = 24  # positions of a session's state


def tried(examples, property, **arguments):
    """`property` on so many examples; no deadline, for other processes have the cores as well."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    bounded = settings(max_examples=examples, deadline=None, print_blob=True, database=None, suppress_health_check=checks)
    bounded(given(**arguments)(property))()


# --- sessions ---

SHAPES = st.builds(
    lambda kinds, kv_heads, groups, k_heads, repeat, experts, k, width, conv: dataclasses.replace(
        EVEN, num_hidden_layers=len(kinds), layer_types=tuple(kinds), num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * groups, linear_num_key_heads=k_heads, linear_num_value_heads=k_heads * repeat,
        num_experts=experts, num_experts_per_tok=min(k, experts), moe_intermediate_size=width, linear_conv_kernel_dim=conv,
    ),
    kinds=st.lists(st.sampled_from(["linear_attention", "full_attention"]), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2), groups=st.integers(1, 2), k_heads=st.integers(1, 2), repeat=st.integers(1, 2),
    experts=st.integers(1, 6), k=st.integers(1, 3), width=st.sampled_from([8, 16]), conv=st.integers(2, 4),
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.lists(st.integers(1, 7), min_size=1, max_size=3)),
        st.tuples(st.just("decode"), st.integers(1, 4)),
        st.tuples(st.just("generate"), st.integers(1, 12), st.integers(1, 8)),
        st.tuples(st.sampled_from(["reset", "poison", "recapture", "reopen"])),
    ),
    min_size=1,
    max_size=8,
)


class Sessions:
    """A session, and the tokens that it has seen since it was last empty: what it says of them must be what a session says that
    has seen nothing else."""

    def __init__(self, arch, batch, graph, seed):
        self.model, self.batch, self.graph = load_model(Random(arch, seed)), batch, graph
        self.generator = torch.Generator().manual_seed(seed)
        self.session, self.seen = self.open(graph), self.tokens(0)

    def open(self, graph):
        return build_session(self.model, batch=self.batch, max_seq_len=ROOM, cuda_graph=graph)

    def tokens(self, count):
        return torch.randint(0, self.model.arch.vocab_size, (self.batch, count), generator=self.generator)

    def fits(self, count):
        """Whether so many tokens more have room; if not, that they are refused, and leave everything as it is."""
        if self.seen.shape[1] + count <= ROOM:
            return True
        before = self.session.arena.snapshot()
        with pytest.raises(ValueError, match=f"max_seq_len={ROOM}"):
            self.session.prefill(self.tokens(count))
        after = self.session.arena.snapshot()
        assert all(torch.equal(before[name], after[name]) for name in before) and self.session.length == self.seen.shape[1]
        return False

    def compare(self, logits):
        fresh = self.open(False)
        torch.testing.assert_close(logits, fresh.prefill(self.seen), rtol=1e-4, atol=1e-4)
        used, wanted, length = self.session.arena.snapshot(), fresh.arena.snapshot(), self.seen.shape[1]
        for name, tensor in wanted.items():
            dim = {"cache": 2, "ids": 1}.get(name.rpartition("_")[2])
            ours, theirs = (t if dim is None else t.narrow(dim, 0, length) for t in (used[name], tensor))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    def prefill(self, pieces):
        for piece in pieces:
            if self.fits(piece):
                new = self.tokens(piece)
                self.seen = torch.cat([self.seen, new], 1)
                self.compare(self.session.prefill(new))

    def decode(self, count):
        for _ in range(count):
            if self.fits(1):
                new = self.tokens(1)
                self.seen = torch.cat([self.seen, new], 1)
                self.compare(self.session.decode(new).clone())

    def generate(self, length, new_tokens):
        prompt = self.tokens(length)
        ids = self.session.generate(prompt, new_tokens)
        assert ids == self.open(False).generate(prompt, new_tokens)
        self.seen = torch.cat([prompt, torch.tensor(ids)[:, :-1]], 1)

    def reset(self):
        self.session.reset()
        self.seen = self.seen[:, :0]

    def poison(self):
        for tensor in self.session.arena.tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        self.reset()

    def recapture(self):
        for captured in filter(None, (self.session.graph, self.session.loop and self.session.loop.graph)):
            captured.invalidate()
        self.session.capture()
        self.seen = self.seen[:, :0]

    def reopen(self):
        self.session.close()
        with pytest.raises(RuntimeError, match="closed"):
            self.session.decode(self.tokens(1))
        self.session, self.seen = self.open(self.graph), self.seen[:, :0]


@pytest.mark.parametrize("examples", slow_after(1, [12, 250]))
def test_whatever_a_session_did_before_it_does_the_next_as_a_fresh_one(examples):
    def whole(arch, batch, graph, seed, steps):
        sessions = Sessions(arch, batch, graph, seed)
        for name, *values in steps:
            getattr(sessions, name)(*values)

    tried(
        examples, whole, arch=SHAPES, batch=st.integers(1, 2), graph=st.sampled_from([False, "decode", "loop"]),
        seed=st.integers(0, 2**32 - 1), steps=STEPS,
    )  # fmt: skip


# --- configs ---

# Not drawn: groups and what names files; what compiles for half a minute; where results go.
KEPT = {"device", "export", "artifact", "dry_run", "rerun", "artifact_trust"}
NUMBERS = {
    "batch": st.integers(-1, 3), "prompt_len": st.integers(0, 70), "new_tokens": st.integers(0, 12),
    "max_seq_len": st.integers(1, 90), "seed": st.integers(-1, 2**70), "model.seed": st.integers(-1, 2**70),
    "sampler.top_k": st.integers(-1, 300), "sampler.temperature": st.floats(width=32), "sampler.top_p": st.floats(-1, 2),
    "loop_ahead": st.integers(-1, 9), "repeats": st.integers(0, 2), "threads": st.integers(0, 2),
    "eval_bytes": st.integers(-1, 3000), "quant.group_size": st.integers(-1, 300),
}  # fmt: skip
GROUPS = ("model", "tracker", "launcher", "quant", "sampler")
NAMES = {
    path: st.sampled_from(list(setting.axis.values))
    for path, setting in axes.TABLE.items()
    if setting.axis.values
    and path not in KEPT
    and path.partition(".")[0] not in ("model", "tracker", "launcher", "quant", "sampler")
}
CHOICES = {"quant": ["none", "int8", "int4"], "sampler": ["greedy", "gumbel"]}
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        **NAMES,
        **NUMBERS,
        "quant": st.sampled_from(["none", "int8", "int4"]),
        "sampler": st.sampled_from(["greedy", "gumbel"]),
    },
).map(lambda found: dict(list(found.items())[:6]))
QUICK = ["model=nano", "device=cpu", "export=eager", "tracker=jsonl", "check=off", "repeats=1", "min_samples=1", "min_time_s=0",
         "new_tokens=2", "eval_bytes=0"]  # fmt: skip


def said(value):
    return {True: "true", False: "false", None: "null"}.get(value, value) if not isinstance(value, float) else repr(value)


@pytest.mark.parametrize("examples", slow_after(1, [10, 300]))
def test_a_config_runs_or_is_refused_before(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = []

    def runs_or_not(config):
        given = [f"{path}={said(value)}" for path, value in config.items()]
        kept = [one for one in QUICK if one.partition("=")[0] not in config]
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            code = main([*kept, *given, f"hydra.run.dir={tmp_path}/run{len(codes)}"])
        codes.append(code)
        lines = [line for line in error.getvalue().splitlines() if line.startswith("error")]
        assert code in (0, 2), (given, error.getvalue()[-1500:])
        if code == 2:
            assert len(lines) == 1 and len(lines[0]) <= 400, (given, error.getvalue()[-1500:])

    tried(examples, runs_or_not, config=CONFIGS)
    assert 0 in codes and 2 in codes, "of neither kind alone would this say much"


# --- records ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)
KEYS = (
    "schema",
    "id",
    "status",
    "started",
    "finished",
    "config",
    "check",
    "decode_tok_s",
    "rounds",
    "telemetry",
    "error",
    "notes",
)


@pytest.mark.parametrize("examples", slow_after(1, [60, 3000]))
def test_any_json_is_a_record_or_one_line(examples, tmp_path):
    path = tmp_path / "run" / "record.json"
    path.parent.mkdir()

    def read_or_refused(value, keys):
        if isinstance(value, dict):
            value |= keys
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        try:
            assert read_record(path)["schema"]
        except ValueError as refusal:
            line = str(refusal)
            assert str(path) in line and "\n" not in line and len(line.replace(str(path), "")) <= 400, line
        with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
            assert report([str(path.parent)]) in (0, 2), error.getvalue()

    schemas = st.sampled_from([f"moeexp.record/{number}" for number in range(5)]) | JSON
    keys = st.fixed_dictionaries({}, optional={key: JSON for key in KEYS} | {"schema": schemas})
    tried(examples, read_or_refused, value=JSON, keys=keys)
