"""The shapes that the bench measures: those of Qwen3.5-35B-A3B, and others to tune for (a test compares them with conf/model)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shapes:
    vocab: int
    hidden: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    rotary: int  # dims of head_dim that rotate
    gdn_k_heads: int
    gdn_v_heads: int
    gdn_k_dim: int
    gdn_v_dim: int
    conv_width: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    group: int  # of the quantised weights
    kv_lens: tuple[int, ...]  # slots in use, for attention's decode step
    prefill: tuple[int, ...]  # tokens of a prompt

    @property
    def channels(self) -> int:
        """Channels of the delta net's conv: q, k and v."""
        return 2 * self.gdn_k_heads * self.gdn_k_dim + self.gdn_v_heads * self.gdn_v_dim

    @property
    def gdn_row(self) -> int:
        """Outputs of the delta net's input projection: q, k, v, z, b, a."""
        return self.channels + self.gdn_v_heads * (self.gdn_v_dim + 2)

    @property
    def attention_row(self) -> int:
        """Outputs of the attention's input projection: q and gate, k, v."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """name -> (outputs, inputs, is it an input projection, which has the norm before it?); else it adds a residual."""
        return {
            "gdn in": (self.gdn_row, self.hidden, True),
            "attention in": (self.attention_row, self.hidden, True),
            "out": (self.hidden, self.heads * self.head_dim, False),
            "head": (self.vocab, self.hidden, True),
        }


FULL = Shapes(
    vocab=248_320, hidden=2048, heads=16, kv_heads=2, head_dim=256, rotary=64, gdn_k_heads=16, gdn_v_heads=32,
    gdn_k_dim=128, gdn_v_dim=128, conv_width=4, experts=256, top_k=8, expert_width=512, shared_width=512, group=128,
    kv_lens=(512, 4096, 65_536), prefill=(512, 2048),
)  # fmt: skip
MODELS = {
    "qwen3_5_35b_a3b": FULL,
    "qwen3_5_122b_a10b": replace(FULL, hidden=3072, heads=32, gdn_v_heads=64, expert_width=1024, shared_width=1024),
}
