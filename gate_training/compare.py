"""Gates side by side: the fused model's answer loss on held-out routing examples, domain by domain.

`labelled` sends every token to its label's expert: what perfect routing would give.
"""

from pathlib import Path

from fusion.checkpoint import Checkpoint
from fusion.evaluation.answer_loss import answer_losses
from fusion.layers import Gates, Route, forced, gated
from gate_training.examples import RoutingData

LABELLED = "labelled"


def held_out_losses(folder: Path, data: RoutingData, gates: dict[str, Gates]) -> dict[str, dict[str, float]]:
    """Nats per answer token, {gates: {domain: loss}}, for each of `gates` and for LABELLED."""
    checkpoint, batches = Checkpoint(folder), data.held_out_batches()
    top_k = checkpoint.config["num_experts_per_tok"]
    routes: dict[str, Route] = {LABELLED: forced(), **{name: gated(found, top_k) for name, found in gates.items()}}
    return {
        name: answer_losses(checkpoint, batches, data.domains, route, f"answer loss, {name} gates")
        for name, route in routes.items()
    }


def mean_loss(losses: dict[str, float]) -> float:
    """The mean over domains."""
    return sum(losses.values()) / len(losses)
