"""Smaller weights for small cards: a fused model quantised by llm-compressor, in an environment of its own.

qwen-fusion quantize runs/demo/fused --scheme fp8
"""
