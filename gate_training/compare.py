"""Gates side by side: the fused model's answer loss on held-out routing examples, domain by domain.

`labelled` sends every token to its label's expert: what perfect routing would give.
"""

from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.encoding import encode_batches, load_tokenizer
from fusion.layers import Gates, LayerStream, Route, forced, gated
from fusion.recipe import Recipe
from gate_training.examples import RoutingExample, expert_labels

LABELLED = "labelled"


def held_out_losses(
    recipe: Recipe, folder: Path, examples: list[RoutingExample], gates: dict[str, Gates]
) -> dict[str, dict[str, float]]:
    """Nats per answer token, {gates: {domain: loss}}, for each of `gates` and for LABELLED."""
    checkpoint, settings = Checkpoint(folder), recipe.gate_training
    rows = [example.example for example in examples]
    labels = expert_labels(recipe, examples)
    batches = encode_batches(load_tokenizer(folder), rows, labels, settings.max_length, settings.batch_tokens)
    top_k = checkpoint.config["num_experts_per_tok"]
    routes: dict[str, Route] = {LABELLED: forced(), **{name: gated(found, top_k) for name, found in gates.items()}}
    losses = {}
    for name, route in routes.items():
        stream = LayerStream(checkpoint, batches, description=f"answer loss, {name} gates")
        stream.run(route)
        sums = {example.domain: [0.0, 0] for example in examples}
        for batch, nats in stream.token_nats(answers=True):
            for line, row in enumerate(batch.rows.tolist()):
                entry = sums[examples[row].domain]
                entry[0] += float(nats[line].sum())
                entry[1] += int((batch.answer & batch.real)[line].sum())
        losses[name] = {domain: nats / max(1, tokens) for domain, (nats, tokens) in sums.items()}
    return losses


def mean_loss(losses: dict[str, float]) -> float:
    """The mean over domains."""
    return sum(losses.values()) / len(losses)
