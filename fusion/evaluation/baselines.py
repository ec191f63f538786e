"""The gates that trained ones are measured against: random ones, and mergekit's `hidden` ones.

`random` draws as mergekit does. `hidden` is mergekit's own function: it takes the anchor's hidden state at the last
token of each prompt, at every layer's input, summed up and normalised; its prompts are the gate's own training examples
here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.moe.router import get_hidden_states, tokenize_prompts

from fusion.architecture import sparse_layers
from fusion.progress import track


def random_gates(config: dict[str, Any], seed: int) -> dict[int, torch.Tensor]:
    """mergekit's `random` gates of a fused checkpoint: standard normal, `(experts, hidden)` a layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config["num_experts"], config["hidden_size"])
    return {layer: torch.randn(shape, generator=generator) for layer in _sparse(config)}


def hidden_gates(
    config: dict[str, Any], anchor: Path, tokenizer: Any, prompts: Sequence[Sequence[str]], batch: int = 8
) -> dict[int, torch.Tensor]:
    """mergekit's `hidden` gates, `(experts, hidden)` a layer, from each expert's `prompts`.

    mergekit loads the anchor in bfloat16 and runs all prompts in one batch; here it is float32 and a few at a time.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32, use_safetensors=True).eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    rows = []
    for texts in prompts:
        total = torch.zeros(config["num_hidden_layers"], config["hidden_size"])
        ordered = sorted(texts, key=len)  # little padding
        for start in track(range(0, len(ordered), batch), "mergekit's hidden gates", unit="batches"):
            piece = ordered[start : start + batch]
            tokens = tokenize_prompts(piece, tokenizer)
            tokens.pop("token_type_ids", None)
            total += get_hidden_states(model, tokens, average=False) * len(piece)  # (layers, hidden)
        rows.append(total / total.norm(dim=-1, keepdim=True).clamp_min(1e-8))
    tokenizer.padding_side = side
    gates = torch.stack(rows, dim=1)  # (layers, experts, hidden)
    return {layer: gates[layer] for layer in _sparse(config)}


def _sparse(config: dict[str, Any]) -> list[int]:
    dense = set(config.get("mlp_only_layers") or [])
    return sparse_layers(
        config["num_hidden_layers"], tuple(i for i in range(config["num_hidden_layers"]) if i not in dense)
    )
