"""Qwen3.5-MoE and its weights."""
