"""Implementations that are no more, of which older records still name some. docs/log.md says what they taught."""

# (op, its removed implementation) -> what runs in its place.
REMOVED = {("router", "fused"): "triton", ("router", "in_moe"): "triton", ("gdn_decode", "with_out"): "triton"}


def refuse_removed(op: str, name: str | None) -> None:
    """`ValueError` for an implementation that was removed."""
    if name is not None and (op, name) in REMOVED:
        instead = REMOVED[op, name]
        raise ValueError(f"ops.{op}={name} was removed: it made no step faster (docs/log.md); use ops.{op}={instead}")
