"""flash-linear-attention: the delta rule alone, and with the library's conv before it and its gated norm after it, which is
what our op does in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeexp_kernels.bench.case import Case
from moeexp_kernels.bench.peers.peer import WHOLE, Peer, Unavailable, delta_expected, delta_inputs, hold

NAME = "flash-linear-attention"
COMPILES = True


def available() -> None:
    try:
        import fla.ops.gated_delta_rule  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{NAME} does not import ({error}); pip install {NAME}") from error


def rule_for(case: Case) -> tuple[str, Callable[..., tuple[Tensor, Tensor]]]:
    """(its name in the library, (copy, q, k, v) -> o [B,T,Hv,Dv], new state). The copy: our op's arguments, and a, b."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    rule = fused_recurrent_gated_delta_rule if case.phase == "decode" else chunk_gated_delta_rule

    def call(copy: dict, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rule(
            q=q, k=k, v=v, g=copy["a"], beta=copy["b"], A_log=copy["a_log"], dt_bias=copy["dt_bias"],
            initial_state=copy["recurrent_state"], output_final_state=True, use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip

    return rule.__name__, call


def delta_rule(case: Case) -> Peer:
    arguments = case.copies[0]
    name, rule = rule_for(case)
    copies = [{**copy, **delta_inputs(copy)} for copy in case.copies]

    def call(copy: dict) -> tuple[Tensor, Tensor]:
        o, state = rule(copy, copy["q"], copy["k"], copy["v"])
        hold(copy, state)
        return o, state

    return Peer(
        name=name, covers="the delta rule, l2 norms and gates; no conv, no gated norm", call=call, copies=copies,
        expected=lambda: delta_expected(arguments, copies[0]),
    )  # fmt: skip


def whole_op(case: Case) -> Peer:
    """Conv, rule and gated norm in a row. q|k|v, z, b and a lie each in memory of its own, as from projections of their own."""
    from fla.modules.convolution import causal_conv1d, causal_conv1d_update
    from fla.modules.fused_norm_gate import rms_norm_gated

    arguments = case.copies[0]
    rule_name, rule = rule_for(case)
    hk, hv = arguments["num_k_heads"], arguments["num_v_heads"]
    dk, dv = arguments["head_k_dim"], arguments["head_v_dim"]
    widths, dims = [hk * dk, hk * dk, hv * dv], (dk, dk, dv)
    # The rule copies a q, k or v that is not contiguous. With one token in all, slices of one conv's result are; with more,
    # a conv each is fewer launches than one conv and three copies, and is how the library's own layer does it.
    parts = [sum(widths)] if arguments["proj"].shape[:2].numel() == 1 else widths

    def conv_states(copy: dict) -> list[Tensor]:
        """[B, C, W] of each conv: the library's has a slot before ours, which it never reads."""
        return [state.contiguous() for state in F.pad(copy["conv_state"], (1, 0)).split(parts, dim=1)]

    def prepare(copy: dict) -> dict:
        mixed, z, b, a = (t.contiguous() for t in copy["proj"].split([sum(widths), hv * dv, hv, hv], dim=-1))
        return {
            **copy, "x": mixed.split(parts, dim=-1), "z": z.unflatten(-1, (hv, dv)), "b": b, "a": a,
            "filters": copy["conv_weight"].split(parts), "conv": conv_states(copy),
        }  # fmt: skip

    def conv(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if case.phase == "decode":  # updates the state in place
            return causal_conv1d_update(x=x, cache=state, weight=weight, activation="silu")
        return causal_conv1d(x=x, weight=weight, initial_state=state, output_final_state=True, activation="silu")

    def call(copy: dict) -> tuple[Tensor, ...]:
        done = [conv(*inputs) for inputs in zip(copy["x"], copy["filters"], copy["conv"], strict=True)]
        mixed, conv_state = [y for y, _ in done], [state for _, state in done]
        if len(mixed) == 1:
            mixed = mixed[0].split(widths, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, dim)) for y, dim in zip(mixed, dims, strict=True))
        o, state = rule(copy, q, k, v)
        hold(copy, state, *conv_state)
        y = rms_norm_gated(o, copy["z"], copy["norm_weight"], None, activation="silu", eps=copy["eps"])
        return y, state, *(kept[..., 1:] for kept in conv_state)

    def expected() -> tuple[Tensor, ...]:
        wide = {k: v.to(torch.float32, copy=True) if torch.is_tensor(v) else v for k, v in arguments.items()}
        y = case.reference(**wide)
        return y, wide["recurrent_state"], *wide["conv_state"].split(parts, dim=1)

    conv_name = (causal_conv1d_update if case.phase == "decode" else causal_conv1d).__name__
    return Peer(
        name=f"{conv_name} + {rule_name} + {rms_norm_gated.__name__}", covers=WHOLE, call=call,
        copies=[prepare(copy) for copy in case.copies], expected=expected,
        seed=lambda copy: {**copy, "conv": conv_states(arguments)},
    )  # fmt: skip


OPS = {"gdn": [delta_rule, whole_op]}
