"""The same greedy tokens from transformers and from the vLLM server, in float32, at one, two and four ways, and the KV
cache that was planned."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fusion.checkpoint import Checkpoint, read_json
from fusion.layers import checkpoint_gates
from fusion.merge import merge
from fusion.plan.budget import kv_bytes_per_token
from fusion.plan.capacity import BLOCK_CPU, kv_blocks, logged_tokens
from gate_training.trainer import install_gates
from serving.engine import Engine, EngineSettings
from tests.families import write_model
from tests.recipes import make_recipe

PROMPTS = (list(range(5, 25)), list(range(60, 70)), [200, 7, 7, 91, 13])
LENGTH = 24


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five random experts, top-2, with shapes that four ways divide."""
    folder = tmp_path_factory.mktemp("parity")
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    anchor = write_model(folder / "anchor", seed=1, **shape)
    models = [write_model(folder / f"model{i}", seed=i + 2, anchor=anchor, **shape) for i in range(5)]
    experts = dict(zip(("general", "math", "coding"), models, strict=False))
    recipe = make_recipe(folder, anchor, experts, routing={"top_k": 2, "moe_layers": [0, 2]})
    more = [
        recipe.experts[0].model_copy(update={"name": f"more{i}", "model": str(model)})
        for i, model in enumerate(models[3:])
    ]
    out = merge(recipe.model_copy(update={"experts": (*recipe.experts, *more)}))
    torch.manual_seed(0)
    install_gates(out, {i: torch.randn_like(g) for i, g in checkpoint_gates(Checkpoint(out)).items()})
    return out


@pytest.fixture(scope="module")
def expected(fused: Path) -> list[list[int]]:
    """transformers' greedy continuation of every prompt."""
    model = AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(ids, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_vllm_gives_the_same_greedy_tokens(fused: Path, expected: list[list[int]], tmp_path: Path, ways: int) -> None:
    settings = EngineSettings(
        str(fused),
        "fused",
        dtype="float32",
        tensor_parallel_size=ways,
        max_model_len=128,
        cpu_kv_cache_bytes=64 * 2**20,
    )
    with Engine(settings, tmp_path / "vllm.log") as engine:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            body = {
                "model": "fused",
                "prompt": prompt,
                "max_tokens": LENGTH,
                "min_tokens": LENGTH,
                "temperature": 0,
                "return_token_ids": True,
            }
            request = urllib.request.Request(
                f"{engine.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                assert json.load(response)["choices"][0]["token_ids"] == tokens
    per_token = kv_bytes_per_token(read_json(fused / "config.json"), ways, "float32")
    blocks = kv_blocks(settings.cpu_kv_cache_bytes, per_token, BLOCK_CPU)
    logged = re.search(r"CPU KV cache size: ([\d,]+) tokens", (tmp_path / "vllm.log").read_text())
    assert logged
    assert int(logged[1].replace(",", "")) == logged_tokens(blocks, BLOCK_CPU, 128)
