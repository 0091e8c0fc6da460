# ruff: noqa: E501  the template's lines are the card's lines
"""The loss curve and the model card of `model=tiny`, from the figures in its `metrics.json`."""

from __future__ import annotations

from pathlib import Path


def plot(training: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    seconds = [point["seconds"] for point in training["curve"]]
    for key, label in (("train_bpb", "training (dropout on)"), ("validation_bpb", "validation books")):
        axes.plot(seconds, [point[key] for point in training["curve"]], label=label, marker=".")
    axes.set(xlabel="seconds of training", ylabel="bits per byte", title=f"tiny on {training['device']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def model_card(metrics: dict) -> str:
    t = metrics["training"]
    a, size = t["arguments"], t["text_bytes"]
    sample_lines = "\n".join("    " + line for line in (metrics["prompt"] + metrics["sample"]).splitlines()[:12])
    return f"""# tiny: a real, small Qwen3.5-MoE

A byte-level language model (vocabulary 256, no tokenizer file: token = byte) in the Qwen3.5-MoE architecture, small
enough to ship with the package: {t["parameters"]:,} parameters, {metrics["weights_bytes"] / 2**20:.1f} MiB in bfloat16. Hidden 128; 8 layers, every fourth full
attention (4 query and 2 key/value heads of 64, output gate, QK-norm, a quarter of each head rotary), the others gated
delta net (2 key and 4 value heads of 64); in each layer 24 experts of width 64, 4 per token, and a shared one.
It exists to test and demonstrate decoding on weights that mean something; it knows nothing but the King James Bible.

| | |
|---|---|
| held-out text ({", ".join(t["heldout_books"])}; {size["heldout"]:,} bytes) | **{metrics["heldout_bits_per_byte"]:.3f} bits per byte** (goal: at most 2.0) |
| sampled words that occur in the training text, 2048 bytes at temperature 0.8 | **{metrics["sample_words_known"]:.1%}** (goal: at least 90%; {len(metrics["sample_words_known_all"])} samples: {", ".join(f"{x:.1%}" for x in metrics["sample_words_known_all"])}) |
| the same for the held-out text itself | {metrics["heldout_words_known"]:.1%} |
| validation books ({", ".join(t["validation_books"])}; {size["validation"]:,} bytes), best of the run | {t["best_validation_bpb"]:.3f} bits per byte |
| experts' load on the held-out text, over all layers (even: {1 / 24:.3f}) | {metrics["expert_load_min"]:.3f} to {metrics["expert_load_max"]:.3f} |

Bits per byte: {metrics["protocol"]} The files are bfloat16, the arithmetic float32,
transformers' plain torch code on a CPU. Sampling: seed {metrics["sample_seed"]}, prompt "{metrics["prompt"]}", no top-k or top-p; words are
runs of letters, lower-cased; the first and the last word of a sample do not count.

## Training

`python moeexp/checkpoints/train_tiny.py --text .data/kjv.txt --out moeexp/checkpoints/tiny --minutes {a["minutes"]:g} --seed {a["seed"]}` on one
{t["device"]}, {t["date"]}: {t["steps"]:,} steps, {t["tokens"]:,} bytes ({t["epochs"]} epochs of {size["train"]:,}) in {t["seconds"]:.0f} s.
Seed {a["seed"]}; AdamW, peak learning rate {a["lr"]:g}, weight decay {a["weight_decay"]:g}, residual dropout {a["dropout"]:g}, balance loss {a["balance"]:g},
{a["batch_tokens"]:,} bytes a step in crops of 512 to 4096; fp32 master weights, {a["dtype"]} compute; experts `{a["experts"]}`, delta rule
`{a["delta"]}`. The validation books chose the checkpoint; the held-out books chose nothing. The schedule runs on the clock,
so another machine gets other weights from the same seed. Everything else is in `metrics.json`
({", ".join(f"{name} {version}" for name, version in t["versions"].items())}).

![loss curve](loss.png)

## Text and licence

The King James Version of 1611, from Debian's package `bible-kjv-text` 4.38 (`apt install bible-kjv bible-kjv-text`;
`--make-text` prints it with `bible -f`, drops the verse numbers, one verse a line, a heading per chapter; sha256
`{t["text_sha256"]}`). Debian's copyright file: "The copyright for the
King James Version text of the Bible is expired"; the data files are Chip Chapin's Bible Retrieval System, "provided for
unrestricted use". (In the United Kingdom printing it is still a Crown privilege.) Only the held-out books are in this
repository: `heldout.txt`.

## A sample

{sample_lines}
"""
