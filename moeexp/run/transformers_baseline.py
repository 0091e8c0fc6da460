"""`engine=transformers`: transformers' own `generate` on the unquantised weights, timed and checked beside our stacks."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moeexp_runner import timing
from moeexp_runner.profiler import STEPS, Event, events_of, kernels_per_token, split
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moeexp.check.bits_per_byte import record_quality
from moeexp.check.check import Trace, check_tokens
from moeexp.check.reference import ReferenceRun, run_reference
from moeexp.check.tolerances import Part
from moeexp.check.verify import check_snapshot, snapshot_of
from moeexp.config.architecture import Architecture
from moeexp.config.schema import Config
from moeexp.config.sources import load_architecture
from moeexp.model.config_agreement import text_config
from moeexp.model.dequantise import DequantisedWeights
from moeexp.model.prompt import prompt_tokens, text_of
from moeexp.model.qwen3_5_moe import Qwen35MoE
from moeexp.record.phases import Phases
from moeexp.record.record import Record
from moeexp.record.telemetry import watch
from moeexp.run.benchmark import Benchmark
from moeexp.run.cache_size import cache_bytes
from moeexp.run.identity import confirm
from moeexp.run.roofline import bandwidth_share, bytes_per_step
from moeexp.stack.factory import build_model

# Beside the model: what its copy of one layer takes while it is filled, and the cache.
HEADROOM = 1.15


class TransformersSession:
    """What `moeexp_runner.timing` times, of a `Qwen3_5MoeForCausalLM`. Greedy."""

    def __init__(self, model: Any, *, batch: int, max_seq_len: int):
        self.model, self.batch, self.max_seq_len = model, batch, max_seq_len
        self.device, self.vocab_size = model.device, model.config.vocab_size

    def reset(self) -> None:
        """Every call begins with a cache of its own."""

    @torch.no_grad()
    def prefill(self, tokens: Tensor, logit_positions: Tensor | None = None) -> Tensor:
        """tokens [B, T] int64; logit_positions [n] int64, by default the last. Logits [B, n, V]."""
        kept = 1 if logit_positions is None else logit_positions
        return self.model(input_ids=tokens, use_cache=True, logits_to_keep=kept).logits

    def generate(
        self, tokens: Tensor, new_tokens: int, *, on_token: Callable[[list[int], int], bool | None] | None = None
    ) -> list[list[int]]:
        """tokens [B, T] int64 -> the new ids [B][new_tokens]. `on_token` is called as in `Session.generate`, but stops
        nothing: `eos=true` is refused with this engine."""
        ids = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new_tokens,
            streamer=_Listener(on_token),
        )
        return ids[:, tokens.shape[1] :].tolist()

    def close(self) -> None:
        del self.model


class _Listener:
    """A streamer: is handed the prompt, then each step's tokens as they come to the host."""

    def __init__(self, on_token: Callable[[list[int], int], bool | None] | None):
        self.on_token, self.count = on_token, -1

    def put(self, value: Tensor) -> None:
        if self.count >= 0 and self.on_token is not None:
            self.on_token(value.view(-1).tolist(), self.count)
        self.count += 1

    def end(self) -> None:
        pass


class TransformersWeights:
    """The reference's view of a transformers model's weights."""

    def __init__(self, model: Any):
        self.model = model

    def layer(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.model.model.layers[index].state_dict().items()}

    def embedding(self) -> Tensor:
        return self.model.model.embed_tokens.weight.float()

    def final_norm(self) -> Tensor:
        return self.model.model.norm.weight.float()

    def head(self) -> Tensor:
        return self.model.lm_head.weight.float()


def run_transformers(cfg: Config, *, run_dir: Path, record: Record, phases: Phases) -> None:
    """As `run_experiment`, for `engine=transformers`."""
    arch, text = load_architecture(cfg.model), text_of(cfg)
    prompt = prompt_tokens(cfg, arch, text)
    _check_memory(cfg, arch)
    with phases("weights"):
        ours = build_model(cfg, phases)
        confirm(cfg, record.data["identity"])
        loaded = [check_snapshot(cfg, ours, phases)] if cfg.check != "off" and snapshot_of(cfg) is not None else []
        dtype = getattr(torch, cfg.dtype)
        model = convert(ours, arch, dtype=dtype)
        del ours
        gc.collect()
    session = TransformersSession(model, batch=cfg.batch, max_seq_len=cfg.max_seq_len)
    prompt = prompt.to(session.device)
    record.set(ops={"implementations": {"engine": describe(model)}, "python_callbacks": None, "compiled": {}})
    benchmark = Benchmark(cfg, session, prompt, None, record)  # type: ignore[arg-type]
    with phases("benchmark"):
        benchmark.warm_up()
        with watch(cfg.device) as telemetry:
            while not benchmark.enough():
                benchmark.round()
    record.set(memory_gib=_memory(model))  # before anything that only the report needs allocates more
    values, profiled, share = benchmark.values(), {}, None
    with phases("energy and experts"):  # before a profiler slows down the host
        values |= benchmark.energy()
        again, expert_ids = choices(session, prompt, len(benchmark.ids[0]))
    bandwidth = timing.read_bandwidth(session.device)
    shapes, length = Qwen35MoE(arch, dtype=dtype, device="meta"), prompt.shape[1]
    floor = bytes_per_step(
        shapes, batch=cfg.batch, length=length + cfg.new_tokens // 2, ids=expert_ids[:, :, length:]
    ) | {"cache_bytes": cache_bytes(session.device), "read_bandwidth_gb_s": round(bandwidth / 1e9, 2)}  # fmt: skip
    if step_s := benchmark.step_s():
        share = bandwidth_share(floor, step_s=step_s)
        profiled = profile_steps(session, prompt, cfg.new_tokens - 1, step_us=1e6 * step_s)
    decode = text.decode
    record.set(
        **values,
        telemetry=telemetry.summary(),
        bytes_per_token=floor,
        bandwidth_share=share,
        **profiled,
        generated_ids=benchmark.ids,
        generated_text=[decode(row) for row in benchmark.ids] if decode else None,
        prompt_text=[decode(row) for row in prompt.tolist()] if decode and cfg.prompt is not None else None,
    )
    if cfg.check != "off":
        record.set(check=check(cfg, session, prompt, benchmark.ids, again, expert_ids, phases, loaded))
    record_quality(cfg, session, text, record, phases)  # type: ignore[arg-type]


def profile_steps(session: TransformersSession, prompt: Tensor, most: int, *, step_us: float) -> dict[str, Any]:
    """The record's {kernels_per_token, time_split}, of a pass apart from the timing over `most` decode steps or fewer, each of
    which took `step_us` without the profiler; nothing where there is no GPU to profile, or no step."""
    steps = min(most, STEPS)
    if session.device.type != "cuda" or not steps:
        return {}
    events = step_events(session, prompt, steps)
    found = split(events, wall_us=step_us * steps, steps=steps)
    return {"kernels_per_token": kernels_per_token(found), "time_split": found}


def step_events(
    session: TransformersSession,
    prompt: Tensor,
    steps: int,
    activity: ProfilerActivity = ProfilerActivity.CUDA,
    device: DeviceType = DeviceType.CUDA,
) -> list[Event]:
    """What ran during `steps` decode steps after the prompt [B, T]: from the arrival of the first token on the host, when
    the GPU is idle, to that of the last."""
    profiled = profile(activities=[activity], acc_events=True)
    with contextlib.ExitStack() as watching:

        def on_token(ids: list[int], index: int) -> None:
            if index == 0:
                watching.enter_context(profiled)
            elif index == steps:
                timing.synchronize(session.device)
                watching.close()

        session.generate(prompt, steps + 1, on_token=on_token)
    return events_of(profiled, device)


def convert(ours: Qwen35MoE, arch: Architecture, *, dtype: torch.dtype) -> nn.Module:
    """A `Qwen3_5MoeForCausalLM` with the weights of `ours`, which gives up each layer's once it has been copied."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    source, device = DequantisedWeights(ours), ours.norm.device
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**arch.to_hf()))
    backbone = model.model
    for index, layer in enumerate(backbone.layers):
        tensors = {name: tensor.to(dtype, copy=True) for name, tensor in source.layer(index).items()}
        layer.load_state_dict(tensors, strict=True, assign=True)
        ours.layers[index].to("meta")
    backbone.embed_tokens.weight = nn.Parameter(source.embedding().to(dtype), requires_grad=False)
    backbone.norm.weight = nn.Parameter(source.final_norm().to(dtype), requires_grad=False)
    tied = arch.tie_word_embeddings
    head = backbone.embed_tokens.weight if tied else nn.Parameter(source.head().to(dtype), requires_grad=False)
    model.lm_head.weight = head
    # Its frequencies are computed, not stored.
    backbone.rotary_emb = type(backbone.rotary_emb)(model.config).to(device)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"{left} were never filled"
    model.generation_config = type(model.generation_config)()  # greedy, past end-of-sequence tokens, as our benchmark
    return model.eval()


def choices(session: TransformersSession, prompt: Tensor, new_tokens: int) -> tuple[list[list[int]], Tensor]:
    """(the new ids [B][new_tokens], the experts [L, B, T + new_tokens - 1, k] int64 that each position took) of one
    generation after prompt [B, T]."""
    routers = [layer.mlp.gate for layer in session.model.model.layers]
    taken: list[list[Tensor]] = [[] for _ in routers]

    def watch_router(calls: list[Tensor]) -> Callable[..., None]:
        return lambda router, inputs, output: calls.append(output[2].view(prompt.shape[0], -1, output[2].shape[-1]))

    with contextlib.ExitStack() as hooks:
        for router, calls in zip(routers, taken, strict=True):
            hooks.callback(router.register_forward_hook(watch_router(calls)).remove)
        ids = session.generate(prompt, new_tokens)
    return ids, torch.stack([torch.cat(calls, dim=1) for calls in taken]).long()


def check(
    cfg: Config, session: TransformersSession, prompt: Tensor, ids: list[list[int]], again: list[list[int]],
    expert_ids: Tensor, phases: Phases, loaded: list[Part],
) -> dict[str, Any]:  # fmt: skip
    """Every generated token against the float32 reference on the experts that were chosen, layer by layer: `expert_ids`, of
    one more generation, whose tokens `again` must repeat the timed `ids` [B][n]. This engine is the reference's own code, so
    its logits and choices are not judged: only that what was timed generates what it should. `loaded`: what the check says of
    the weights that were converted."""
    new = torch.tensor(ids, device=prompt.device)
    fed, weights = torch.cat([prompt, new[:, :-1]], dim=1), TransformersWeights(session.model)

    def generated(reference: ReferenceRun) -> Trace:
        # Of its tokens alone: experts and state are the reference's, and no logits are judged.
        nothing = torch.empty(0, device=prompt.device)
        return Trace(fed, prompt.shape[1], nothing, reference.expert_ids, reference.states, new[:, -1])

    def run(name: str, dtype: torch.dtype, expert_ids: Tensor | None = None) -> ReferenceRun:
        with phases(f"check: {name}"):
            return run_reference(
                text_config(cfg.model), weights, fed, prompt.shape[1], dtype=dtype, device=prompt.device, expert_ids=expert_ids
            )

    reference, pair = run("reference", torch.float32, expert_ids), []
    if cfg.dtype != "float32":
        bf16 = run("bf16 baseline", torch.bfloat16)
        pair = [bf16, run("bf16 reference", torch.float32, bf16.expert_ids)]
    parts = [*loaded, check_tokens(generated(reference), reference, *pair)]
    failures = [f"{part.name}: {line}" for part in parts for line in part.failures()]
    if again != ids:
        failures.insert(0, "benchmark: the timed generation chose other tokens than the checked one")
    return {
        "passed": not failures,
        "parts": [part.to_json() for part in parts],
        "failures": failures[:50],
        "tokens": int(fed.shape[1]),
    }


def describe(model: Any) -> str:
    """Which of transformers' code paths ran."""
    import importlib.util

    import transformers

    fla = "with" if importlib.util.find_spec("fla") is not None else "without"
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    return f"transformers {transformers.__version__}, attention {attention}, experts {experts}, {fla} flash-linear-attention"


def _check_memory(cfg: Config, arch: Architecture) -> None:
    """`ValueError` where the unquantised weights cannot fit: before they are made."""
    if cfg.device != "cuda":
        return
    elements = sum(buffer.numel() for buffer in Qwen35MoE(arch, dtype=torch.float32, device="meta").buffers())
    needed = elements * getattr(torch, cfg.dtype).itemsize * HEADROOM / 2**30
    free = torch.cuda.mem_get_info()[0] / 2**30
    if needed > free:
        raise ValueError(
            f"engine=transformers needs about {needed:.0f} GiB for the unquantised weights, and {free:.0f} GiB of the GPU "
            "are free: use a smaller model or a GPU with more memory"
        )


def _memory(model: Any) -> dict[str, float]:
    from moeexp.run.memory import peaks

    weights = sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values()) / 2**30
    return {"weights": round(weights, 5)} | peaks(model.device)
