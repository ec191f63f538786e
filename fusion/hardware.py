"""What this machine computes with: the dtype that is fast on it, the attention implementation."""

import logging
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fusion.cpu import cpu_has_bfloat16


def compute_dtype() -> torch.dtype:
    """bfloat16 on a GPU or a CPU that has it, float32 otherwise, and everywhere with `QWEN_FUSION_FLOAT32=1`."""
    if os.environ.get("QWEN_FUSION_FLOAT32", "") not in ("", "0"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_available() or cpu_has_bfloat16() else torch.float32


def stream_device() -> str:
    """Where fusion.layers computes: one layer fits any GPU, so a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def attention_implementation(wanted: str) -> str:
    """`wanted` as transformers' name; where flash-attn is missing, it and `auto` fall back to SDPA, with a warning.

    Without a GPU `auto` is SDPA without one: there is nothing to miss.
    """
    if wanted not in ("flash_attention_2", "auto"):
        return wanted
    if torch.cuda.is_available() and find_spec("flash_attn"):
        return "flash_attention_2"
    if wanted == "flash_attention_2" or torch.cuda.is_available():
        logging.warning("flash-attn is not installed (or there is no GPU): attention falls back to SDPA")
    return "sdpa"


def peak_memory() -> int:
    """The most bytes that this program has had resident. getrusage's figure begins with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def available_memory() -> int:
    """Bytes of memory that programs can still take, by the kernel's estimate."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024
