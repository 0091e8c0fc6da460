"""A Hugging Face snapshot: its shards, its names, and the buffers that they fill."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeexp.config.architecture import Architecture
from moeexp.config.files import check_links, check_pointer, cut, is_inside, read_object, short
from moeexp.config.prequantised import check_plain, described
from moeexp.model.tensor_types import check_finite, check_types, is_finite

PREFIXES = ("model.language_model.", "model.")
# Tensors of a multimodal or multi-token-prediction checkpoint that a text decoder has no use for: those of which transformers
# does not warn, which the check counts as failures.
SKIPPED = re.compile(r"^(mtp\.|model\.visual\.)")
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$|^model\.safetensors$")


@dataclass(frozen=True)
class Piece:
    """Checkpoint tensor `key` (without prefix) of `shape` fills rows [start, stop) of a buffer (of one expert of it)."""

    key: str
    shape: tuple[int, ...]
    start: int
    stop: int
    expert: int | None = None


def _stack(*pieces: tuple[str, int], features: int, expert: int | None = None) -> list[Piece]:
    result, start = [], 0
    for key, rows in pieces:
        result.append(Piece(key, (rows, features), start, start + rows, expert))
        start += rows
    return result


def pieces(arch: Architecture, *, fused_experts: Callable[[int], bool] = lambda layer: True) -> dict[str, list[Piece]]:
    """Buffer name -> its pieces, in the order of the buffers. `fused_experts(layer)` tells which of the two layouts of
    expert weights the checkpoint uses there: 3-D tensors (the hub's) or one matrix per expert (`save_pretrained`'s)."""
    hidden, table = arch.hidden_size, {}

    def vector(name: str, key: str, *shape: int, rows: int | None = None) -> None:
        table[name] = [Piece(key, shape, 0, rows or shape[0])]

    table["embed_tokens.weight"] = _stack(("embed_tokens.weight", arch.vocab_size), features=hidden)
    for i, kind in enumerate(arch.layer_types):
        ours, theirs = f"layers.{i}.", f"layers.{i}."
        if kind == "linear_attention":
            table[ours + "mixer.in_proj.weight"] = _stack(
                (theirs + "linear_attn.in_proj_qkv.weight", arch.conv_dim),
                (theirs + "linear_attn.in_proj_z.weight", arch.value_dim),
                (theirs + "linear_attn.in_proj_b.weight", arch.linear_num_value_heads),
                (theirs + "linear_attn.in_proj_a.weight", arch.linear_num_value_heads),
                features=hidden,
            )
            table[ours + "mixer.out_proj.weight"] = _stack(
                (theirs + "linear_attn.out_proj.weight", hidden), features=arch.value_dim
            )
            vector(
                ours + "mixer.conv_weight",
                theirs + "linear_attn.conv1d.weight",
                arch.conv_dim,
                1,
                arch.linear_conv_kernel_dim,
            )
            vector(ours + "mixer.a_log", theirs + "linear_attn.A_log", arch.linear_num_value_heads, rows=1)
            vector(ours + "mixer.dt_bias", theirs + "linear_attn.dt_bias", arch.linear_num_value_heads, rows=1)
            vector(ours + "mixer.norm", theirs + "linear_attn.norm.weight", arch.linear_value_head_dim)
        else:
            heads, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
            table[ours + "mixer.qkv_proj.weight"] = _stack(
                (theirs + "self_attn.q_proj.weight", 2 * heads),
                (theirs + "self_attn.k_proj.weight", kv),
                (theirs + "self_attn.v_proj.weight", kv),
                features=hidden,
            )
            table[ours + "mixer.out_proj.weight"] = _stack((theirs + "self_attn.o_proj.weight", hidden), features=heads)
            vector(ours + "mixer.q_norm", theirs + "self_attn.q_norm.weight", arch.head_dim)
            vector(ours + "mixer.k_norm", theirs + "self_attn.k_norm.weight", arch.head_dim)
        _expert_pieces(table, arch, ours, theirs, fused=fused_experts(i))
        vector(ours + "input_norm", theirs + "input_layernorm.weight", hidden)
        vector(ours + "post_norm", theirs + "post_attention_layernorm.weight", hidden)
    vector("norm", "norm.weight", hidden)
    if not arch.tie_word_embeddings:
        table["head.weight"] = _stack(("lm_head.weight", arch.vocab_size), features=hidden)
    return table


def _expert_pieces(table: dict[str, list[Piece]], arch: Architecture, ours: str, theirs: str, *, fused: bool) -> None:
    hidden, experts = arch.hidden_size, arch.num_experts
    width, shared = arch.moe_intermediate_size, arch.shared_expert_intermediate_size
    table[ours + "moe.router"] = _stack((theirs + "mlp.gate.weight", experts), features=hidden)
    if fused:
        gate_up, down = theirs + "mlp.experts.gate_up_proj", theirs + "mlp.experts.down_proj"
        table[ours + "moe.gate_up.weight"] = [Piece(gate_up, (experts, 2 * width, hidden), 0, experts)]
        table[ours + "moe.down.weight"] = [Piece(down, (experts, hidden, width), 0, experts)]
    else:
        names = [theirs + f"mlp.experts.{e}." for e in range(experts)]
        table[ours + "moe.gate_up.weight"] = [
            piece
            for e, name in enumerate(names)
            for piece in _stack((name + "gate_proj.weight", width), (name + "up_proj.weight", width), features=hidden, expert=e)
        ]
        table[ours + "moe.down.weight"] = [
            piece
            for e, name in enumerate(names)
            for piece in _stack((name + "down_proj.weight", hidden), features=width, expert=e)
        ]
    expert = theirs + "mlp.shared_expert."
    table[ours + "moe.shared_gate_up.weight"] = _stack(
        (expert + "gate_proj.weight", shared), (expert + "up_proj.weight", shared), features=hidden
    )
    table[ours + "moe.shared_down.weight"] = _stack((expert + "down_proj.weight", hidden), features=shared)
    table[ours + "moe.shared_gate"] = _stack((theirs + "mlp.shared_expert_gate.weight", 1), features=hidden)


class Snapshot:
    """Tensors of a Hugging Face folder by name without prefix, read one at a time.

    The constructor checks the whole folder against the piece table before anything is read: `ValueError` with every
    missing, unexpected and mis-shaped key, or with the first tensor that is no plain weight."""

    def __init__(self, folder: Path, arch: Architecture):
        self.folder, self.arch = folder, arch
        self._files: dict[str, tuple[Path, str]] = {}  # key without prefix -> file, key in the file
        self._handles = open_shards(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        types: dict[str, str] = {}
        for path, handle in self._handles.items():
            for key in handle.keys():
                if SKIPPED.match(key):
                    continue
                name = next((key[len(p) :] for p in PREFIXES if key.startswith(p)), key)
                if name in self._files:
                    twice = f"{self._files[name][0].name} and {path.name}"
                    raise ValueError(f"{folder}: tensor {name!r} occurs twice, in {twice}")
                stored = handle.get_slice(key)
                self._files[name], shapes[name], types[name] = (path, key), tuple(stored.get_shape()), stored.get_dtype()
        per_expert = {int(m[1]) for key in shapes if (m := re.match(r"layers\.(\d{1,9})\.mlp\.experts\.\d+\.", key))}
        per_expert &= set(range(arch.num_hidden_layers))
        if (needed := 3 * arch.num_experts * len(per_expert)) > len(shapes):  # before a list of so many is made
            raise ValueError(
                f"{folder} does not fit its config.json: num_experts={arch.num_experts} in {len(per_expert)} layers are at "
                f"least {needed} tensors, and it holds {len(shapes)}"
            )
        self.pieces = pieces(arch, fused_experts=lambda layer: layer not in per_expert)
        wanted = {piece.key: piece.shape for parts in self.pieces.values() for piece in parts}
        config = read_object(folder / "config.json")
        check_types(str(folder), types, {*wanted, "lm_head.weight"}, described(config))
        check_plain(config, f" (in {folder / 'config.json'})")
        self._check(wanted, shapes)

    def _check(self, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
        allowed = set(wanted) | ({"lm_head.weight"} if self.arch.tie_word_embeddings else set())
        problems = {
            "missing": sorted(set(wanted) - set(found)),
            "unexpected": sorted(set(found) - allowed),
            "mis-shaped": [
                f"{k} is {found[k]}, expected {wanted[k]}" for k in sorted(wanted) if found.get(k, wanted[k]) != wanted[k]
            ],
        }
        if any(problems.values()):
            raise ValueError(f"{self.folder} does not fit its config.json: {_told(problems)}")

    def read(self, key: str) -> Tensor:
        path, full = self._files[key]
        return self._handles[path].get_tensor(full)

    def assemble(self, name: str, buffer: Tensor) -> None:
        """Fills `buffer` (any float dtype) with its pieces, each exactly once."""
        for piece in self.pieces[name]:
            target = buffer if piece.expert is None else buffer[piece.expert]
            target[piece.start : piece.stop].copy_(self.read(piece.key).view(target[piece.start : piece.stop].shape))
        if not is_finite(buffer):
            for piece in self.pieces[name]:
                path, key = self._files[piece.key]
                check_finite(key, self.read(piece.key), buffer.dtype, str(path))

    def check_tied_head(self, embedding: Tensor) -> None:
        """A tied checkpoint may bring the head as well; then it must be the embedding."""
        if "lm_head.weight" in self._files and not torch.equal(self.read("lm_head.weight").to(embedding), embedding):
            raise ValueError(f"{self.folder}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding")


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a snapshot: those its index names, or the single file. `ValueError` if any is missing, or
    if there are shards that the index does not name: they or the index belong to something else."""
    check_links(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = read_object(index)["weight_map"].values()
            if outside := [name for name in names if not is_inside(name)]:
                raise ValueError(f"{short(outside[0])} is no name of a file below its folder")
            names = sorted(set(names))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a safetensors index: {cut(str(error), 200)}; fetch it again") from error
        problems = {
            "missing": [name for name in names if not os.path.isfile(folder / name)],
            "not named by it": sorted(p.name for p in folder.iterdir() if SHARD.search(p.name) and p.name not in names),
        }
        if any(problems.values()):
            raise ValueError(f"{folder} does not hold the {len(names)} shards of its {index.name}: {_told(problems)}")
        return [folder / name for name in names]
    if not single.is_file():
        raise ValueError(
            f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json is there; "
            "give the folder of a Hugging Face snapshot, or model.weights=random"
        )
    return [single]


def open_shards(folder: Path) -> dict[Path, Any]:
    """The folder's safetensors files, opened: file -> handle."""
    return {path: open_shard(path) for path in _shards(folder)}


def open_shard(path: Path, device: str = "cpu") -> Any:
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        check_pointer(path)
        raise ValueError(f"{path} cannot be read as safetensors ({cut(str(error))}); fetch the file again") from error


def _told(problems: dict[str, list[str]]) -> str:
    """How many of each kind, and the first of them; in few enough characters for a line."""
    kinds = {kind: names for kind, names in problems.items() if names}
    return "; ".join(f"{len(names)} {kind}: {_some(names, 240 // len(kinds))}" for kind, names in kinds.items())


def _some(names: list[str], limit: int) -> str:
    shown = [cut(names[0], limit)]
    for name in names[1:8]:
        if sum(map(len, shown)) + len(name) > limit:
            break
        shown.append(cut(name))
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
