"""Trains `model=tiny`: transformers' own Qwen3.5-MoE, 6.1 M parameters, byte by byte on the King James Bible.

    python moeexp/checkpoints/train_tiny.py --make-text .data/kjv.txt     # needs Debian's bible-kjv and bible-kjv-text
    python moeexp/checkpoints/train_tiny.py --text .data/kjv.txt --out moeexp/checkpoints/tiny --minutes 5
    python moeexp/checkpoints/train_tiny.py --text .data/kjv.txt --out moeexp/checkpoints/tiny --evaluate  # on a CPU

Training ends with `--evaluate`: it reloads what was saved, in float32 on the CPU with transformers' plain torch code,
and writes the figures, the curve and the model card. Nothing is chosen by looking at the held-out books.

B sequences, T bytes each, N = B*T, L layers, E experts, k experts per token.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from moeexp.check.pure_torch import pure_torch
from moeexp.checkpoints.card_tiny import model_card, plot
from moeexp.checkpoints.loss_tiny import WINDOW, balance_loss, bits_per_byte, check_fla_gradients, residual_dropout
from moeexp.checkpoints.text_tiny import (
    HELD_OUT,
    VALIDATION,
    as_bytes,
    digest,
    make_text,
    share_known,
    split_books,
    words_of,
)

# Most steps at 512 bytes, where the delta rule is cheapest; a few as long as max_position_embeddings, so that the
# model still writes words where a long generation ends.
LENGTH_SHARES = {512: 0.60, 1024: 0.25, 2048: 0.10, 4096: 0.05}
SAMPLE_BYTES, TEMPERATURE, SAMPLES, PROMPT = 2048, 0.8, 4, "And it came to pass"
GOAL_BITS_PER_BYTE, GOAL_WORDS_KNOWN = 2.0, 0.9

CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": max(LENGTH_SHARES),
    "initializer_range": 0.05,  # 0.02 suits a hidden size of 2048; here it would leave every block near zero
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
    },
}


# ------------------------------------------------------------------------------------------------ training


def learning_rate(share: float, peak: float) -> float:
    """`share` of the time budget that has passed -> learning rate: 3 % warm-up, then a cosine to 1 % of the peak."""
    if share < 0.03:
        return peak * max(share / 0.03, 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min((share - 0.03) / 0.97, 1.0))))


def optimizer_groups(named: list[tuple[str, torch.Tensor]], decay: float) -> list[dict]:
    """Decay shrinks matrices only: on norms, biases, decay rates and the embedding it would act as a wrong prior."""
    matrix = [(p.ndim >= 2 and "embed" not in name and "conv1d" not in name) for name, p in named]
    return [
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if m], "weight_decay": decay},
        {"params": [p for (_, p), m in zip(named, matrix, strict=True) if not m], "weight_decay": 0.0},
    ]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    parts = split_books(args.text.read_text("ascii"))
    data = {name: as_bytes(text).to(args.device) for name, text in parts.items()}
    if args.delta == "fla":
        check_fla_gradients(args.device)
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    dtype = getattr(torch, args.dtype)
    config = Qwen3_5MoeTextConfig(**CONFIG)
    model = Qwen3_5MoeForCausalLM._from_config(config, experts_implementation=args.experts).to(args.device)
    residual_dropout(model, args.dropout)
    # The optimiser works on fp32 master weights, the model on a copy in the dtype it will ship in: what is validated is
    # what is saved, and grouped_mm (which autocast does not reach) sees bf16. Parameters only: casting the whole module
    # would round the rotary frequencies as well.
    params = list(model.parameters())
    masters = [p.detach().clone() for p in params]
    for p, master in zip(params, masters, strict=True):
        p.data = p.data.to(dtype)
        master.grad = torch.zeros_like(master)
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(
        optimizer_groups(list(zip(names, masters, strict=True)), args.weight_decay),
        lr=0.0, betas=(0.9, 0.98), fused=args.device == "cuda",
    )  # fmt: skip
    print(
        f"{sum(p.numel() for p in params):,} parameters; experts: {model.config._experts_implementation}; "
        f"attention: {model.config._attn_implementation}; delta rule: {args.delta}; {dtype}; "
        + ", ".join(f"{name} {len(x):,} B" for name, x in data.items()),
        flush=True,
    )
    lengths = [t for t in LENGTH_SHARES if t <= args.batch_tokens]
    shares = torch.tensor([LENGTH_SHARES[t] for t in lengths])

    def forward_backward(length: int) -> torch.Tensor:
        """One random batch of N = batch_tokens bytes; leaves gradients on `params`, returns nats per byte."""
        start = torch.randint(len(data["train"]) - length, (args.batch_tokens // length, 1), device=args.device)
        crop = data["train"][start + torch.arange(length + 1, device=args.device)].long()
        out = model(crop[:, :-1], use_cache=False, output_router_logits=True)
        loss = F.cross_entropy(out.logits.float().flatten(0, 1), crop[:, 1:].flatten())
        (loss + args.balance * balance_loss(out.router_logits, model.config.num_experts_per_tok)[0]).backward()
        return loss.detach()

    model.train()
    for length in lengths:  # kernels load and autotune before the clock starts
        forward_backward(length)
        model.zero_grad(set_to_none=True)
    bits_per_byte(model, data["validation"][: 2 * WINDOW])

    curve, best, best_state = [], math.inf, None
    budget, step, tokens = args.minutes * 60, 0, 0
    seen: list[Any] = []
    start = report = time.monotonic()
    while True:
        share = min((time.monotonic() - start) / budget, 1.0)
        if args.max_steps:
            share = max(share, step / args.max_steps)
        now = time.monotonic()
        if now - report >= args.report_every or share >= 1.0:
            train_bpb = float(torch.stack(seen).mean()) / math.log(2) if seen else math.nan
            if not math.isfinite(train_bpb):
                raise RuntimeError(f"the loss is {train_bpb} at step {step}; lower --lr (now {args.lr})")
            val_bpb, load = bits_per_byte(model, data["validation"])
            curve.append({
                "seconds": round(now - start, 1), "step": step, "tokens": tokens, "lr": optimizer.param_groups[0]["lr"],
                "train_bpb": round(train_bpb, 4), "validation_bpb": round(val_bpb, 4),
            })  # fmt: skip
            if val_bpb < best:
                best, best_state = val_bpb, {k: v.to(torch.bfloat16, copy=True) for k, v in model.state_dict().items()}
            print(
                f"{now - start:6.1f} s  step {step:6d}  {tokens / max(now - start, 1e-9):9,.0f} bytes/s  "
                f"epoch {tokens / len(data['train']):5.1f}  train {train_bpb:.3f}  validation {val_bpb:.3f} bpb  "
                f"least used expert {float(load.min()) * load.shape[-1]:.2f} of an even share",
                flush=True,
            )
            report, seen = time.monotonic(), []
            if share >= 1.0:
                break
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, args.lr)
        # The first steps see every length once, so a length that does not fit in memory fails at the start, not midway.
        length = lengths[step] if step < len(lengths) else lengths[int(torch.multinomial(shares, 1))]
        seen.append(forward_backward(length))
        with torch.no_grad():
            torch._foreach_copy_([m.grad for m in masters], [p.grad for p in params])
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            torch._foreach_copy_(params, masters)
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + args.batch_tokens // length * length

    model.load_state_dict(best_state)
    model.to("cpu")
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("model*.safetensors*"):
        old.unlink()
    model.save_pretrained(args.out, max_shard_size="4MB")
    for shard in args.out.glob("model*.safetensors"):
        shard.chmod(0o644)  # safetensors writes them for the owner alone
    (args.out / "heldout.txt").write_bytes(parts["heldout"].encode("ascii"))
    training = {
        "date": datetime.now(UTC).date().isoformat(),
        "arguments": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str)) and v is not False},
        "text_sha256": digest(args.text),
        "heldout_books": HELD_OUT,
        "validation_books": VALIDATION,
        "text_bytes": {name: len(x) for name, x in data.items()},
        "parameters": sum(p.numel() for p in params),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "versions": versions(),
        "steps": step, "tokens": tokens, "seconds": curve[-1]["seconds"],
        "epochs": round(tokens / len(data["train"]), 2),
        "best_validation_bpb": round(best, 4),
        "curve": curve,
    }  # fmt: skip
    write_json(args.out / "metrics.json", {"training": training})


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def sample(model: torch.nn.Module, seed: int) -> list[str]:
    """SAMPLES continuations of PROMPT, SAMPLE_BYTES each, at TEMPERATURE, nothing cut from the distribution."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.tensor([list(PROMPT.encode())]).repeat(SAMPLES, 1)
    cache, pieces = None, []
    model.eval()
    for _ in range(SAMPLE_BYTES):
        out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        token = torch.multinomial((out.logits[:, -1].float() / TEMPERATURE).softmax(-1), 1, generator=generator)
        pieces.append(token)
    return [bytes(row).decode("utf-8", errors="replace") for row in torch.cat(pieces, 1).tolist()]


def evaluate(args: argparse.Namespace) -> None:
    """Figures of the saved checkpoint, from its bf16 files computed in float32 by transformers' plain torch code."""
    from transformers import Qwen3_5MoeForCausalLM

    model = Qwen3_5MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32, experts_implementation="eager")
    heldout = (args.out / "heldout.txt").read_bytes()
    parts = split_books(args.text.read_text("ascii"))
    if heldout != parts["heldout"].encode():
        raise ValueError(f"{args.out}/heldout.txt is not the held-out part of {args.text}: it comes from another text")
    known = set(words_of(parts["train"]))
    bpb, load = bits_per_byte(model, as_bytes(parts["heldout"]), batch=4)
    print(f"held-out: {bpb:.4f} bits per byte", flush=True)
    model.set_experts_implementation("batched_mm")  # one token at a time: a gather beats a loop over experts
    texts = sample(model, args.seed)
    shards = sorted(args.out.glob("model*.safetensors"))
    metrics = json.loads((args.out / "metrics.json").read_text())
    metrics |= {
        "heldout_bits_per_byte": round(bpb, 4),
        "heldout_words_known": round(share_known(parts["heldout"], known), 4),
        "sample_words_known": round(share_known(texts[0], known), 4),
        "sample_words_known_all": [round(share_known(text, known), 4) for text in texts],
        "sample_seed": args.seed,
        "prompt": PROMPT,
        "sample": texts[0],
        "expert_load_min": round(float(load.min()), 4),
        "expert_load_max": round(float(load.max()), 4),
        "protocol": " ".join((bits_per_byte.__doc__ or "").split("Protocol:")[1].split()),
        "weights_bytes": sum(shard.stat().st_size for shard in shards),
        "weights_sha256": {shard.name: digest(shard) for shard in shards},
        "evaluation_versions": versions(),
    }
    write_json(args.out / "metrics.json", metrics)
    plot(metrics["training"], args.out / "loss.png")
    (args.out / "README.md").write_text(model_card(metrics))
    print(f"words known in the sample: {metrics['sample_words_known']:.1%} (all: {metrics['sample_words_known_all']})")
    print(PROMPT + texts[0][:600])
    if bpb > GOAL_BITS_PER_BYTE or metrics["sample_words_known"] < GOAL_WORDS_KNOWN:
        print(f"NOT GOOD ENOUGH: the goal is <= {GOAL_BITS_PER_BYTE} bits per byte and >= {GOAL_WORDS_KNOWN:.0%} words")
        raise SystemExit(1)


def versions() -> dict[str, str]:
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make-text", type=Path, metavar="OUT", help="write the whole text to OUT and stop")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the checkpoint in --out")
    parser.add_argument("--skip-evaluation", action="store_true", help="stop after saving; --evaluate later, anywhere")
    parser.add_argument("--text", type=Path, default=Path(".data/kjv.txt"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time; the learning rate follows the clock")
    parser.add_argument("--max-steps", type=int, default=0, help="stop earlier, for trials (0: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--delta", choices=("torch", "fla"), default="torch", help="implementation of the delta rule")
    parser.add_argument("--experts", choices=("grouped_mm", "eager"), default="grouped_mm")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the router's balance loss")
    parser.add_argument("--report-every", type=float, default=15.0, metavar="SECONDS")
    args = parser.parse_args(argv)
    if args.minutes <= 0 or args.batch_tokens < min(LENGTH_SHARES):
        parser.error(f"--minutes must be positive and --batch-tokens at least {min(LENGTH_SHARES)}")
    if args.make_text is None and not args.text.is_file():
        parser.error(f"--text {args.text} is not there; write it with --make-text")
    if args.make_text is None and not args.evaluate and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no GPU; use --device cpu for a trial")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.make_text is not None:
        make_text(args.make_text)
    elif args.evaluate:
        with pure_torch():
            evaluate(args)
    else:
        with pure_torch() if args.delta == "torch" else nullcontext():
            train(args)
        if not args.skip_evaluation:
            with pure_torch():
                evaluate(args)


if __name__ == "__main__":
    main()
