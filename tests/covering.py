"""The axes that act on a GPU: which combinations are legal, and the few cells of them that get the long tests.

A fault of one axis shows in nearly any cell, and one of two axes together in a cell that has both values: so these lists
hold every pair of values that a legal combination has. Dispatch and graph alone have 16."""

import itertools
from dataclasses import replace

from moeexp.config.compose import compose
from moeexp.config.validate import validate

BASE = ["model=nano", "quant=int4", "max_seq_len=128", "export=eager", "new_tokens=12", "prefill_graph_lengths=[16,32]"]
AXES = {
    "dispatch": ("dual", "single", "token_by_token", "cond"),
    "state": ("shared", "explicit"),
    "shared_stream": ("true", "false"),
    "skip_output_copy": ("true", "false"),
    "cuda_graph": ("false", "decode", "loop", "all"),
}
COMPILED_AXES = {"export": ("aoti", "compile"), **AXES}

# Each passes the whole check in bfloat16.
PAIRWISE = [
    "dispatch=dual state=shared shared_stream=false skip_output_copy=false cuda_graph=false sampler=gumbel",
    "dispatch=dual state=shared shared_stream=true skip_output_copy=true cuda_graph=decode",
    "dispatch=dual state=shared shared_stream=true skip_output_copy=true cuda_graph=loop sampler=gumbel sampler.top_k=9",
    "dispatch=dual state=explicit shared_stream=false skip_output_copy=true cuda_graph=all",
    "dispatch=single state=shared shared_stream=true skip_output_copy=true cuda_graph=false",
    "dispatch=single state=explicit shared_stream=true skip_output_copy=false cuda_graph=decode",
    "dispatch=single state=shared shared_stream=true skip_output_copy=true cuda_graph=loop",
    "dispatch=single state=shared shared_stream=false skip_output_copy=true cuda_graph=all",
    "dispatch=token_by_token state=explicit shared_stream=true skip_output_copy=true cuda_graph=false",
    "dispatch=token_by_token state=shared shared_stream=true skip_output_copy=false cuda_graph=decode",
    "dispatch=token_by_token state=explicit shared_stream=false skip_output_copy=true cuda_graph=loop",
    "dispatch=token_by_token state=explicit shared_stream=false skip_output_copy=true cuda_graph=all",
    "dispatch=cond state=explicit shared_stream=true skip_output_copy=false cuda_graph=false",
    "dispatch=cond state=explicit shared_stream=false skip_output_copy=true cuda_graph=decode",
    "dispatch=cond state=explicit shared_stream=true skip_output_copy=true cuda_graph=loop",
    "dispatch=cond state=explicit shared_stream=true skip_output_copy=true cuda_graph=all",
]
# Compiled anew where no cache has them, about a minute each.
COMPILED = [
    "export=compile dispatch=dual state=explicit shared_stream=true skip_output_copy=false cuda_graph=false",
    "export=aoti dispatch=dual state=explicit shared_stream=false skip_output_copy=true cuda_graph=decode",
    "export=aoti dispatch=dual state=explicit shared_stream=true skip_output_copy=true cuda_graph=loop",
    "export=compile dispatch=dual state=shared shared_stream=true skip_output_copy=true cuda_graph=all",
    "export=compile dispatch=single state=explicit shared_stream=false skip_output_copy=true cuda_graph=false",
    "export=compile dispatch=single state=explicit shared_stream=false skip_output_copy=false cuda_graph=decode",
    "export=aoti dispatch=single state=shared shared_stream=true skip_output_copy=true cuda_graph=loop",
    "export=aoti dispatch=single state=shared shared_stream=false skip_output_copy=true cuda_graph=all",
    "export=aoti dispatch=token_by_token state=shared shared_stream=false skip_output_copy=false cuda_graph=false",
    "export=compile dispatch=token_by_token state=shared shared_stream=false skip_output_copy=false cuda_graph=decode",
    "export=aoti dispatch=token_by_token state=explicit shared_stream=false skip_output_copy=true cuda_graph=loop",
    "export=compile dispatch=token_by_token state=shared shared_stream=true skip_output_copy=true cuda_graph=all",
    "export=aoti dispatch=cond state=explicit shared_stream=true skip_output_copy=true cuda_graph=false",
    "export=aoti dispatch=cond state=explicit shared_stream=true skip_output_copy=false cuda_graph=decode",
    "export=compile dispatch=cond state=explicit shared_stream=true skip_output_copy=true cuda_graph=loop",
    "export=aoti dispatch=cond state=explicit shared_stream=false skip_output_copy=true cuda_graph=all",
]

_BASE = compose(BASE)  # composing takes far longer than validating


def is_legal(point: dict[str, str]) -> bool:
    try:
        values = {name: {"true": True, "false": False}.get(value, value) for name, value in point.items()}
        validate(replace(_BASE, **values), cuda_available=True)
    except ValueError:
        return False
    return True


def legal_points(axes: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    points = (dict(zip(axes, cell, strict=True)) for cell in itertools.product(*axes.values()))
    return [point for point in points if is_legal(point)]


def missing_pairs(cells: list[str], axes: dict[str, tuple[str, ...]]) -> set[frozenset[tuple[str, str]]]:
    """Pairs of values that some legal combination of `axes` has, and no cell."""

    def pairs(points):
        return {frozenset(pair) for point in points for pair in itertools.combinations(point.items(), 2)}

    written = (dict(override.split("=") for override in cell.split()) for cell in cells)
    return pairs(legal_points(axes)) - pairs([{name: cell[name] for name in axes} for cell in written])
