"""flash-linear-attention: the delta rule between conv and gated norm, as layers of Qwen3.5 in transformers call it."""

from __future__ import annotations

from ..case import Case
from .peer import Peer, Unavailable, delta_expected, delta_inputs

NAME = "flash-linear-attention"
COMPILES = True


def available() -> None:
    try:
        import fla.ops.gated_delta_rule  # noqa: F401
    except ImportError as error:
        raise Unavailable(f"{NAME} does not import ({error}); pip install {NAME}") from error


def delta_rule(case: Case) -> Peer:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    arguments = case.copies[0]
    decode = case.phase == "decode"
    rule = fused_recurrent_gated_delta_rule if decode else chunk_gated_delta_rule
    copies = [{**delta_inputs(copy), "state": copy["recurrent_state"]} for copy in case.copies]

    def call(copy: dict) -> tuple:
        return rule(
            q=copy["q"], k=copy["k"], v=copy["v"], g=copy["a"], beta=copy["b"], A_log=arguments["a_log"],
            dt_bias=arguments["dt_bias"], initial_state=copy["state"], output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip

    return Peer(
        name=rule.__name__, covers="the delta rule, l2 norms and gates; no conv, no gated norm", call=call, copies=copies,
        expected=lambda: delta_expected(arguments, copies[0]),
    )  # fmt: skip


OPS = {"gdn": [delta_rule]}
