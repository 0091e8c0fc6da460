"""A declarative experiment framework for decoding Qwen3.5-MoE."""

__version__ = "0.1.0"
