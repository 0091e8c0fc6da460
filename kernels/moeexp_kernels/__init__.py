"""Ops of Qwen3.5-MoE decoding: one file per op, an fp32 reference beside every kernel, chosen by name in `registry`."""
