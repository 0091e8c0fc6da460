"""Whether a model's config.json says that its weights are quantised already.

Such a snapshot is refused whole, also where its tensors are plain: transformers would quantise those as it loads them, so
that what runs here would be another model than the one that the config describes."""

from __future__ import annotations

from typing import Any

from moeexp.config.files import short

KEYS = ("quantization_config", "compression_config")


def described(config: dict[str, Any]) -> str | None:
    """`quantization_config with quant_method='fp8'`; None where the config names no quantisation."""
    inner = config.get("text_config")
    for level in (config, inner if isinstance(inner, dict) else {}):
        for key in KEYS:
            if level.get(key) is not None:
                return f"{key} with {_method(level[key])}"
    return None


def _method(value: Any) -> str:
    method = value.get("quant_method") if isinstance(value, dict) else None
    return "no quant_method" if method is None else f"quant_method={short(method, 40)}"


def check_plain(config: dict[str, Any], where: str = "") -> None:
    """`ValueError` for a config that names a quantisation."""
    found = described(config)
    if found is not None:
        raise ValueError(
            f"the model config has a {found}: weights that are quantised already are not supported; give the unquantised "
            f"snapshot (and quantise with quant=int4 or int8), or remove the key if it does not belong there{where}"
        )
