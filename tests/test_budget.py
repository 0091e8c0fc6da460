"""The budget of a decode step: bytes counted by hand, kernels in the order of real ops, and times made up from stored records."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import synthetic
import torch
from common import EVEN, load_model
from moeexp_kernels import ops as ops_package
from moeexp_kernels import registry, traffic
from moeexp_kernels.parts import tuning
from rich.console import Console
from triton.runtime.interpreter import GridExecutor

from moeexp.config.architecture import Architecture
from moeexp.config.compose import compose
from moeexp.config.validate import validate
from moeexp.model.qwen3_5_moe import Linear, Qwen35MoE, state_shapes
from moeexp.model.weights import Random
from moeexp.record import conformance
from moeexp.report.budget import short
from moeexp.report.html.page import page
from moeexp.report.markdown import document
from moeexp.report.terminal import print_run
from moeexp.run.budget import HEAD, REST, step_budget
from moeexp.run.experiment import Experiment
from moeexp.run.op_kernels import OpKernel, place
from moeexp.run.roofline import bytes_per_step, step_calls

ROOT = Path(__file__).resolve().parents[1]
STORED = Path(__file__).parent / "data"


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def counted(op, **arguments):
    """{part: {kind: bytes}}, without kinds of nothing."""
    how = {key: arguments.pop(key) for key in ("slots", "experts") if key in arguments}
    return {
        part: {kind: size for kind, size in sizes.items() if size}
        for part, sizes in traffic.traffic(op, arguments, **how).items()
    }


# Of two sequences, in bfloat16, each counted by hand.
def test_a_projection_moves_codes_scales_norm_and_rows():
    codes, scales = meta(6, 8, dtype=torch.uint8), meta(6, 2, 2, dtype=torch.float16)
    norm = meta(16, dtype=torch.float32)
    found = counted("linear", x=meta(2, 1, 16), weight=codes, scales=scales, norm_weight=norm, residual=meta(2, 1, 6), eps=0.1)
    assert found == {"whole": {"weights": 6 * 8 + 6 * 2 * 2 * 2 + 16 * 4, "activations": 2 * 2 * (16 + 6 + 6)}}


def test_a_delta_net_reads_and_writes_its_state():
    found = counted(
        "gdn", proj=meta(2, 1, 20), conv_weight=meta(12, 4), a_log=meta(2, dtype=torch.float32), conv_state=meta(2, 12, 3),
        recurrent_state=meta(2, 2, 3, 5, dtype=torch.float32), num_v_heads=2, head_v_dim=5,
    )  # fmt: skip
    state = 2 * (2 * 12 * 3 * 2 + 2 * 2 * 3 * 5 * 4)
    assert found == {"whole": {"weights": 12 * 4 * 2 + 2 * 4, "state": state, "activations": 2 * 2 * (20 + 10)}}


def test_attention_reads_the_slots_in_use_and_appends_one():
    cache, qkv = {"k_cache": meta(2, 1, 40, 8), "v_cache": meta(2, 1, 40, 8)}, meta(2, 1, 2 * (3 + 1) * 8)
    positions = meta(2, dtype=torch.int64)
    rope = counted("qk_norm_rope", qkv=qkv, q_norm=meta(8), positions=positions, num_heads=3, **cache)
    # q, k and v are read, the gate of 24 values is not; q is returned, k and v go into the cache.
    assert rope == {"whole": {"weights": 16, "activations": 2 * 2 * (64 - 24 + 24) + 16, "kv_cache": 2 * 2 * 8 * 2}}
    attend = counted("sdpa", q=meta(2, 1, 3, 8), qkv=qkv, positions=positions, slots=7, **cache)
    assert attend == {"whole": {"activations": 2 * 2 * 3 * 24 + 16, "kv_cache": 2 * 2 * 7 * 8 * 2}}


def test_of_experts_those_chosen_are_read_and_the_two_products_apart():
    experts = {"gate_up": meta(8, 12, 16), "down": meta(8, 16, 6), "shared_gate_up": meta(4, 16), "shared_down": meta(16, 2)}
    share = {"ids": meta(2, 1, 3, dtype=torch.int32), "weights": meta(2, 1, 3, dtype=torch.float32)}
    found = counted("moe", x=meta(2, 1, 16), norm_weight=meta(16), shared_gate=meta(1, 16), experts=4.5, **experts, **share)
    assert found["gate_up"] == {"weights": 4.5 * 12 * 16 * 2 + 2 * (4 * 16 + 16 + 16), "activations": 2 * 2 * 16 + 2 * 3 * 8}
    assert found["down"] == {"weights": 4.5 * 16 * 6 * 2 + 2 * 16 * 2, "activations": 2 * 2 * 16}
    trace = {"expert_ids": meta(2, 40, 3, dtype=torch.int32), "positions": meta(2, dtype=torch.int64)}
    router = counted("router", x=meta(2, 1, 16), weight=meta(8, 16), top_k=3, **trace)
    assert router == {"whole": {"weights": 8 * 16 * 2, "activations": 2 * 2 * 16 + 2 * 8 + 2 * 3 * (4 + 4 + 4)}}


def test_every_kernel_of_the_ops_is_in_the_table():
    """A helper that a kernel calls is none; every kernel is named so."""
    sources = [path.read_text() for path in Path(ops_package.__file__).parent.glob("*.py")]
    kernels = {line.split("(")[0].removeprefix("def ") for text in sources for line in text.split("@triton.jit\n")[1:]}
    assert {name for name in kernels if name.endswith("_kernel")} == {
        name for table in traffic.KERNELS.values() for name in table
    }
    assert traffic.KERNELS.keys() == traffic.LAST.keys() == {"embedding", *(traffic.base(op) for op in registry.OPS)}
    assert all(name in traffic.KERNELS[op] for op, names in traffic.LAST.items() for name in names)
    assert all(callable(traffic.OUTPUTS[traffic.base(op)]) for op in registry.OPS)


# --- the kernels of real ops ---

WIDE = dataclasses.replace(EVEN, hidden_size=64, linear_value_head_dim=64, num_attention_heads=4, moe_intermediate_size=64,
                           shared_expert_intermediate_size=64)  # fmt: skip


def launched(monkeypatch, batch, **chosen):
    """(the model, the names of the kernels that a decode step and its sampling launch, in order); none of them runs."""
    names: list[str] = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **options: names.append(self.fn.__name__))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    model = load_model(Random(WIDE, 0), dtype=torch.bfloat16, bits=4, group_size=64)
    kinds = dict.fromkeys(registry.OPS, "triton") | chosen
    ops = {op: registry.implementation(op, name) for op, name in kinds.items()} | registry.joined(kinds)
    shapes = state_shapes(WIDE, batch=batch, max_seq_len=64, dtype=torch.bfloat16)
    state = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    logits = model(tokens, tokens[:, 0] + 5, None, ops=ops, phase="decode", state=state)
    ops["sample"](logits=logits)
    return model, names


CASES = {
    "pairs": (1, {}), "tile": (4, {}), "experts' tile": (16, {}), "gemm": (40, {}), "tiled": (1, {"sdpa_decode": "tiled"}),
    "prefill kernels": (1, {"gdn_decode": "chunked"}), "tile always": (1, {"linear": "tile", "moe_decode": "tile"}),
    "fused": (2, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels_of_real_ops_are_placed(name, monkeypatch):
    """Two steps: every kernel is some op's, and every op has what it launched."""
    batch, chosen = CASES[name]
    most = {"UP_TO": 2 if name == "fused" else 0}
    monkeypatch.setitem(tuning.OVERRIDES, ("moe_routed", ""), most | {"TELLS": True})
    monkeypatch.setitem(tuning.OVERRIDES, ("gdn_out", ""), most)
    monkeypatch.setitem(tuning.OVERRIDES, ("linear_rows", ""), {"TILE_FROM": 3, "GEMM_FROM": 33, "MATMUL_FROM": None})
    model, names = launched(monkeypatch, batch, **chosen)
    ops = [traffic.base(call.op) for call in step_calls(model, batch=batch, length=5)]
    events = [(kernel, float(at), at + 0.5) for at, kernel in enumerate(names * 2)]
    placed = place(events, ops, steps=2)
    assert all(kernel.own for kernel in placed) and sum(kernel.calls for kernel in placed) == len(names)
    products = (
        "gemv_kernel",
        "gated_gemv_kernel",
        "logits_packed_kernel",
        "linear_tile_kernel",
        "gemm_kernel",
        "limb_logits_kernel",
    )
    for at, op in enumerate(ops[1:], 1):  # the embedding is torch's, on whatever device
        mine = Counter({kernel.name: kernel.calls for kernel in placed if kernel.at == at})
        assert mine and set(mine) <= set(traffic.KERNELS[op]), (op, mine)
        if op in ("linear", "router"):
            assert sum(mine[product] for product in products) == 1, "one product each"
            assert mine["limbs_kernel"] <= mine["linear_tile_kernel"], "and what prepares it, or the mixer did"
    assert sum(kernel.us for kernel in placed) == pytest.approx(len(names) * 0.5)
    fused = {"gated_gemv_kernel", "logits_packed_kernel", "gate_up_routed_kernel", "down_routed_kernel"}
    assert fused & set(names) == (fused if name == "fused" else set())


# --- times made up from stored records ---

# Kernels as the stored records name them.
FEW = {"linear": ["gemv_kernel"], "gdn": ["_decode_kernel", "_finish_kernel"], "qk_norm_rope": ["_qk_norm_rope_kernel"],
       "sdpa": ["_attend_splits_kernel", "_merge_kernel"], "router": ["gemv_kernel", "choose_experts_kernel"],
       "moe": ["gate_up_packed_kernel", "down_packed_kernel"], "sample": ["_chunk_best_kernel", "_best_kernel"]}  # fmt: skip
ROWS = {1: FEW, 4: FEW | {"linear": ["limbs_kernel", "linear_tile_kernel"]}}
STEPS = 3


def stored(sequences):
    """The record of a run of so many sequences."""
    return json.loads((STORED / f"budget_{sequences}.json").read_text())


def model_of(record):
    """Of its shapes and formats, on meta."""
    model = Qwen35MoE(Architecture.from_hf(record["config"]["model"]["architecture"]), dtype=torch.bfloat16, device="meta")
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "embed_tokens":
            *rows, features = module.shape
            module.register_buffer("weight", meta(*rows, features // 2, dtype=torch.uint8))
            module.register_buffer("scales", meta(*rows, features // 128, 2, dtype=torch.float16))
    return model


def events_of(record, calls, *, early=0.0):
    """(a start, then STEPS steps, of the record's kernels, each as long as it is on average there; the start alone). A kernel
    starts `early` microseconds before the one before it ends."""
    mean = {one["name"]: one["us"] / one["calls"] for one in record["time_split"]["by_kernel"]}
    names = [name for call in calls for name in ROWS[record["config"]["batch"]].get(traffic.base(call.op), [])]
    others = [
        one["name"] for one in record["time_split"]["by_kernel"] if one["name"] not in names for _ in range(int(one["calls"]))
    ]
    first = next(name for name in others if "indexSelect" in name)
    others.remove(first)
    events, at = [("a fill", -20.0, -18.0), ("a fill", -17.0, -16.0)], 0.0
    for name in [first, *names, *others] * STEPS:
        at -= early
        events.append((name, at, at + mean[name]))
        at += mean[name]
    return events, events[:2]


def budget_of(record, *, early=0.0, change=lambda events: events):
    calls = step_calls(model_of(record), batch=record["config"]["batch"], length=512 + 64)
    events, start = events_of(record, calls, early=early)
    kernels = place(change(events), [traffic.base(call.op) for call in calls], steps=STEPS, without=start)
    return calls, step_budget(calls, kernels, model_of(record).arch.layer_types)


def with_budget(record, **how):
    return record | {"step_budget": budget_of(record, **how)[1]}


def test_a_step_s_bytes_are_those_that_the_stored_record_has():
    """Its roofline was counted by another definition, from the model's buffers."""
    record = stored(1)
    found = bytes_per_step(model_of(record), batch=1, length=512 + 64)
    assert {key: found[key] for key in ("weights", "state", "kv_cache", "total")} == {
        key: record["bytes_per_token"][key] for key in ("weights", "state", "kv_cache", "total")
    }


@pytest.mark.parametrize("sequences", [1, 4])
def test_rows_sum_up_to_the_roofline_and_to_all_kernels(sequences):
    record = stored(sequences)
    calls, budget = budget_of(record)
    rows, batch = budget["rows"], record["config"]["batch"]
    total = bytes_per_step(model_of(record), batch=batch, length=512 + 64)
    assert sum(row["bytes"] for row in rows) == total["total"]
    assert sum(row["activations"] for row in rows) == total["activations"]
    by_kernel = record["time_split"]["by_kernel"]
    rounded = 0.0005 * record["kernels_per_token"]  # each kernel's time is, to a nanosecond
    assert sum(row["us"] for row in rows) == pytest.approx(sum(one["us"] for one in by_kernel), abs=rounded)
    assert sum(row["adds_us"] for row in rows) == pytest.approx(sum(row["us"] for row in rows), abs=0.05), "none overlap"
    assert sum(row["calls"] for row in rows) == record["kernels_per_token"]
    calls_of = {(row["op"], row["kernel"]): row["calls"] for row in rows}
    product = "gemv_kernel" if batch == 1 else "linear_tile_kernel"
    expected = {"linear in_proj": 30, "linear qkv_proj": 10, "linear out_proj": 40, "linear head": 1}
    assert {op: calls_of[op, product] for op in expected} == expected and calls_of["router", "gemv_kernel"] == 40
    assert [row["op"] for row in rows if row["bytes"] and row["kernel"] is None] == []
    in_proj = next(row for row in rows if (row["op"], row["kernel"]) == ("linear in_proj", product))
    assert in_proj["bytes"] == 30 * (12_352 * (1024 + 64) + 4 * 2048)  # codes, scales, norm
    unknown = [row for row in rows if row["op"] is None]
    ours = {name for names in ROWS[batch].values() for name in names}
    others = {one["name"] for one in by_kernel if one["name"] not in ours and "indexSelect" not in one["name"]}
    assert {row["kernel"] for row in unknown} == others and not any(row["bytes"] for row in unknown)
    assert "a fill" not in {row["kernel"] for row in rows}, "a generation without a step runs it as well"


def test_layers_cost_what_their_kernels_add():
    record = stored(1)
    _, budget = budget_of(record, early=0.5)
    layers = {part["name"]: part for part in budget["layers"]}
    assert [(name, part["count"]) for name, part in layers.items()] == [
        ("linear_attention", 30), ("full_attention", 10), (HEAD, 1), (REST, 1),
    ]  # fmt: skip
    assert sum(part["bytes"] for part in layers.values()) == record["bytes_per_token"]["total"]
    times, adds = (sum(row[key] for row in budget["rows"]) for key in ("us", "adds_us"))
    assert adds == pytest.approx(times - 0.5 * record["kernels_per_token"], abs=0.5)
    assert sum(part["adds_us"] for part in layers.values()) == pytest.approx(adds, abs=0.05)
    mean = {one["name"]: one["us"] / one["calls"] for one in record["time_split"]["by_kernel"]}
    shared = ("gemv_kernel",) * 3 + ("choose_experts_kernel", *FEW["moe"])
    delta = sum(mean[name] - 0.5 for name in (*shared, "_decode_kernel", "_finish_kernel"))
    assert layers["linear_attention"]["adds_us"] == pytest.approx(30 * delta, abs=0.05)


def renamed(names):
    return lambda events: [(names.get(name, name), start, end) for name, start, end in events]


def test_kernels_of_inductor_in_a_layer_are_under_their_own_names_and_in_its_time():
    """As of gdn_decode=einsum: the op's bytes then have a row without a kernel, and its fused kernels none."""
    own = {"_decode_kernel": "triton_poi_fused_embedding_9", "_finish_kernel": "triton_per_fused_mean_8"}
    calls, budget = budget_of(stored(1), change=renamed(own))
    rows = {(row["op"], row["kernel"]): row for row in budget["rows"]}
    assert rows["gdn_decode", None]["bytes"] == sum(call.parts["whole"][kind] for call in calls if call.op == "gdn_decode"
                                                    for kind in traffic.STORED)  # fmt: skip
    assert all(rows[None, name]["calls"] == 30 for name in own.values()), "a name with `embedding` in it is a layer's there"
    assert sum(row["bytes"] for row in budget["rows"]) == stored(1)["bytes_per_token"]["total"]
    before = {part["name"]: part["adds_us"] for part in budget_of(stored(1))[1]["layers"]}
    assert {part["name"]: part["adds_us"] for part in budget["layers"]} == pytest.approx(before, abs=0.05)


def test_where_kernels_are_not_in_the_order_of_the_ops_none_is_said_to_be_of_one():
    for change in (renamed({"gemv_kernel": "nvjet_sm90"}), lambda events: [*events, ("gemv_kernel", 1e9, 1e9 + 1)]):
        _, budget = budget_of(stored(1), change=change)
        assert budget["layers"] is None and all(row["op"] is None or row["kernel"] is None for row in budget["rows"])
        assert sum(row["bytes"] for row in budget["rows"]) == stored(1)["bytes_per_token"]["total"]
        names = {row["kernel"]: row["us"] for row in budget["rows"] if row["kernel"]}
        assert (
            names["down_packed_kernel"] == pytest.approx(of_kernels(stored(1))["down_packed_kernel"], abs=0.01)
            and not {"a fill"} & names.keys()
        )


def test_a_copy_on_a_stream_of_its_own_is_no_op_s():
    found = place([("gemv_kernel", 0.0, 5.0), ("memcpy32_post", 1.0, 2.0), ("choose_experts_kernel", 4.0, 6.0)],
                  ["embedding", "router", "sample"], steps=1)  # fmt: skip
    assert found == [
        OpKernel(1, True, "gemv_kernel", 1.0, 5.0, 5.0), OpKernel(None, False, "memcpy32_post", 1.0, 1.0, 0.0),
        OpKernel(1, True, "choose_experts_kernel", 1.0, 2.0, 1.0),
    ]  # fmt: skip


# --- what a reader sees ---


def of_kernels(record):
    """{kernel: µs of a step} as the profiler had them."""
    return {one["name"]: one["us"] for one in record["time_split"]["by_kernel"]}


def shown(record):
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        print_run(record, path=Path("record.json"), console=console)
    return captured.get()


def test_a_run_prints_its_budget():
    record = with_budget(synthetic.record() | {key: stored(1)[key] for key in stored(1)}, early=0.5)
    conformance.check(record)
    text = shown(record)

    def line_of(start):
        return next(line.split() for line in text.splitlines() if line.startswith(start))

    measured, bandwidth = of_kernels(stored(1)), stored(1)["bytes_per_token"]["read_bandwidth_gb_s"]
    row, us = line_of("linear in_proj"), measured["gemv_kernel"] / 121 * 30
    floor = 30 * (12_352 * (1024 + 64) + 4 * 2048) / bandwidth / 1e3
    # op, kernel, calls, MB, floor, µs, share, times the floor, what it adds, activations.
    assert row[2:5] == ["gemv_kernel", "30", "403.4"] and row[8] == "%"
    figures = [float(row[at]) for at in (5, 6, 7, 9, 10, 11)]
    adds, activations = us - 0.5 * 30, 30 * 2 * (2048 + 12_352) / 1e3
    assert figures == pytest.approx([floor, us, 100 * us / sum(measured.values()), us / floor, adds, activations], abs=0.15)
    assert line_of("wall ") == ["wall", f"{stored(1)['time_split']['wall_us']:,.1f}"]
    total = line_of("sum of kernels")
    kernels = str(round(stored(1)["kernels_per_token"]))
    assert total[3:6] == [kernels, "1,738.9", f"{1738869376 / bandwidth / 1e3:.1f}"] and total[7] == "100.0"
    delta = [float(figure.replace(",", "")) for figure in line_of("delta net")[2:]]
    beyond = delta[3] - delta[2]
    assert delta[0] == 30 and delta[4:] == pytest.approx([beyond, 30 * delta[3]], abs=3)
    assert "Kernels overlap" in text and f"{bandwidth:,.0f} GB/s" in text
    assert "Budget" not in shown(record | {"step_budget": None}) and "linear in_proj" not in shown(record | {"step_budget": None})


def test_a_long_name_makes_no_other_row_long():
    record = with_budget(synthetic.record() | {key: stored(1)[key] for key in stored(1)})
    rows = record["step_budget"]["rows"]
    record["step_budget"] |= {"rows": [rows[0] | {"op": "x" * 300_000}, *[rows[0]] * 5000], "layers": None}
    text = shown(record)
    assert "x" * 300_000 in text and len(text) < 3_000_000


def test_reports_have_the_budget_of_a_run_that_has_one():
    with_one, without = with_budget(stored(1)), stored(4)
    empty = dict.fromkeys(("step_budget",))
    markdown = document([synthetic.record() | with_one, synthetic.record() | without | empty])
    titles = [line for line in markdown.splitlines() if line.startswith("### Budget")]
    assert titles == ["### Budget of a step, 1 sequence", "### Budget of a step, 1 sequence, by layer"]
    assert "| linear qkv_proj | gemv_kernel | 10 |" in markdown and markdown.count("| sum of kernels |") == 1
    text = page([synthetic.record() | with_one], title="a")
    assert "Budget of a step" in text and "linear qkv_proj" in text
    assert "Budget" not in document([synthetic.record() | without | empty])


def test_a_damaged_budget_is_one_line():
    record = synthetic.record() | with_budget(stored(1))
    record["step_budget"]["rows"][0]["us"] = -1
    with pytest.raises(ValueError, match=r"step_budget.rows\[0\].us=-1: should be greater"):
        conformance.check(record)


def test_a_kernel_s_name_loses_what_all_of_torch_share():
    assert short("void at::native::(anonymous namespace)::indexSelectSmallIndex<long>") == "indexSelectSmallIndex<long>"
    assert len(short("triton_" + "x" * 99)) == 40


@pytest.mark.parametrize("overrides, cuda", [
    ([], False), (["device=cpu"], True), (["new_tokens=1"], True), (["engine=transformers", "quant=none"], True),
])  # fmt: skip
def test_a_budget_is_refused_where_there_are_no_kernels_to_tell_apart(overrides, cuda):
    validate(compose(["model=nano", *overrides]), cuda_available=cuda)
    with pytest.raises(
        ValueError, match="^profile=budget .* runs none: use device=cuda, engine=moeexp and new_tokens=2 or more, or profile=off$"
    ):
        validate(compose(["model=nano", "experiment=profile", *overrides]), cuda_available=cuda)
    validate(compose(["model=nano", "experiment=profile"]), cuda_available=True)


def test_a_budget_is_refused_without_a_check():
    """The record of such a run keeps none."""
    with pytest.raises(ValueError, match="^profile=budget .* no speed is published: use check=inline or check=separate"):
        validate(compose(["model=nano", "experiment=profile", "check=off"]), cuda_available=True)
    validate(compose(["model=nano", "experiment=profile", "check=separate"]), cuda_available=True)


def test_a_run_that_is_asked_records_its_budget(monkeypatch):
    """The profiler is not: it sees no kernels here."""
    kept, asked = {}, []

    def token_split(session, prompt, steps, *, step_us, place):
        asked.append(place.keywords["ops"] if place else [])
        return {"kernels": 1.0} | ({"by_op": [OpKernel(1, True, "gemv_kernel", 1.0, 2.0, 2.0)]} if place else {})

    monkeypatch.setattr("moeexp.run.experiment.token_split", token_split)
    for profile in ("budget", "off"):
        cfg = SimpleNamespace(profile=profile, batch=1, new_tokens=4)
        run = SimpleNamespace(
            cfg=cfg, stack=SimpleNamespace(model=load_model(Random(EVEN, 0)), session=None), on_device=None, arch=EVEN,
            benchmark=SimpleNamespace(values=dict, step_s=lambda: 1e-3), prompt=torch.zeros(1, 5), chosen=None,
            floor=lambda bandwidth: {"cache_bytes": None}, record=SimpleNamespace(set=lambda **values: kept.update(values)),
        )  # fmt: skip
        run.step = lambda run=run: Experiment.step(run)
        Experiment.publish(run, SimpleNamespace(summary=dict), 1e9)
        assert kept["time_split"] == {"kernels": 1.0}
    budget = kept["step_budget"]
    assert asked[1] == [] and len(asked[0]) == 1 + 3 * 5 + 1 + 2 and asked[0][:3] == ["embedding", "linear", "gdn"]
    assert budget["rows"][1]["kernel"] == "gemv_kernel" and budget["layers"][0]["adds_us"] == 2.0
