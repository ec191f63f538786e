"""The gates that trained ones are measured against: mergekit's six modes.

`random` and `uniform_random` draw as mergekit does. `hidden` (which is `hidden_last`), `hidden_avg` and `cheap_embed`
are mergekit's own functions: the anchor's hidden state at every layer's input, at the last token of each prompt or over
all of them, or the embeddings of the prompts' tokens, added up over an expert's prompts and normalised. The prompts are
the gate's own training examples here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.moe.router import get_cheap_embedding, get_hidden_states, tokenize_prompts

from fusion.architecture import sparse_layers
from fusion.checkpoint import Checkpoint
from fusion.data import ChatExample
from fusion.encoding import prompt_text
from fusion.hardware import compute_dtype
from fusion.layers import Gates
from fusion.progress import track
from fusion.recipe import Recipe

PROMPTS_AT_ONCE = 8


def random_gates(config: dict[str, Any], seed: int, uniform: bool = False) -> Gates:
    """`random` (standard normal) or `uniform_random` gates of a fused checkpoint, `(experts, hidden)` a layer."""
    generator = torch.Generator().manual_seed(seed)
    shape, bound = (config["num_experts"], config["hidden_size"]), math.sqrt(1 / config["hidden_size"])
    if uniform:
        return {layer: (2 * torch.rand(shape, generator=generator) - 1) * bound for layer in _sparse(config)}
    return {layer: torch.randn(shape, generator=generator) for layer in _sparse(config)}


def hidden_gates(
    config: dict[str, Any], anchor: Path, tokenizer: Any, prompts: Sequence[Sequence[str]], average: bool = False
) -> Gates:
    """`hidden` or (`average`) `hidden_avg` gates, `(experts, hidden)` a layer, from each expert's `prompts`.

    mergekit loads the anchor in bfloat16 and runs all prompts in one batch; here it is bfloat16 where that is fast, and
    a few prompts at a time. The anchor is whole in main memory: mergekit's function wants the states of all layers on
    one device.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(anchor, dtype=compute_dtype(), use_safetensors=True).eval()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    rows = []
    for texts in prompts:
        total = torch.zeros(config["num_hidden_layers"], config["hidden_size"])
        ordered = sorted(texts, key=len)  # little padding
        for start in track(range(0, len(ordered), PROMPTS_AT_ONCE), "mergekit's hidden gates", unit="batches"):
            piece = ordered[start : start + PROMPTS_AT_ONCE]
            tokens = tokenize_prompts(piece, tokenizer)
            tokens.pop("token_type_ids", None)
            total += get_hidden_states(model, tokens, average=average) * len(piece)  # (layers, hidden)
        rows.append(total / total.norm(dim=-1, keepdim=True).clamp_min(1e-8))
    tokenizer.padding_side = side
    return _by_layer(config, rows)


def embedding_gates(config: dict[str, Any], anchor: Path, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> Gates:
    """`cheap_embed` gates, `(experts, hidden)`, the same in every layer."""
    embedding = Checkpoint(anchor).tensor("model.embed_tokens.weight").float()  # (vocabulary, hidden)
    layers = config["num_hidden_layers"]
    rows = []
    for texts in prompts:
        ids = torch.cat([tokenize_prompts([text], tokenizer)["input_ids"] for text in texts], dim=1)  # (1, tokens)
        known, places = ids.unique(return_inverse=True)  # mergekit's one-hot vectors are over these alone
        tokens = {"input_ids": places, "attention_mask": torch.ones_like(places)}
        rows.append(get_cheap_embedding(embedding[known], tokens, layers, len(known)))
    return _by_layer(config, rows)


def _by_layer(config: dict[str, Any], rows: list[torch.Tensor]) -> Gates:
    """The gates of the sparse layers, from one `(layers, hidden)` an expert."""
    gates = torch.stack(rows, dim=1)  # (layers, experts, hidden)
    return {layer: gates[layer] for layer in _sparse(config)}


def expert_prompts(recipe: Recipe, rows: dict[str, list[ChatExample]], tokenizer: Any) -> list[list[str]]:
    """Per expert the first of `rows`, gate-training examples by domain, that it serves, in the chat template."""
    prompts: list[list[str]] = [[] for _ in recipe.experts]
    for name, examples in rows.items():
        prompts[recipe.expert_of(name)] += [prompt_text(tokenizer, row.prompt) for row in examples]
    count = recipe.evaluation.hidden_prompts
    return [texts[:: max(1, len(texts) // count)][:count] for texts in prompts]


def _sparse(config: dict[str, Any]) -> list[int]:
    dense = set(config.get("mlp_only_layers") or [])
    return sparse_layers(
        config["num_hidden_layers"], tuple(i for i in range(config["num_hidden_layers"]) if i not in dense)
    )
