"""What the machine computes with: the attention falls back to SDPA, and says so."""

import logging
import subprocess
import sys

import pytest
import torch

from fusion import hardware
from fusion.hardware import attention_implementation, peak_memory


@pytest.fixture(autouse=True)
def afresh() -> None:
    attention_implementation.cache_clear()


def machine(monkeypatch: pytest.MonkeyPatch, gpu: bool, flash: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(hardware, "find_spec", lambda name: object() if flash else None)


@pytest.mark.parametrize(
    ("wanted", "gpu", "flash", "found", "said"),
    [
        ("auto", True, True, "flash_attention_2", False),
        ("auto", True, False, "sdpa", True),
        ("auto", False, False, "sdpa", False),
        ("flash_attention_2", False, True, "sdpa", True),
        ("flash_attention_2", True, True, "flash_attention_2", False),
        ("eager", False, False, "eager", False),
    ],
)
def test_without_flash_attn_attention_falls_back_to_sdpa_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
    gpu: bool,
    flash: bool,
    found: str,
    said: bool,
) -> None:
    machine(monkeypatch, gpu, flash)
    with caplog.at_level(logging.WARNING):
        assert attention_implementation(wanted) == found
    assert ("falls back to SDPA" in caplog.text) == said


def test_peak_memory_is_the_programs_own_and_not_its_parents() -> None:
    held = b"\1" * (1 << 30)
    assert peak_memory() > len(held)
    script = "from fusion.hardware import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(child.stdout) < len(held)
