"""How fast gates are trained: tokens/s of the gate trainer against one plain forward pass of one dense expert.

    make bench            # python -m gate_training.bench configs/demo.yaml, after `make demo`

Every token has to pass every layer once, so the forward pass without head over the same tokens is the limit at top-1.
Both are timed alternately in one run; the last line is one JSON object.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel

from fusion.encoding import encode_batches, load_tokenizer
from fusion.errors import UserError
from fusion.layers import Batch
from fusion.recipe import load_recipe
from fusion.sources import expert_sources
from gate_training.examples import expert_labels, routing_examples
from gate_training.trainer import fit_gates

ROUNDS = 3


def forward_seconds(folder: Path, batches: list[Batch]) -> float:
    """Seconds of transformers' forward pass without head over right-padded batches, loading aside."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    with torch.inference_mode():
        start = time.perf_counter()
        for batch in batches:
            model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
        return time.perf_counter() - start


def main(path: str) -> None:
    """Prints the medians and their ratio for the recipe at `path`, whose fused model must exist."""
    recipe = load_recipe(Path(path))
    if not (recipe.fused / "config.json").is_file():
        raise UserError(f"{recipe.fused} does not exist yet: run `qwen-fusion run {path}` first")
    settings = recipe.gate_training
    train = routing_examples(recipe, "train", settings.rows)
    held_out = routing_examples(recipe, "held_out", settings.held_out_rows)
    rows = [example.example for example in (*train, *held_out)]
    labels = expert_labels(recipe, [*train, *held_out])
    tokenizer = load_tokenizer(recipe.fused)
    batches = encode_batches(tokenizer, rows, labels, settings.max_length, settings.batch_tokens)
    tokens = sum(int(batch.real.sum()) for batch in batches)
    plain, trained = [], []
    for _ in range(ROUNDS):
        plain.append(forward_seconds(expert_sources(recipe)[0].folder, batches))
        start = time.perf_counter()
        fit_gates(recipe, recipe.fused, train, held_out, settings.method)
        trained.append(time.perf_counter() - start)
    rates = [tokens / statistics.median(seconds) for seconds in (plain, trained)]
    print(f"forward pass of one dense expert: {rates[0]:,.0f} tokens/s; gate training: {rates[1]:,.0f} tokens/s")
    result = {"tokens": tokens, "top_k": recipe.routing.top_k, "throughput_vs_forward": rates[1] / rates[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(*(sys.argv[1:] or ["configs/demo.yaml"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
